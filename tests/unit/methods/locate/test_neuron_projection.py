"""What planted neurons write is known, and the sign of a coefficient turns the list around."""

import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import ParameterError
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.methods.locate.neuron_projection import neuron_projection
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny

IDS = [5, 9, 6, 7, 8]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_the_planted_neuron_writes_its_answer(family):
    model = load(f"planted-{family}")
    for truth in specimens.card(f"planted-{family}").truths["prompts"]:
        found = neuron_projection(model, truth["prompt"], sites=truth["value_neuron"], k=1)
        assert found.columns["raises"][0].startswith(truth["answer"])
        assert found.columns["target place"][0] == 0
        assert found.columns["coefficient"][0] == pytest.approx(truth["value_neuron_coefficient"], abs=1e-5)
        assert found.check.holds


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_changes_are_those_of_the_logits_under_the_frozen_scale(name):
    """Signs included: the list of a neuron with a negative coefficient is its column's, upside down."""
    model = Model(tiny(name).hf)
    found = neuron_projection(model, IDS, sites="L1.mlp.act[0-20]", target=11, k=1, most=21)
    trace = model.trace([IDS], want="L2.resid_post, L1.mlp.act")
    x = trace["L2.resid_post"][0, -1]
    columns = model.weight("L1.mlp.act")
    gain = (model.hf.transformer.ln_f if name.startswith("GPT2") else model.hf.model.norm).weight
    for i in range(21):
        v = trace["L1.mlp.act"][0, -1, i] * columns[i]
        if name.startswith("GPT2"):
            v, s = v - v.mean(), (x.var(correction=0) + 1e-5).sqrt()
        else:
            s = (x.square().mean() + 1e-6).sqrt()
        change = (v * gain / s) @ model.hf.lm_head.weight.T
        assert found.columns["target change"][i] == pytest.approx(float(change[11]), abs=1e-4)
        assert found.columns["raises"][i].startswith(f"#{int(change.argmax())} ")
        assert found.columns["lowers"][i].startswith(f"#{int(change.argmin())} ")
    signs = torch.tensor(found.columns["coefficient"]).sign()
    assert {-1.0, 1.0} <= set(signs.tolist())


@pytest.mark.parametrize("level", ["head", "head-position", "neuron", "attention-neuron"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Gemma2ForCausalLM"])
def test_any_ranking_of_heads_or_neurons_is_read(name, level):
    model = Model(tiny(name).hf)
    ranking = neuron_attribution(model, IDS, level=level, k=6, draws=0)
    found = neuron_projection(model, IDS, ranking=ranking)
    assert tuple(found.columns["component"]) == tuple(ranking.items)
    assert found.check.holds
    assert found.spec()["layer"]


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="neither"):
        neuron_projection(model, IDS)
    with pytest.raises(ParameterError, match="one call"):
        neuron_projection(model, IDS, sites="L1.mlp.act[0], L1.attn.z[0]")
    with pytest.raises(ParameterError, match="whole sublayers"):
        neuron_projection(model, IDS, sites="L1.mlp.out")
