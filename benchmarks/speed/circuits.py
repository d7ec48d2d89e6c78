"""Edge attribution against the passes that it makes: GPT-2 small's shape, batch 8, T = 16, one thread.

Memory is measured at a shape where one number per edge, row and position would be half a GiB: as many layers and heads,
a narrower stream, batch 32, T = 128. Each candidate runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS, gpt2_small, interleaved, keep, medians, peak_mib, ratio
from cutaway.models.handle import Model
from cutaway.ops.circuit_runs import CircuitRuns
from cutaway.ops.edge_scores import BUDGET, edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import Pairs
from cutaway.ops.wiring import Wiring

BATCH, LENGTH, STEPS, CIRCUITS = 8, 16, 5, 4
BAR = 1.6
WIDE, LONG, NARROW, WORDS = 32, 128, 192, 1000
"""Rows, positions, width of the stream and vocabulary where memory is measured."""
TIGHT = 2**26
"""Bytes: a smaller budget than the default."""


def gpt2(**sizes: int) -> Model:
    """GPT-2 small's shape, or with other sizes, with random weights."""
    return Model(gpt2_small(**sizes), name="gpt2-small")


def pairs_of(model: Model, rows: int, length: int, words: range) -> Pairs:
    """Pairs of random tokens."""
    draw = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(words.start, words.stop, (rows, length), generator=draw) for _ in range(2))
    return Pairs.of(model.inputs(clean), model.inputs(corrupt), model.metric("logit_diff: #11, #22"))


def passes(model: Model, clean: torch.Tensor, corrupt: torch.Tensor, unembedded: int) -> None:
    """What no method can do without: two forward passes, and a forward and a backward one for each step.

    The gradient is that at the embedding, so weights get none; ``unembedded`` positions get logits, 0 all.
    """
    embed = model.hf.get_input_embeddings()
    common: dict[str, Any] = {"use_cache": False, "logits_to_keep": unembedded}
    with torch.no_grad():
        a, b = embed(clean), embed(corrupt)
        model.hf(inputs_embeds=b, **common)
        model.hf(inputs_embeds=a, **common)
    for point in path_points(STEPS):
        x = (b + point * (a - b)).requires_grad_()
        logits = model.hf(inputs_embeds=x, **common).logits[:, -1]
        torch.autograd.grad((logits[:, 11] - logits[:, 22]).sum(), x)


def speed(runs: int) -> dict[str, Any]:
    """Seconds of edges and circuits, as multiples of bare passes."""
    model = gpt2()
    pairs = pairs_of(model, BATCH, LENGTH, range(1000, 30000))
    clean, corrupt = pairs.clean.ids, pairs.corrupt.ids
    wiring = Wiring.of_model(model, pairs.clean)
    fronts = read_fronts(model, pairs.clean, wiring)
    circuits = CircuitRuns(model, pairs, wiring, fronts)
    draw = torch.Generator().manual_seed(0)
    sets = torch.rand(CIRCUITS, *wiring.real.shape, generator=draw) < 0.5
    seconds = interleaved(
        {
            "passes": lambda: passes(model, clean, corrupt, 1),
            "passes, all logits": lambda: passes(model, clean, corrupt, 0),
            "edges": lambda: edge_scores(model, pairs, wiring, fronts, path_points(STEPS)),
            "forward": lambda: model(pairs.clean),
            "circuits": lambda: circuits(sets),
        },
        runs=runs,
        clock=time.process_time,
    )
    return {
        "edges": len(wiring),
        "EAP-IG over its passes": ratio(seconds, "edges", "passes"),
        "EAP-IG over its passes with all logits": ratio(seconds, "edges", "passes, all logits"),
        "bar": BAR,
        "a circuit over a forward": ratio(seconds, "circuits", "forward") / CIRCUITS,
        "seconds": medians(seconds),
    }


def memory() -> dict[str, Any]:
    """MiB that edges take, and their passes alone, where one number per edge, row and position would take very much."""
    model = gpt2(n_embd=NARROW, vocab_size=WORDS, bos_token_id=0, eos_token_id=0)
    pairs = pairs_of(model, WIDE, LONG, range(WORDS))
    wiring = Wiring.of_model(model, pairs.clean)
    fronts = read_fronts(model, pairs.clean, wiring)

    def taken(budget: int) -> float:
        return peak_mib(lambda: edge_scores(model, pairs, wiring, fronts, path_points(1), budget))

    per_row = 4 * len(wiring.senders) * LONG * NARROW
    return {
        "shape": f"{len(wiring)} edges, batch {WIDE}, T = {LONG}, d_model {NARROW}",
        "edges times batch times positions": len(wiring) * WIDE * LONG * 4 / 2**20,
        "passes over all rows at once": peak_mib(lambda: passes(model, pairs.clean.ids, pairs.corrupt.ids, 1)),
        "scores": taken(BUDGET),
        "scores with all rows at once": taken(per_row * WIDE),
        f"scores with a budget of {TIGHT >> 20} MiB": taken(TIGHT),
    }


def main() -> None:
    """Measure what is asked for and keep it, next to what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "memory"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = RESULTS / "circuits.json"
    figures = json.loads(before.read_text())["figures"] if options.only and before.is_file() else {}
    if options.only != "memory":
        figures.update(speed(options.runs))
    if options.only != "speed":
        figures["peak MiB"] = memory()
    for name, value in figures.items():
        print(name, value)
    note = f"GPT-2 small's shape, random weights, batch {BATCH}, T = {LENGTH}, {STEPS} steps; one thread"
    print(keep("circuits", figures, note).name)


if __name__ == "__main__":
    main()
