"""Neuron chains on *town*: do the neurons that bring most to the next layer's activations take them along?

Between neighbouring layers, all FFN neurons; the ten of the lower layer that bring most are zeroed, and what all other
activations lose, as a share of their size, is compared with ten random neurons of that layer, five times.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep
from benchmarks.repro.compare_neurons import sums
from benchmarks.repro.neuron_attribution import questions
from cutaway.methods.locate.neuron_chain import neuron_chain
from cutaway.models.load import load

PROMPTS, K = 8, 10


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    model = load("town")
    asked = {"sums": sums(model, PROMPTS), "facts": questions(model, PROMPTS)}
    figures: dict[str, Any] = {"prompts of each": PROMPTS, "zeroed": K}
    for what, rows in asked.items():
        for low in range(model.n_layers - 1):
            sites = f"L{low}.mlp.act, L{low + 1}.mlp.act"
            proofs = [neuron_chain(model, inputs, sites=sites, most=10_000, k=K).proof for inputs, _ in rows]
            told = [proof for proof in proofs if proof is not None]
            row = {
                "lost": sum(float(proof.effect[-1]) for proof in told) / len(told),
                "lost, random": sum(float(proof.random[:, -1].mean()) for proof in told) / len(told),
                "proof holds": sum(proof.holds for proof in told) / len(told),
            }
            figures[f"{what}, layer {low} to {low + 1}"] = row
            print(what, low, row)
    keep(
        "neuron_chain",
        figures,
        "specimen town; lost: share of the size of all activations of both layers but those zeroed",
    )


if __name__ == "__main__":
    main()
