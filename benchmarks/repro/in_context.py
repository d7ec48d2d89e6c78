"""In-context heads and the biases of labels, on the towers wired by hand and on the trained *labels*.

After Yu and Ananiadou (2024), "How do large language models learn in-context? Query and key matrices of in-context
heads are two towers for metric learning": finding, evidence, majority and recency with their mitigations.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep
from cutaway import specimens
from cutaway.data import Labels
from cutaway.methods.locate.in_context_heads import in_context_heads
from cutaway.methods.prove.in_context_bias import in_context_bias
from cutaway.models.load import load
from recipes import two_towers as towers

PROMPTS, SHOTS = 40, 4


def wired(name: str) -> dict[str, Any]:
    """Heads on the card's prompts, biases where all examples are of the asked kind."""
    model, labels = load(name), list(towers.LABELS)
    heads = in_context_heads(model, [e["prompt"] for e in specimens.card(name).examples], labels)
    counts = ((3, 1), (1, 4), (3, 2), (2, 2), (3, 3))
    alike = [towers.prompt(towers.demonstrations(f, b, same_cluster=True), "fox") for f, b in counts]
    return {"heads": rows(heads), "bias": rows(in_context_bias(model, alike, labels, ranking=heads))}


def trained() -> dict[str, Any]:
    """Heads and biases over prompts of four examples."""
    model = load("labels")
    shown = Labels().examples(PROMPTS, shots=SHOTS)
    named = sorted({word for e in shown for word in e.prompt.split()[1::3]})
    given: dict[str, Any] = {"labels": named, "gold": [e.answer.strip() for e in shown]}
    heads = in_context_heads(model, [e.prompt for e in shown], **given)
    bias = in_context_bias(model, [e.prompt for e in shown], ranking=heads, **given)
    proof = heads.proof
    left = (
        {"drop": float(proof.effect[-1]), "random": proof.random[:, -1].tolist(), "k": proof.ks[-1]} if proof else None
    )
    return {"prompts": len(shown), "heads": rows(heads), "proof": left, "bias": rows(bias)}


def rows(result: Any) -> list[dict[str, Any]]:
    """A table's rows as plain values, None for none; heads that were not found are left out."""
    found = [row for row in result.table().to_dict("records") if row.get("kind", "?")]
    return [{key: None if value != value else value for key, value in row.items()} for row in found]


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    figures = {name: wired(name) for name in ("two-towers", "two-towers-recency")} | {"labels": trained()}
    for name, found in figures.items():
        print(name, [(row["item"], row["kind"], round(row["score"], 3)) for row in found["heads"]], found.get("proof"))
        for row in found["bias"]:
            numbers = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
            print(f"  {row['experiment']:9} {row['mitigation']:32} {numbers}")
    path = keep("in_context", figures, "lean in nats; attention slope in nats per position")
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
