"""How near edges come to the published EAP-IG code on two random models: each at its own points, and both at its.

    python -m benchmarks.repro.eap_ig

That code's scores are stored (tests/golden/eap_ig). Its sum over steps starts at the corrupt run and stops before the
clean one; ours starts after the corrupt run and ends at the clean one. With clean and corrupt exchanged, ``edges``
takes that code's points, and its scores change sign.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep
from cutaway import catalog
from cutaway.models.handle import Model
from cutaway.ops.stats import rank_correlation
from cutaway.ops.wiring import Wiring
from tools.make_edge_oracle import FOLDER, PAIRS, STEPS, recipes, task
from tools.make_oracle import build


def theirs(name: str, scores: str, wiring: Wiring) -> Tensor:
    """[sender, receiver] the stored scores; those of the keys and values that a group shares are summed."""
    found, stored = [], load_file(FOLDER / f"{name}.safetensors")[scores]
    for layer, (heads, groups) in enumerate(zip(wiring.heads, wiring.kv_heads, strict=True)):
        block = stored[:, layer * (3 * heads + 1) :][:, : 3 * heads + 1]
        q, k, v, mlp = block.split([heads, heads, heads, 1], dim=1)
        found += [q, *(side.unflatten(1, (groups, -1)).sum(-1) for side in (k, v)), mlp]
    return torch.cat([*found, stored[:, -1:]], dim=1)


def both(name: str, scores: str, steps: int, exchanged: bool = False) -> tuple[Tensor, Tensor]:
    """[edge] what ``edges`` says, in float64, and what is stored.

    ``exchanged``: with clean as corrupt, corrupt as clean, and the sign turned.
    """
    recipe = recipes()[name]
    model = Model(build(recipe)[0].double(), name=f"random {name}")
    clean, corrupt, answers, rivals = task(recipe)
    asked: dict[str, Any] = {"answers": [f"#{i}" for i in answers], "rivals": [f"#{i}" for i in rivals]}
    asked |= {"clean": corrupt, "corrupt": clean} if exchanged else {"clean": clean, "corrupt": corrupt}
    found: Any = catalog.run("edges", model, **asked, steps=steps, verify=0)
    wiring = Wiring.of_model(model)
    weight = torch.from_numpy(found.weight.copy())
    stored = theirs(name, scores, wiring).double()[wiring.edges]
    return -weight if exchanged else weight, stored


def compared(ours: Tensor, stored: Tensor) -> dict[str, float]:
    """Rank correlation, and the largest difference as a part of the stored scores' largest."""
    far = float((ours - stored).abs().max() / stored.abs().max())
    return {"edges": len(stored), "spearman": rank_correlation(ours, stored), "largest difference": far}


def main() -> None:
    """Compare, print, keep."""
    figures: dict[str, Any] = {"pairs": PAIRS}
    for name in recipes():
        figures[f"{name}, EAP"] = compared(*both(name, "eap", 1))
        for steps in STEPS:
            asked = name, f"eap_ig_{steps}", steps
            figures[f"{name}, EAP-IG, {steps} steps, each its own points"] = compared(*both(*asked))
            figures[f"{name}, EAP-IG, {steps} steps, the same points"] = compared(*both(*asked, exchanged=True))
    path = keep("eap_ig", figures, "differences are parts of the stored scores' largest")
    for name, value in figures.items():
        print(name, value)
    print(path.name)


if __name__ == "__main__":
    main()
