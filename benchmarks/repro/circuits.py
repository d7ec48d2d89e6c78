"""How many wired edges are among the strongest, by steps and norms; and what circuits of town keep, by how they grow
and by norms.

python -m benchmarks.repro.circuits
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cutaway
from benchmarks.harness import keep
from benchmarks.repro.edge_estimates import pairs_of
from cutaway import catalog, specimens

WIRED = {"circuit-induction": 1, "circuit-ioi": 4}  # every how many of the card's examples
STEPS = (1, 5, 10, 30)
RELATIONS = ("city", "employer", "sport", "colour")
FACT = {"clean": "Ada Reed lives in", "corrupt": "Ada Stone lives in", "metric": 'logprob: " Milby"'}


def wired(name: str, every: int) -> dict[str, Any]:
    """Share of the wired edges among as many of the strongest, means in place of what is taken away."""
    model, card = cutaway.load(name), specimens.card(name)
    true = {tuple(edge) for edge in card.truths["edges"]}
    given = {
        "clean": [each["prompt"] for each in card.examples[::every]],
        "answers": [model.token(each["answer"]) for each in card.examples[::every]],
    }
    found: dict[str, Any] = {"edges": len(true), "prompts": len(given["answers"])}
    for norms in ("moving", "frozen"):
        for steps in STEPS:
            graph: Any = catalog.get("edges").function(model, **given, norms=norms, steps=steps, verify=0, draws=0)
            ranked = graph.highlights()
            top = ranked.head(len(true))
            hits = sum(edge in true for edge in zip(top.source, top.target, top.into, strict=True))
            rest = float(ranked.weight.abs().iloc[len(true)] / ranked.weight.abs().iloc[len(true) - 1])
            found[f"{norms}, {steps} steps"] = {"precision": hits / len(true), "next_over_last": rest}
    return found


def by_norms(town: cutaway.Model, pairs: int = 8) -> dict[str, Any]:
    """CPR and CMD of circuits found with either kind of norms, for pairs of facts of each relation."""
    found: dict[str, Any] = {}
    for relation in RELATIONS:
        given = pairs_of(town, relation, pairs)
        for norms in ("moving", "frozen"):
            curves: Any = catalog.get("faithfulness").function(town, **given, norms=norms, minimality=0)
            areas = {name: round(float(curves.line_columns[name][0]), 4) for name in ("CPR", "CMD")}
            found[f"town, {relation}, {norms}"] = areas
    return found


def main() -> None:
    """Measure, print, keep."""
    figures: dict[str, Any] = {name: wired(name, every) for name, every in WIRED.items()}
    town = cutaway.load("town")
    for how in ("top", "greedy"):
        for steps in (1, 5, 30):
            curves: Any = catalog.run("faithfulness", town, **FACT, how=how, steps=steps, draws=10, minimality=0)
            kept = {name: values[:2] for name, values in curves.line_columns.items()}  # by circuits, by random edges
            areas = {name: [round(float(v), 4) for v in values] for name, values in kept.items()}
            figures[f"town, {how}, {steps} steps"] = {**areas, "kept": np.round(curves.y[0], 4).tolist()}
    figures |= by_norms(town)
    path = keep("circuit_truth", figures, f"means over prompts; town: {FACT}")
    for name, value in figures.items():
        print(name, value)
    print(path.name)


if __name__ == "__main__":
    main()
