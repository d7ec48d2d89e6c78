"""Query neurons of *town*: what zeroing them leaves of the answer, and how well shares foretell removal.

Two tables. The first zeroes, for each prompt, the best 30 FFN neurons by several rankings. The second takes each part
(the embedding, every earlier attention and MLP output) out of the state that an FFN value neuron reads, and compares
what its coefficient loses with shares by four choices of key: the row of the up matrix, of the gate, both, and the
neuron's own value column.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep
from benchmarks.repro.neuron_attribution import questions
from cutaway.core.inputs import Inputs
from cutaway.methods.locate.query_neurons import query_neurons
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import Draws
from cutaway.ops.parts import take_apart
from cutaway.ops.readers import Keys, mlp_readers
from cutaway.ops.stats import rank_correlation
from cutaway.ops.subkeys import find_values
from cutaway.ops.units import Unit

PROMPTS, K, DRAWS, TRIED = 60, 30, 5, 300
VALUES = 10  # FFN value neurons per prompt in the second table


def rankings(model: Model, inputs: Inputs, token: int) -> dict[str, list[Unit]]:
    """The best K query FFN neurons by each ranking."""
    given: dict[str, Any] = {"target": token, "draws": 0}
    attention = query_neurons(model, inputs, values="attention", k=TRIED, verify=TRIED, **given)
    by_removal = attention.columns["removal"].argsort()[::-1][:K]
    both = query_neurons(model, inputs, k=K, verify=0, **given)
    loudest = take_apart(model, inputs, [*range(inputs.ids.shape[1])], "neuron").groups[:-1]
    size = torch.cat([(g.coef[:, 0].float().abs() * g.rows.float().norm(dim=-1)).amax(0) for g in loudest])
    n = len(loudest[0])
    return {
        "score, attention value neurons": [Unit.parse(item) for item in attention.items[:K]],
        "score, attention and FFN value neurons": [Unit.parse(item) for item in both.items],
        "removal, attention value neurons": [Unit.parse(attention.items[i]) for i in by_removal],
        "size of what they write at any position": [loudest[i // n].unit(i % n) for i in size.topk(K).indices.tolist()],
    }


def zeroed(model: Model, asked: list[tuple[Inputs, int]]) -> dict[str, dict[str, float]]:
    """Mean log-probability and probability of the answers after zeroing, per ranking."""
    left: dict[str, list[Tensor]] = {}
    for i, (inputs, token) in enumerate(asked):
        named = rankings(model, inputs, token)
        draws = Draws(model, next(iter(named.values())), inputs.ids.shape[1], i)
        sets = {"no intervention": [], **named} | {f"random {n}": draws.draw(K) for n in range(DRAWS)}
        found = Ablation(model, inputs, [token])(list(sets.values()))
        rows = dict(zip(sets, torch.stack([found.logp, found.prob], dim=-1).double(), strict=True))
        rows["random"] = torch.stack([rows.pop(f"random {n}") for n in range(DRAWS)]).mean(0)
        for name, row in rows.items():
            left.setdefault(name, []).append(row)
    return {
        name: dict(zip(("log-probability", "probability"), torch.stack(rows).mean(0).tolist(), strict=True))
        for name, rows in left.items()
    }


def foretold(model: Model, asked: list[tuple[Inputs, int]]) -> dict[str, float]:
    """Mean rank correlation, over FFN value neurons, of shares by each key with what removal takes."""
    found: dict[str, list[float]] = {}
    for inputs, token in asked:
        neurons = find_values(model, inputs, token, None, VALUES, ["mlp.act"])
        parts = take_apart(model, inputs, 1, "layer")
        for read in neurons.reads:
            i = read.layer
            trace = model.trace(inputs, want=[f"L{i}.{kind}@-1" for kind in ("resid_mid", "mlp.in", "mlp.act")])
            x, normed, act = (trace[f"L{i}.{kind}@-1"][0] for kind in ("resid_mid", "mlp.in", "mlp.act"))
            readers = mlp_readers(model, i, x, normed, act)
            earlier = [parts.layers[0].x]
            for j in range(i + 1):
                layer = parts.layers[j]
                earlier += [part for part in (layer.attn, layer.mlp if j < i else None) if part is not None]
            pieces = torch.cat(earlier)
            index = [neurons.units[n].number for n in read.members]
            keys: dict[str, Keys | Tensor] = {
                "both rows": readers.keys(index, 0).vectors,
                "up row": readers.up.keys(index, 0).vectors,
                "gate row": readers.gate.keys(index, 0).vectors if readers.gate is not None else torch.empty(0),
                "value column": model.weight(f"L{i}.mlp.act")[index],
            }
            gone = readers.again(read.state[None], index) - readers.again(read.state - pieces, index)
            for name, vectors in keys.items():
                shares = pieces @ torch.as_tensor(vectors).T
                shares = shares / shares.sum(0)
                of_whole = gone / readers.again(read.state[None], index)
                found.setdefault(name, []).extend(
                    rank_correlation(shares[:, n], of_whole[:, n]) for n in range(len(index)) if len(pieces) > 2
                )
    return {name: sum(some) / len(some) for name, some in found.items()} | {"value neurons": len(found["both rows"])}


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model, started = load("town"), time.perf_counter()
    asked = questions(model, count=PROMPTS)
    with torch.no_grad():
        rows, agreement = zeroed(model, asked), foretold(model, asked)
    figures = {"prompts": len(asked), "zeroed per prompt": K, "left": rows, "rank correlation with removal": agreement}
    for name, row in rows.items():
        print(f"{name:42}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    for name, value in agreement.items():
        print(f"{name:42} {value:.3g}")
    path = keep("query_neurons", figures, "specimen town; facts that it knows; random: mean of 5 draws per prompt")
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
