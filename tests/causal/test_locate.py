"""What locating methods name, does it: taking it away costs more than taking away random others."""

import pytest

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
