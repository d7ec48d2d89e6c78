"""What locating methods name, does it: taking it away costs more than taking away random others."""

import pytest
import torch

from benchmarks.repro import neuron_attribution as protocol
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.models.load import load

QUESTIONS = ("Ada Reed lives in", "Ada Stone works at", "Abel Nash plays")


@pytest.mark.parametrize("level", ["layer", "head", "neuron", "attention-neuron"])
def test_neuron_attribution_on_town(level):
    model = load("town")
    held = [neuron_attribution(model, question, level=level, k=10).proof for question in QUESTIONS]
    for proof in held:
        assert proof.effect[-1] > proof.random[:, -1].mean(), str(proof)
    if level != "layer":
        assert sum(proof.holds for proof in held) >= 2, "\n".join(map(str, held))


@torch.no_grad()
def test_zeroing_by_this_score_costs_more_than_by_others():
    """A small run of benchmarks/repro/neuron_attribution.py; log p of the neuron alone is as good on this model."""
    model = load("town")
    rows = protocol.table(protocol.left(model, protocol.questions(model, count=24)), 24)
    left = {name: row["probability"] for name, row in rows.items()}
    ours = left.pop(protocol.OURS)
    for name in [name for name in left if name[:2] in ("c ", "d ", "e ", "f ", "g ", "h ")]:
        assert ours < left[name] - 0.1, name
    assert ours == pytest.approx(left["b log p(w) of the neuron alone"], abs=0.1)
    assert left["random"] > 0.99
