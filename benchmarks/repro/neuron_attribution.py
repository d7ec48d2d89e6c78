"""The comparison of scores of Yu and Ananiadou (2024), Table 2, on *town*: zero the ten best FFN neurons per prompt.

Eight scores rank the FFN neurons of each prompt; the top ten by each are set to zero, and the answer's reciprocal rank,
log-probability and probability are read again. The better the score, the less is left.
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
from cutaway.data import Example, Town
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import Draws
from cutaway.ops.importance import Baselines, Goal
from cutaway.ops.parts import Group, Parts, take_apart
from cutaway.ops.readout import Head
from cutaway.ops.units import Unit

PROMPTS, MORE, K, DRAWS = 200, 1000, 10, 5
OURS = "a log-probability increase"
MEASURES = ("mrr", "log-probability", "probability")


def questions(model: Model, count: int = PROMPTS, seed: int = 0) -> list[tuple[Inputs, int]]:
    """Trained facts and geography of the town with an answer of one token, that the model puts first."""
    world = Town()
    asked = [e for e in (*world.facts(), *world.geography()) if e.split == "train"]
    return _answered(model, asked, count, seed, 1)


def unsure(model: Model, count: int = PROMPTS, seed: int = 0) -> list[tuple[Inputs, int]]:
    """Two-hop questions that were held out, with the answer among the first ten: many are answered with some doubt."""
    asked = [e for e in Town().two_hop() if e.split == "held-out"]
    return _answered(model, asked, count, seed, 10)


def _answered(model: Model, asked: list[Example], count: int, seed: int, within: int) -> list[tuple[Inputs, int]]:
    Random(seed).shuffle(asked)
    found: list[tuple[Inputs, int]] = []
    for example in asked:
        inputs = model.inputs(example.prompt)
        ids = model.processor(example.answer, add_special_tokens=False)["input_ids"]
        logits = model(inputs)[0, -1]
        if len(ids) == 1 and int((logits > logits[ids[0]]).sum()) < within:
            found.append((inputs, ids[0]))
        if len(found) == count:
            break
    return found


def scores(group: Group, bases: Baselines, n: int, token: int) -> dict[str, Tensor]:
    """Every score of every neuron of one layer, [neuron]."""
    index = torch.arange(len(group))
    vectors = group.vectors(index)
    readout = bases.goal.readout
    alone = readout.project(vectors)[:, 0]
    own = alone[:, token]
    rank = (alone > own[:, None]).sum(-1).float() + 1
    coefficient = group.coef[0, 0].float()
    norm = group.rows.float().norm(dim=-1)
    before = bases.value[n]
    added = bases.added(torch.full((len(group),), n), vectors)
    return {
        "a log-probability increase": added,
        "b log p(w) of the neuron alone": own - alone.logsumexp(-1),
        "c probability increase": (before + added).exp() - before.exp(),
        "d norm of value": norm,
        "e coefficient": coefficient,
        "f rank of w in the projection": -rank,
        "g coefficient x norm": coefficient * norm,
        "h coefficient x 1/rank": coefficient / rank,
        "first-order bound of a": group.first_order(bases.gradient[n]),
    }


def best(parts: Parts, goal: Goal, token: int, k: int = K) -> dict[str, list[Unit]]:
    """The k best neurons of all layers by each score."""
    bases = Baselines(goal, torch.stack([parts.layers[g.layer].before_mlp for g in parts.groups]))
    found = [scores(group, bases, n, token) for n, group in enumerate(parts.groups)]
    named = {}
    for name in found[0]:
        top = torch.cat([each[name] for each in found]).topk(k).indices.tolist()
        size = len(parts.groups[0])
        named[name] = [parts.groups[i // size].unit(i % size) for i in top]
    return named


def left(model: Model, asked: list[tuple[Inputs, int]]) -> dict[str, Tensor]:
    """[prompt, measure] reciprocal rank, log-probability and probability of the answers after zeroing, per score."""
    head = Head(model)
    found: dict[str, list[Tensor]] = {}
    for i, (inputs, token) in enumerate(asked):
        parts = take_apart(model, inputs, 1, "neuron")
        named = best(parts, Goal.of(head.frozen(parts.final, parts.logits), [token]), token)
        draws = Draws(model, named[OURS], inputs.ids.shape[1], i)
        sets = {"no intervention": [], **named} | {f"random {n}": draws.draw(K) for n in range(DRAWS)}
        after = Ablation(model, inputs, [token])(list(sets.values()))
        rows = dict(
            zip(sets, torch.stack([1 / (after.rank + 1), after.logp, after.prob], dim=-1).double(), strict=True)
        )
        rows["random"] = torch.stack([rows.pop(f"random {n}") for n in range(DRAWS)]).mean(0)
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    return {name: torch.stack(rows) for name, rows in found.items()}


def table(values: dict[str, Tensor], count: int) -> dict[str, Any]:
    """Means over the first ``count`` prompts, per score.

    ``more than a`` is how much more of each measure is left than after zeroing by score a, with a 95 % interval (paired
    bootstrap over prompts).
    """
    return {
        name: dict(zip(MEASURES, rows[:count].mean(0).tolist(), strict=True))
        | {"more than a": {m: interval((rows - values[OURS])[:count, j]) for j, m in enumerate(MEASURES)}}
        for name, rows in values.items()
    }


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model, started = load("town"), time.perf_counter()
    figures: dict[str, Any] = {"zeroed per prompt": K}
    for what, asked in (("facts", questions(model, MORE)), ("held-out two-hop questions", unsure(model, MORE))):
        with torch.no_grad():
            values = left(model, asked)
        for count in sorted({min(PROMPTS, len(asked)), len(asked)}):
            rows = table(values, count)
            name = what if count == PROMPTS else f"{what}, {count}"
            figures[name] = {"prompts": count, "rows": rows}
            print(f"{what}: {count} prompts")
            for score, row in rows.items():
                more = "  ".join("{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["more than a"][m]) for m in MEASURES)
                print(f"{score:32} " + "  ".join(f"{m} {row[m]:.3f}" for m in MEASURES) + "  more than a: " + more)
    path = keep("neuron_attribution", figures, "specimen town; less left is better; random: mean of 5 draws per prompt")
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
