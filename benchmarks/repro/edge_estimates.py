"""How near the estimates of edges come to their exact effects: on facts of town, and where all changes at once.

python -m benchmarks.repro.edge_estimates
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cutaway
from benchmarks.harness import keep
from cutaway import catalog, specimens
from cutaway.data.town import Town
from cutaway.ops.stats import rank_correlation

FACT = {
    "clean": ["Lena Sharp lives in"],
    "corrupt": ["Cora Finch lives in"],
    "metric": 'logit_diff: " Alder", " Easton"',
}
NAMES = {
    "clean": ["When Ada and Bea went home , Bea gave a drink to"],
    "metric": 'logit_diff: " Ada", " Bea"',
    "norms": "frozen",
}
OTHERS = ["When Cal and Dot went home , Dot gave a drink to"]
STEPS = (1, 5, 30)
LIST = 10  # edges that a reader looks at first


def agreement(model: Any, given: dict[str, Any], steps: int) -> dict[str, float]:
    """Rank correlation of estimates with exact effects over all edges that have either, and over the strongest."""
    graph: Any = catalog.run("edges", model, **given, steps=steps, verify=10**9)
    weight, exact = (np.asarray(x) for x in (graph.weight, graph.edge_columns["exact"]))
    first = np.argsort(-np.abs(weight), kind="stable")[:LIST]
    size = float(np.abs(exact).max())
    return {
        "edges": len(weight),
        "all": _rounded(weight, exact),
        f"strongest {LIST}": _rounded(weight[first], exact[first]),
        "missed": float(np.abs(exact[np.abs(weight) < size / 100]).max() / size),  # the largest that is told to be none
    }


def _rounded(a: np.ndarray, b: np.ndarray) -> float:
    return round(rank_correlation(torch.tensor(a), torch.tensor(b)), 3)


def pairs_of(town: Any, relation: str = "city", count: int = 8) -> dict[str, Any]:
    """Pairs of facts about people; where they live, or another relation."""
    chosen = Town().pairs(relation, count=count)
    return {
        "clean": [pair.clean.prompt for pair in chosen],
        "corrupt": [pair.corrupt.prompt for pair in chosen],
        "answers": [town.token(pair.clean.answer) for pair in chosen],
        "rivals": [town.token(pair.corrupt.answer) for pair in chosen],
    }


def main() -> None:
    """Measure, print, keep."""
    town, wired = cutaway.load("town"), cutaway.load("circuit-ioi")
    card = specimens.card("circuit-ioi")
    means = {
        "clean": [each["prompt"] for each in card.examples],
        "answers": [wired.token(each["answer"]) for each in card.examples],
        "norms": "frozen",
    }
    examples: dict[str, tuple[Any, dict[str, Any]]] = {
        "town, one pair": (town, FACT),
        "town, 8 pairs": (town, pairs_of(town)),
        "circuit-ioi, all names change": (wired, {**NAMES, "corrupt": OTHERS}),
        "circuit-ioi, means": (wired, means),
    }
    figures = {
        name: {f"{steps} steps": agreement(model, given, steps) for steps in STEPS}
        for name, (model, given) in examples.items()
    }
    path = keep("edge_estimates", figures, f"Spearman of estimate and exact effect; {FACT}; {NAMES}, corrupt {OTHERS}")
    for name, value in figures.items():
        print(name, value)
    print(path.name)


if __name__ == "__main__":
    main()
