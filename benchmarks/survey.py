"""What holds of every architecture of the installed transformers: figures for docs/support.md."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import keep
from cutaway.models.support import counts, survey


def main() -> None:
    """Survey, print the counts, keep the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # strangers' models warn about their own insides
    started = time.perf_counter()
    found = survey()
    figures = {"counts": counts(found), "classes": [support.as_json() for support in found]}
    path = keep("architectures", figures, "cutaway doctor --architectures, on tiny models with random weights")
    print(figures["counts"], f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
