"""Edge attribution against the passes that it makes: GPT-2 small's shape, batch 8, T = 16, one thread."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleaved, keep, medians, ratio
from cutaway.models.handle import Model
from cutaway.ops.circuit_runs import CircuitRuns
from cutaway.ops.edge_scores import edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import Pairs
from cutaway.ops.wiring import Wiring

BATCH, LENGTH, STEPS, CIRCUITS = 8, 16, 5, 4
BAR = 1.6


def gpt2() -> Model:
    """GPT-2 small's shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return Model(GPT2LMHeadModel(GPT2Config()).eval(), name="gpt2-small")


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


def main(runs: int = 5) -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model = gpt2()
    draw = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(1000, 30000, (BATCH, LENGTH), generator=draw) for _ in range(2))
    pairs = Pairs.of(model.inputs(clean), model.inputs(corrupt), model.metric("logit_diff: #11, #22"))
    wiring = Wiring.of_model(model, pairs.clean)
    fronts = read_fronts(model, pairs.clean, wiring)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passes(model, clean, corrupt, 0)
    plain = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edge_scores(model, pairs, wiring, fronts, path_points(STEPS))
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    circuits = CircuitRuns(model, pairs, wiring, fronts)
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
    )
    figures = {
        "edges": len(wiring),
        "EAP-IG over its passes": ratio(seconds, "edges", "passes"),
        "EAP-IG over its passes with all logits": ratio(seconds, "edges", "passes, all logits"),
        "bar": BAR,
        "a circuit over a forward": ratio(seconds, "circuits", "forward") / CIRCUITS,
        "seconds": medians(seconds),
        "peak_mib_of_the_passes": (plain - before) / 1024,
        "peak_mib_of_the_scores_over_that": (ours - plain) / 1024,
        "mib_of_edges_times_batch_times_positions": len(wiring) * BATCH * LENGTH * 4 / 2**20,
    }
    note = f"GPT-2 small's shape, random weights, batch {BATCH}, T = {LENGTH}, {STEPS} steps; one thread"
    path = keep("circuits", figures, note)
    for name, value in figures.items():
        print(name, value)
    print(path.name)


if __name__ == "__main__":
    main()
