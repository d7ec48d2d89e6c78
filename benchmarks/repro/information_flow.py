"""Information flow on the facts of *town*: are the heads that most comes through needed, against random and a sweep?

Per question the three heads with the most flow, by either share, are zeroed; beside them three random ones of the same
layers, and the three whose single removal costs most, which takes a sweep over all heads.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interval, keep
from benchmarks.repro.neuron_attribution import questions
from cutaway.core.intervention import Zero
from cutaway.core.metric import Metric
from cutaway.engine.replay import replay
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import Draws
from cutaway.ops.flow import By, flow, routes
from cutaway.ops.units import Unit

PROMPTS, K, DRAWS = 100, 3, 5
SHARES: tuple[By, ...] = ("proximity", "projection")


def strongest(model: Model, inputs: Any, by: By) -> list[Unit]:
    """The heads that most comes through."""
    through = routes(flow(model, inputs, by), inputs.ids.shape[1] - 1)
    found = {Unit("attn.z", i, h): float(w) for i, ws in through.heads.items() for h, w in enumerate(ws.sum((0, 1)))}
    return sorted(found, key=lambda unit: -found[unit])[:K]


def swept(model: Model, inputs: Any, token: int) -> list[Unit]:
    """The heads whose removal costs most, one at a time."""
    units = [Unit("attn.z", i, h) for i, plan in enumerate(model.layers) for h in range(plan.attention.heads)]
    found = replay(model, inputs, [Zero(str(u)) for u in units], Metric("logprob", (token,)), progress=False)
    return [units[i] for i in (found.base - found.values).argsort(descending=True)[:K].tolist()]


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model, started = load("town"), time.perf_counter()
    drops: dict[str, list[float]] = {}
    shared: dict[str, list[float]] = {}
    asked = questions(model, PROMPTS)
    for n, (inputs, token) in enumerate(asked):
        named = {by: strongest(model, inputs, by) for by in SHARES} | {"sweep": swept(model, inputs, token)}
        draws = Draws(model, named["proximity"], inputs.ids.shape[1], n)
        sets = [*named.values(), *(draws.draw(K) for _ in range(DRAWS))]
        ablation = Ablation(model, inputs, [token])
        drop = float(ablation.base().logp[0]) - ablation(sets).logp
        for name, value in zip(named, drop[: len(named)].tolist(), strict=True):
            drops.setdefault(name, []).append(value)
        drops.setdefault("random", []).append(float(drop[len(named) :].mean()))
        for by in SHARES:
            shared.setdefault(by, []).append(float(len(set(named[by]) & set(named["sweep"]))))
    figures: dict[str, Any] = {"prompts": len(asked), "heads zeroed": K, "heads": 16}
    figures["drop in log p"] = {name: float(torch.tensor(values).mean()) for name, values in drops.items()}
    figures["drop less that of random heads"] = {
        by: interval(torch.tensor(drops[by]) - torch.tensor(drops["random"])) for by in SHARES
    }
    figures["of the sweep's heads"] = {by: float(torch.tensor(values).mean()) for by, values in shared.items()}
    for name, value in figures.items():
        print(name, value)
    path = keep("information_flow", figures, "specimen town, its facts; random: mean of 5 draws of the same layers")
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
