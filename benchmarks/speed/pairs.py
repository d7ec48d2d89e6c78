"""Sweeps over several pairs of prompts in one call, against one call per pair, at GPT-2 small's shape, one thread.

Process seconds, as ratios within a round. "estimates" are those of all heads in 5 steps, without verification or proof:
pairs of one length are rows of a batch. "patch" and "paths" (from all heads to the queries of one) take the pairs one
after the other. "largest_difference" is between the means of the single calls and the one call.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import gpt2_small, interleaved, keep, medians, ratio
from cutaway import catalog
from cutaway.models.handle import Model

HEADS = {"kind": "attn.z", "by": "head"}
SWEEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "estimates": ("attribution_patching", {**HEADS, "steps": 5, "verify": 0, "draws": 0}),
    "patch": ("patch", HEADS),
    "paths": ("path_patching", {"receivers": "L9.attn.q[6]", "draws": 0}),
}


def measured(model: Model, sweep: str, pairs: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of both ways, and how far their means are apart."""
    method, params = SWEEPS[sweep]
    draw = torch.Generator().manual_seed(length)
    clean, corrupt = torch.randint(1000, 30000, (2, pairs, length), generator=draw)
    found: dict[str, Any] = {}

    def run(clean: torch.Tensor, corrupt: torch.Tensor) -> np.ndarray:
        given = {"clean": clean, "corrupt": corrupt, "metric": "logit_diff: #11, #22", "normalise": False}
        result: Any = catalog.run(method, model, **given, **params)
        values: np.ndarray = result.values
        return values

    def together() -> None:
        found["together"] = run(clean, corrupt)

    def alone() -> None:
        found["alone"] = np.mean([run(a[None], b[None]) for a, b in zip(clean, corrupt, strict=True)], axis=0)

    seconds = interleaved({"together": together, "alone": alone}, rounds, clock=time.process_time)
    return {
        "pairs": pairs,
        "tokens": length,
        "rounds": rounds,
        "median_process_seconds": medians(seconds),
        "times_faster": ratio(seconds, "alone", "together"),
        "largest_difference": float(np.nanmax(np.abs(found["together"] - found["alone"]))),
        "largest_value": float(np.nanmax(np.abs(found["alone"]))),
    }


def main() -> None:
    """Measure all sweeps and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(gpt2_small())
    figures = {f"{sweep} T=16": measured(model, sweep, options.pairs, 16, options.rounds) for sweep in SWEEPS}
    print(keep("pairs", figures, __doc__ or ""), figures)


if __name__ == "__main__":
    main()
