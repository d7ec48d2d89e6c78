"""Comparative neuron analysis on the sums of *town*: what the ten, thirty, hundred best neurons by each score carry.

After Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative neuron
analysis", section 4: per sum, the head whose removal costs most is zeroed, FFN neurons of the deeper half are ranked,
and the first k are zeroed, or all the others. Beside the paper's difference stand what is lost (opponents of the answer
in the second run count as nothing), the plain importance, which needs no second run, and random neurons.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interval, keep
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Zero
from cutaway.core.metric import Metric
from cutaway.data import Town
from cutaway.engine.replay import replay
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.comparison import By, Case, Comparison
from cutaway.ops.draws import Draws
from cutaway.ops.importance import Goal
from cutaway.ops.maskkeep import mask_and_keep
from cutaway.ops.parts import take_apart
from cutaway.ops.readout import Head
from cutaway.ops.units import Unit

SUMS, DRAWS = 200, 5
SIZES = (1, 3, 10, 30, 100)
DEEP = (2, 3)
SCORES: tuple[By, ...] = ("difference", "lost", "importance")


def sums(model: Model, count: int, seed: int = 0) -> list[tuple[Inputs, int]]:
    """Trained sums and differences in signs with an answer of one token that the model puts first."""
    asked = [e for e in Town().sums() if e.split == "train" and e.form.endswith("/0")]
    Random(seed).shuffle(asked)
    found: list[tuple[Inputs, int]] = []
    for example in asked:
        ids = model.processor(example.answer, add_special_tokens=False)["input_ids"]
        inputs = model.inputs(example.prompt)
        if len(ids) == 1 and int(model(inputs)[0, -1].argmax()) == ids[0]:
            found.append((inputs, ids[0]))
        if len(found) == count:
            break
    return found


def sweep(model: Model, asked: list[tuple[Inputs, int]], layers: tuple[int, ...]) -> tuple[list[str], Tensor]:
    """The heads of some layers, and [sum, head] what log p of the answer falls by without each."""
    sites = [f"L{i}.attn.z[{h}]" for i in layers for h in range(model.layers[i].attention.heads)]
    rows = []
    for inputs, token in asked:
        found = replay(model, inputs, [Zero(s) for s in sites], Metric("logprob", (token,)), progress=False)
        rows.append((found.base - found.values).double())
    return sites, torch.stack(rows)


def curves(model: Model, asked: list[tuple[Inputs, int]], head: str) -> dict[str, Any]:
    """Accuracy and areas by every score, over the sums whose answer changes without the head."""
    readout = Head(model)
    masked: dict[str, list[Tensor]] = {}
    kept: dict[str, list[Tensor]] = {}
    lost: dict[str, list[float]] = {}
    moved = 0
    pool = [Unit("mlp.act", i, 0) for i in DEEP]
    for n, (inputs, token) in enumerate(asked):
        a = take_apart(model, inputs, 1, "neuron")
        with model.doing(f"zero {head}"):
            b = take_apart(model, inputs, 1, "neuron")
        if int(b.logits[0].argmax()) == token:
            continue
        moved += 1
        both = Comparison([Case(Goal.of(readout.frozen(a.final, a.logits), [token]), a, b)], DEEP)
        index = {by: both.top(SIZES[-1], by).index for by in SCORES}
        rankings: dict[str, Any] = {by: both.units(i) for by, i in index.items()}
        draws = Draws(model, rankings["difference"], inputs.ids.shape[1], n)
        rankings |= {f"random {d}": draws.draw(SIZES[-1]) for d in range(DRAWS)}
        left = mask_and_keep(model, [inputs], [token], list(rankings.values()), pool, SIZES)
        for r, name in enumerate(rankings):
            masked.setdefault(name, []).append(left.right_masked[r])
            kept.setdefault(name, []).append(left.right_kept[r])
        for by, i in index.items():
            here, there = both.coefficients(i[:10], 0)[0], both.coefficients(i[:10], 1)[0]
            share = ((here - there) * here.sign()).sum() / here.abs().sum()
            lost.setdefault(by, []).append(float(share))
    if moved == 0:
        return {"head": head, "sums": len(asked), "answer changes": 0}
    rows: dict[str, Any] = {}
    for what, found in (("mask", masked), ("keep", kept)):
        values = {name: torch.stack(rows_) for name, rows_ in found.items()}
        values["random"] = torch.stack([values.pop(f"random {d}") for d in range(DRAWS)]).mean(0)
        for ranking, value in values.items():
            row = rows.setdefault(ranking, {})
            row[what] = dict(zip(map(str, SIZES), value.mean(0).tolist(), strict=True))
            row[f"{what} area"] = float(value.mean())
            row[f"{what} area, less plain importance"] = interval(value.mean(1) - values["importance"].mean(1))
    for score, shares in lost.items():
        rows[score]["coefficient lost, first 10"] = float(torch.tensor(shares).mean())
    return {"head": head, "sums": len(asked), "answer changes": moved, "rows": rows}


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model, started = load("town"), time.perf_counter()
    asked = sums(model, SUMS)
    figures: dict[str, Any] = {"sums": len(asked), "layers": list(DEEP), "sizes": list(SIZES)}
    for what, layers in (("of all heads", tuple(range(model.n_layers))), ("of the deeper half", DEEP)):
        sites, drops = sweep(model, asked, layers)
        order = drops.mean(0).argsort(descending=True)[:5].tolist()
        figures[f"heads {what}"] = {sites[i]: float(drops[:, i].mean()) for i in order}
        print(what, figures[f"heads {what}"])
        found = curves(model, asked, sites[order[0]])
        figures[f"without the costliest {what}"] = found
        print(f"without {found['head']}: {found['answer changes']} of {found['sums']} answers change")
        for name, row in found.get("rows", {}).items():
            print(f"  {name:12} mask {row['mask area']:.3f} {[round(x, 2) for x in row['mask'].values()]}", end="")
            print(f"  keep {row['keep area']:.3f} {[round(x, 2) for x in row['keep'].values()]}", end="")
            print(f"  coefficient lost {row.get('coefficient lost, first 10', float('nan')):.2f}")
    note = "areas: mean accuracy over the sizes, over the sums whose answer changes; mask: less is better, keep: more"
    path = keep("compare_neurons", figures, note)
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
