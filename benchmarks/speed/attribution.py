"""Neuron attribution against a bare forward pass of GPT-2 small's shape, one thread."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import bare_pass, gpt2_small, interleaved, keep, medians, peak_mib, ratio
from cutaway.core.inputs import Inputs
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation
from cutaway.ops.importance import Goal
from cutaway.ops.parts import take_apart
from cutaway.ops.readout import Head
from cutaway.ops.units import Unit

LENGTHS = (16, 64)
LEVELS = {"neuron": 100, "attention-neuron": 100, "head": 30, "head-position": 30, "layer": 24}
BARS = {"neuron": 3.0, "attention-neuron": 10.0, "head": 2.0, "head-position": 2.0}
SETS = 30  # of neurons that are zeroed; one forward pass for each is what they are compared with
BRUTE_PART = 0.02  # of the neurons: brute force takes minutes, so this share of it is timed


def brute(model: Model, inputs: Inputs) -> None:
    """A share of what the published notebooks do: every neuron's vector through the whole vocabulary, one by one."""
    parts = take_apart(model, inputs, 1, "neuron")
    goal = Goal.of(Head(model).frozen(parts.final, parts.logits), [int(parts.logits[0].argmax())])
    for group in parts.groups:
        base = parts.layers[group.layer].before_mlp
        for i in range(int(len(group) * BRUTE_PART)):
            goal.of_state(base + group.vectors(torch.tensor([i]))[0])


def attribute(model: Model, inputs: Inputs, level: Any, draws: int = 0) -> Any:
    """The method itself, without what the catalog adds."""
    return neuron_attribution.method.function(model, inputs, level=level, k=LEVELS[level], draws=draws)  # type: ignore[attr-defined]


def measured(model: Model, length: int, runs: int) -> dict[str, Any]:
    """Ratios to a bare forward pass."""
    ids = torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(length))
    inputs = model.inputs(ids)
    candidates: dict[str, Any] = {"bare": bare_pass(model.hf, inputs)}
    for level in LEVELS:
        candidates[level] = lambda level=level: attribute(model, inputs, level)
    draw = torch.Generator().manual_seed(0)
    sets = [[_neuron(model, draw) for _ in range(k)] for k in (1, 3, 10, 30, 100) for _ in range(SETS // 5)]
    candidates[f"{SETS} sets of neurons zeroed"] = lambda: Ablation(model, inputs, [0])(sets)
    candidates["neuron with proof"] = lambda: attribute(model, inputs, "neuron", 5)
    seconds = interleaved(candidates, runs=runs, clock=time.process_time)
    figures: dict[str, Any] = {name: ratio(seconds, name, "bare") for name in candidates if name != "bare"}
    figures["bare_seconds"] = medians(seconds)["bare"]
    figures["evaluated"] = {
        level: attribute(model, inputs, level).notes[0]
        for level in ("neuron", "attention-neuron", "head", "head-position")
    }
    start = time.process_time()
    brute(model, inputs)
    figures["brute force (from a share)"] = (time.process_time() - start) / BRUTE_PART / figures["bare_seconds"]
    return figures


def _neuron(model: Model, draw: torch.Generator) -> Unit:
    layer = int(torch.randint(model.n_layers, (), generator=draw))
    return Unit("mlp.act", layer, int(torch.randint(model.layers[layer].d_mlp, (), generator=draw)))


def main(runs: int = 5) -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model = Model(gpt2_small(), name="gpt2-small")
    model.anatomy()
    figures: dict[str, Any] = {f"T={length}": measured(model, length, runs) for length in LENGTHS}
    longest = model.inputs(torch.arange(max(LENGTHS))[None])
    figures["peak_mib_over_the_model"] = {
        level: peak_mib(partial(attribute, model, longest, level)) for level in LEVELS
    }
    figures["peak_mib_over_the_model"]["neuron with proof"] = peak_mib(lambda: attribute(model, longest, "neuron", 5))
    figures["bars"] = BARS
    path = keep(
        "attribution",
        figures,
        "times a bare forward pass; k = " + str(LEVELS) + "; one thread, in its own processor seconds",
    )
    for length in LENGTHS:
        for name, value in figures[f"T={length}"].items():
            print(f"T={length}", name, value if isinstance(value, dict) else f"{value:.2f}")
    print("peak over the model, MiB:", figures["peak_mib_over_the_model"], path.name)


if __name__ == "__main__":
    main()
