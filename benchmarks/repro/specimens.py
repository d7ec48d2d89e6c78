"""Specimens made a second time, against those that are shipped: do the recipes give the same accuracies?

    git clone . again && make -C again specimens
    python benchmarks/repro/specimens.py again/src/cutaway/specimens

Weights differ from machine to machine; accuracies should not by more than two points. Those that do are named.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep
from cutaway.specimens import registry

POINTS = 0.02 + 1e-9


def compared(shipped: registry.Card, again: registry.Card) -> dict[str, Any]:
    """Every figure of the two cards, the largest difference, and which differ by more than two points."""
    both = {figure: [value, again.accuracies[figure]] for figure, value in shipped.accuracies.items()}
    differences = {figure: abs(a - b) for figure, (a, b) in both.items()}
    return {
        "shipped, again": both,
        "largest difference": max(differences.values()),
        "beyond two points": [figure for figure, d in differences.items() if d > POINTS],
        "same weights": shipped.sha256 == again.sha256,
        "minutes": round(again.training.get("seconds", 0) / 60, 1),
        "machine": again.training.get("machine", ""),
    }


def main(folder: Path) -> None:
    """Compares every specimen that is in ``folder``."""
    figures = {}
    for name in registry.names():
        row = figures[name] = compared(registry.card(name), registry.card(name, folder))
        beyond = ", ".join(row["beyond two points"]) or "none"
        print(f"{name:20s} {row['minutes']:5.1f} min  largest {row['largest difference']:.3f}  beyond: {beyond}")
    print(keep("specimens", figures, __doc__ or ""))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python benchmarks/repro/specimens.py FOLDER_OF_SPECIMENS_MADE_AGAIN")
    main(Path(sys.argv[1]))
