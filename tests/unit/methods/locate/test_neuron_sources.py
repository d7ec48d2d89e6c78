"""What a head brought to a neuron: planted cases in closed form, sums that must close, and refusals."""

import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.methods.locate.neuron_sources import neuron_sources
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from recipes.planted import Truth, moves

IDS = [5, 9, 6, 7, 8]
NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "Qwen2ForCausalLM",
    "FalconForCausalLM",
    "GPTNeoXForCausalLM",
    "MixtralForCausalLM",
)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_the_planted_query_neuron_comes_first_with_its_share_in_closed_form(family):
    model = load(f"planted-{family}")
    for case in specimens.card(f"planted-{family}").truths["prompts"]:
        subject, relation = case["prompt"].split()
        truth = Truth(family, subject, relation)
        fact = truth.attention * truth.source.at[f"fact:{subject}"] / truth.source.scale()
        moved = sum(truth.head_output.get(name, 0.0) for name in moves(subject)[1] if name.startswith("moved"))
        found = neuron_sources(model, case["prompt"], neuron=case["value_neuron"])
        assert case["head"] in found.title  # found by itself: the head that brings most
        assert found.items[0] == f"{case['query_neuron']}@{case['query_neuron_position']}"
        assert found.columns["of the head"][0] == pytest.approx(fact / moved, abs=1e-4)
        assert found.columns["attention"][0] == pytest.approx(case["head_attention"], abs=1e-5)
        # Behind a gate half of the coefficient is the reading that comes up, which no head brings.
        whole = 1.0 if family == "gpt2" else 2.0
        assert found.columns["share"][0] * whole == pytest.approx(found.columns["of the head"][0], rel=1e-3)
        # Only behind the head can it be read: as what is true of the subject.
        answers = {truth.answer, Truth(family, subject, "likes" if relation == "plays" else "plays").answer}
        assert found.columns["raises"][0] == ""
        assert set(found.columns["behind the head"][0].split()[:2]) == answers
        assert found.check.holds
        assert found.proof.holds, str(found.proof)


@pytest.mark.parametrize("level", ["layer", "head", "neuron"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_at_all_positions_sum_to_what_the_head_brought(name, level):
    kind = "expert.act[{}/3]" if name.startswith("Mixtral") else "mlp.act[3]"
    model = Model(tiny(name).hf)
    for expert in range(2):
        neuron = f"L2.{kind.format(expert)}"
        found = neuron_sources(model, IDS, neuron=neuron, head="L1.attn.z[1]", level=level, k=10**6, draws=0)
        assert found.check.holds, str(found.check)
        if level == "layer":
            brought = float(found.notes[0].partition(" brings ")[2].partition(" ")[0])
            constants = float(found.notes[1].rpartition("constants ")[2])
            assert found.scores.sum() + constants == pytest.approx(brought, rel=1e-2, abs=1e-5)


@torch.no_grad()
def test_a_score_is_the_definition_spelled_out():
    model = Model(tiny("LlamaForCausalLM").hf)
    found = neuron_sources(model, IDS, neuron="L2.mlp.act[3]", head="L1.attn.z[1]", k=10**6, draws=0)
    scores = dict(zip(found.items, found.scores.tolist(), strict=True))
    trace = model.trace([IDS], want="L1.resid_pre, L1.attn.pattern, L0.mlp.act, L2.resid_mid@-1, L2.mlp.act@-1")
    first, block = model.hf.model.layers[1], model.hf.model.layers[2]
    x, mid = trace["L1.resid_pre"][0, 2].double(), trace["L2.resid_mid@-1"][0, 0].double()
    part = (trace["L0.mlp.act"][0, 2, 7] * model.weight("L0.mlp.act")[7]).double()
    normed = first.input_layernorm.weight.double() * part / (x.square().mean() + 1e-6).sqrt()
    channels = first.self_attn.v_proj.weight.double()[:16] @ normed  # heads 0 and 1 share the first values
    written = first.self_attn.o_proj.weight.double()[:, 16:32] @ channels * trace["L1.attn.pattern"][0, 1, -1, 2]
    read = block.post_attention_layernorm.weight.double() / (mid.square().mean() + 1e-6).sqrt()
    gate, up = (getattr(block.mlp, f"{side}_proj").weight[3].double() for side in ("gate", "up"))
    m = float(trace["L2.mlp.act@-1"][0, 0, 3])
    share = sum(float(row @ (read * written)) / float(row @ (read * mid)) for row in (gate, up)) / 2
    assert scores["L0.mlp.act[7]@2"] == pytest.approx(share * abs(m), abs=1e-7)


def test_folder_of_another_kind(tmp_path):
    tiny("Gemma3ForCausalLM").hf.save_pretrained(tmp_path)
    found = neuron_sources(load(tmp_path), IDS, neuron="L2.mlp.act[3]", k=3)
    assert found.check.holds


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="name one neuron"):
        neuron_sources(model, IDS, neuron="L1.mlp.act[0-3]")
    with pytest.raises(ParameterError, match="name one head"):
        neuron_sources(model, IDS, neuron="L1.mlp.act[0]", head="L1.mlp.act[2]")
    with pytest.raises(ParameterError, match="does not read what"):
        neuron_sources(model, IDS, neuron="L1.mlp.act[0]", head="L2.attn.z[0]")
    with pytest.raises(UnsupportedError, match="no layer before layer 0"):
        neuron_sources(model, IDS, neuron="L1.mlp.act[0]", head="L0.attn.z[0]")
    with pytest.raises(UnsupportedError, match="misses what the layer read"):
        neuron_sources(Model(tiny("BartForCausalLM").hf), IDS, neuron="L1.mlp.act[0]")
    with pytest.raises(UnsupportedError, match="more than a norm lies in between"):
        neuron_sources(Model(tiny("DeepseekV3ForCausalLM").hf), IDS, neuron="L0.mlp.act[0]", head="L0.attn.z[0]")
