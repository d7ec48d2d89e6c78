"""A whole text explanation with its proof, against a bare forward pass of GPT-2 small's shape, one thread."""

from __future__ import annotations

import gc
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import bare_pass, gpt2_small, interleaved, keep, medians, ratio
from cutaway.explain import explain
from cutaway.models.handle import Model

RUNS = {16: 5, 64: 3}  # by length of the prompt
BARS = {"explanation": 60.0, "peak MiB": 300.0}
WHOLE: Any = explain.method.function  # type: ignore[attr-defined]


def measured(model: Model, length: int, runs: int) -> dict[str, Any]:
    """The explanation's time against a bare forward pass, and what it held."""
    ids = torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(length))
    inputs = model.inputs(ids)
    told: list[Any] = []

    def explanation() -> None:
        told[:] = [WHOLE(model, inputs)]

    seconds = interleaved(
        {"bare": bare_pass(model.hf, inputs), "explanation": explanation}, runs=runs, clock=time.process_time
    )
    return {
        "explanation": ratio(seconds, "explanation", "bare"),
        "seconds": medians(seconds),
        "parts": sorted(told[0].parts),
        "proofs": sorted(told[0].proofs),
        "refused": told[0].refused,
    }


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model = Model(gpt2_small(), name="gpt2-small")
    model.anatomy()
    model(model.inputs(torch.arange(64)[None]))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures: dict[str, Any] = {f"T={length}": measured(model, length, runs) for length, runs in RUNS.items()}
    figures["peak_mib_over_a_forward"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    figures["bars"] = BARS
    path = keep(
        "explain",
        figures,
        "a whole text explanation, times a bare forward pass; k = 10, 5 draws; own processor seconds",
    )
    for length in RUNS:
        print(f"T={length}", f"{figures[f'T={length}']['explanation']:.1f} times a bare forward pass")
    print("peak over a forward, MiB:", round(figures["peak_mib_over_a_forward"], 1), path.name)


if __name__ == "__main__":
    main()
