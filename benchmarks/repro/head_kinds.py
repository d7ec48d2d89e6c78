"""Kinds of heads on the specimens whose heads are known: the best head of each kind, the next one, and the proof.

Circuits are asked on random tokens, or on their own sentences where random tokens do not wake them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleaved, keep, ratio
from cutaway import specimens
from cutaway.methods.locate.head_kinds import KINDS, head_kinds
from cutaway.models.load import load

ASKED: dict[str, dict[str, Any]] = {
    "circuit-induction": {},
    "circuit-ioi": {"labels": ["Ada", "Bea", "Cal", "Dot", "Eli", "Fay"], "prove": "copying"},
    "two-towers": {"labels": ["foo", "bar"], "prove": "in-context"},
    "recall-2": {},
    "labels": {},
    "town": {},
}


def table(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The two best heads of each kind with their scores, and the proof's numbers."""
    texts = [e["prompt"] for e in specimens.card(name).examples] if "labels" in given else None
    found = head_kinds(load(name), prompts=texts, **given)
    rows: dict[str, Any] = {}
    for kind, scores in zip(KINDS, found.values, strict=True):
        order = np.argsort(np.where(np.isnan(scores), -np.inf, scores), axis=None)[::-1][:2]
        places = [tuple(map(int, np.unravel_index(i, scores.shape))) for i in order]
        rows[kind] = [[f"L{i}.attn.z[{h}]", float(scores[i, h])] for i, h in places if not np.isnan(scores[i, h])]
    proof = found.proof
    rows["proof"] = (
        None
        if proof is None
        else {
            "of": given.get("prove", "induction"),
            "k": proof.ks[-1],
            "drop": float(proof.effect[-1]),
            "random": proof.random[:, -1].tolist(),
            "holds": proof.holds,
        }
    )
    return rows


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {name: table(name, given) for name, given in ASKED.items()}
    for name, rows in figures.items():
        print(name)
        for kind, row in rows.items():
            print(f"  {kind:16} {row}")
    model = load("town")
    batch = torch.randint(20, 1000, (8, 51), generator=torch.Generator().manual_seed(0))
    seconds = interleaved(
        {
            "forward": lambda: model(batch),
            "without a proof": lambda: head_kinds(model, draws=0),
            "with a proof": lambda: head_kinds(model, prove="previous token"),
        }
    )
    figures["cost on town, in forward passes of its 8 random texts"] = {
        name: ratio(seconds, name, "forward") for name in ("without a proof", "with a proof")
    }
    print(figures["cost on town, in forward passes of its 8 random texts"])
    keep("head_kinds", figures, "the best two heads of each kind; drop: mean nats per token without the named heads")


if __name__ == "__main__":
    main()
