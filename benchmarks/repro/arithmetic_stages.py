"""Stages 3 and 4 of comparative neuron analysis on the sums of *town*: behind the head, and before any case is seen.

After Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative neuron
analysis". Stage 3: per sum, the neuron of the last layer that loses most without that layer's costliest head; which
shallow neurons had written what the head brought to it, whether a digit is among the first five tokens that these
raise by themselves and behind the head, and what the activation loses without the first. Stage 4: neurons of the
shallower half that raise digits behind an attention layer or a head, zeroed, against random ones.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep
from benchmarks.repro.compare_neurons import sums
from cutaway.core.inputs import Inputs
from cutaway.methods.locate.compare_neurons import compare_neurons
from cutaway.methods.locate.neuron_sources import neuron_sources
from cutaway.methods.locate.transformed_neurons import transformed_neurons
from cutaway.models.handle import Model
from cutaway.models.load import load

SUMS, SOURCES, ZEROED = 40, 16, 100
HEAD, LAYER = "L3.attn.z[1]", "3"
DIGITS = [str(n) for n in range(10)]


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def readable(texts: Any) -> float:
    """The share of token lists that hold a digit."""
    return mean([float(any(token in DIGITS for token in text.split())) for text in texts])


def behind_the_head(model: Model, asked: list[tuple[Inputs, int]]) -> dict[str, Any]:
    """Stage 3, averaged over sums."""
    rows: dict[str, list[float]] = {}
    for inputs, _ in asked:
        root = compare_neurons(model, inputs, do=f"zero {HEAD}", layers=LAYER, score="lost", k=1, draws=0).items[0]
        found = neuron_sources(model, inputs, neuron=root, head=HEAD, k=10)
        row = {
            "head's share of the activation": float(found.columns["share"][0] / found.columns["of the head"][0]),
            "first ten, of the head": float(found.columns["of the head"].sum()),
            "first is at a digit": float(found.columns["token"][0].strip() in DIGITS),
            "digit by themselves": readable(found.columns["raises"]),
            "digit behind the head": readable(found.columns["behind the head"]),
            "error of the sum": found.check.value,
        }
        if found.proof is not None:
            row |= {
                "lost": float(found.proof.effect[-1]),
                "lost, random": float(found.proof.random[:, -1].mean()),
                "proof holds": float(found.proof.holds),
            }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {name: mean(values) for name, values in rows.items()} | {"largest error": max(rows["error of the sum"])}


def by_digits(model: Model, asked: list[tuple[Inputs, int]]) -> dict[str, Any]:
    """Stage 4: log p lost by sizes, through whole layers and through single heads."""
    prompts = [inputs.ids[0].tolist() for inputs, _ in asked]
    figures: dict[str, Any] = {}
    for through in ("L1.attn.out, L2.attn.out", "L1.attn.z, L2.attn.z"):
        for top in (10, 50):
            started = time.perf_counter()
            found = transformed_neurons(model, prompts, words=DIGITS, through=through, top=top, k=ZEROED)
            proof = found.proof
            row = {"named": len(found), "most digits": float(found.scores.max()), "notes": found.notes[0]}
            if proof is not None:
                row |= {
                    "zeroed": list(proof.ks),
                    "lost": proof.effect.tolist(),
                    "lost, random": proof.random.mean(0).tolist(),
                    "lost, random, largest": proof.random.max(0).tolist(),
                    "proof holds": proof.holds,
                }
            figures[f"through {through}, first {top}"] = row | {"seconds": time.perf_counter() - started}
            print(through, top, row)
    return figures


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model = load("town")
    asked = sums(model, SUMS)
    sources = behind_the_head(model, asked[:SOURCES])
    print(sources)
    figures = {
        "sums": len(asked),
        "stage 3": {"head": HEAD, "sums": SOURCES, **sources},
        "stage 4": by_digits(model, asked),
    }
    keep("arithmetic_stages", figures, "specimen town; lost: share of the activation (stage 3), nats (stage 4)")


if __name__ == "__main__":
    main()
