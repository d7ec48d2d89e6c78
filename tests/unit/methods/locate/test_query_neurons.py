"""What switched value neurons on: planted cases, the definition spelled out, and the model itself asked."""

import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import CutawayError, ParameterError, UnsupportedError
from cutaway.core.intervention import Apply
from cutaway.core.result_file import open_result
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.methods.locate.query_neurons import query_neurons
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.results.ranking import Ranking
from recipes.planted import Truth, moves

IDS = [5, 9, 6, 7, 8]
NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "Qwen2ForCausalLM",
    "Phi3ForCausalLM",
    "FalconForCausalLM",
    "GPTNeoXForCausalLM",
    "BloomForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
)


def asked(name, **given):
    return query_neurons(Model(tiny(name).hf), IDS, draws=0, **given)


def scores(result):
    return dict(zip(result.items, result.scores.tolist(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_the_planted_query_neuron_comes_first_with_its_analytic_score(family):
    """One value neuron reads it: channel of the planted head, from the subject; its importance times the share."""
    model = load(f"planted-{family}")
    for case in specimens.card(f"planted-{family}").truths["prompts"]:
        subject, relation = case["prompt"].split()
        truth = Truth(family, subject, relation)
        read, written = moves(subject)
        moved = truth.attention * truth.source.read(read) / truth.source.scale()
        importance = truth.importance(truth.before_head, {name: moved * v for name, v in written.items()})
        found = query_neurons(model, case["prompt"], target=case["answer"], draws=0)
        assert found.items[0] == case["query_neuron"]
        assert found.columns["position"][0] == case["query_neuron_position"]
        assert found.columns["token"][0].strip() == subject
        assert found.columns["share"][0] == pytest.approx(case["query_neuron_share"], abs=1e-5)
        assert found.scores[0] == pytest.approx(importance * case["query_neuron_share"], abs=1e-5)
        assert found.columns["through"][0].startswith(case["head"].removesuffix("]"))
        assert found.columns["kind"][0] == "query only"


@pytest.mark.parametrize("level", ["layer", "head", "neuron"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_sum_to_what_value_neurons_add(name, level):
    found = asked(name, level=level, k=1_000_000, verify=0)
    assert found.check.holds, str(found.check)
    if level == "layer":
        ranking = [
            neuron_attribution(Model(tiny(name).hf), IDS, level=lv, draws=0) for lv in ("attention-neuron", "neuron")
        ]
        worthy = sum(float(r.scores[r.scores > 1e-3 * r.scores.max()].sum()) for r in ranking)
        constants = float(found.notes[0].rpartition("constants ")[2])
        assert found.scores.sum() + constants == pytest.approx(worthy, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_scores_of_an_attention_value_neuron_are_the_definition_spelled_out(name):
    model = Model(tiny(name).hf)
    ranking = neuron_attribution(model, IDS, level="attention-neuron", target=11, k=200, draws=0)
    which = next(i for i, item in enumerate(ranking.items) if item.startswith("L2"))
    one = ranking.replace(items=ranking.items[which : which + 1], scores=ranking.scores[which : which + 1], columns={})
    head, channel, source = (int(t) for t in one.items[0].replace("L2.attn.z[", "").replace("] from ", "/").split("/"))
    found = scores(query_neurons(model, IDS, ranking=one, k=1_000_000, draws=0, verify=0))
    trace = model.trace([IDS], want="L2.resid_pre, L2.attn.v, L2.attn.pattern, L1.mlp.act")
    x, act = trace["L2.resid_pre"][0, source].double(), trace["L1.mlp.act"][0, source]
    if name.startswith("GPT2"):
        block, width = model.hf.transformer.h[2], 16
        row = block.attn.c_attn.weight[:, 2 * 64 + head * width + channel].double() * block.ln_1.weight.double()
        key = (row - row.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()
    else:
        block = model.hf.model.layers[2]
        row = block.self_attn.v_proj.weight[head // 2 * 16 + channel].double() * block.input_layernorm.weight.double()
        key = row / (x.square().mean() + 1e-6).sqrt()
    v = float(trace["L2.attn.v"][0, source, head if name.startswith("GPT2") else head // 2, channel])
    vector = act[7].double() * model.weight("L1.mlp.act")[7].double()
    assert found["L1.mlp.act[7]"] == pytest.approx(float(one.scores[0]) * float(key @ vector) / v, abs=1e-6)
    assert not any(item.startswith("L2") for item in found)


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [("LlamaForCausalLM", "mlp.act"), ("GPT2LMHeadModel", "attn.z")])
def test_removal_is_what_the_model_itself_gives_without_the_part(name, kind):
    """The part is taken out of the state by an intervention; attention weights stay those of the run."""
    model = Model(tiny(name).hf)
    level = "neuron" if kind == "mlp.act" else "attention-neuron"
    ranking = neuron_attribution(model, IDS, level=level, target=11, k=200, draws=0)
    which = next(i for i, item in enumerate(ranking.items) if item.startswith("L1"))
    one = ranking.replace(items=ranking.items[which : which + 1], scores=ranking.scores[which : which + 1], columns={})
    found = query_neurons(model, IDS, ranking=one, k=1, draws=0)
    item = found.items[0]
    assert item.startswith("L0.mlp.act")
    source = int(found.columns["position"][0])
    trace = model.trace([IDS], want="L0.mlp.act, L1.attn.pattern, L1.attn.v, L1.mlp.act")
    number = int(item.partition("[")[2].removesuffix("]"))
    part = trace["L0.mlp.act"][0, source, number] * model.weight(item)[0]
    state = "resid_mid" if kind == "mlp.act" else "resid_pre"

    def without(x, where):
        return x - part

    again = model.trace([IDS], want="L1.attn.v, L1.mlp.act", do=[Apply(f"L1.{state}@{source}", without)])
    if kind == "mlp.act":
        neuron = int(one.items[0].partition("[")[2].removesuffix("]"))
        before, after = (float(t["L1.mlp.act"][0, -1, neuron]) for t in (trace, again))
    else:
        head, channel, _ = (int(t) for t in one.items[0].replace("L1.attn.z[", "").replace("] from ", "/").split("/"))
        before, after = (float(t["L1.attn.v"][0, source, head, channel]) for t in (trace, again))
    removal = float(one.scores[0]) * (before - after) / before
    assert found.columns["removal"][0] == pytest.approx(removal, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_neurons_of_experts_are_values_and_queries(name):
    found = asked(name, k=200)
    assert any(item.startswith("L0.expert.act") for item in found.items)
    assert any("expert.act" in text for text in found.columns["through"])
    assert not any("left out" in note for note in found.notes)


def test_zeroing_them_hurts_more_than_random():
    found = query_neurons(load("town"), "Ada Reed lives in")
    assert found.proof.n_draws == 5
    assert found.proof.holds, str(found.proof)
    assert not found.same_as(query_neurons(load("town"), "Ada Reed lives in"))


def test_values_of_one_kind_alone_add_up_to_both():
    sums = {
        v: asked("LlamaForCausalLM", values=v, level="layer", k=100).scores.sum() for v in ("attention", "ffn", "both")
    }
    assert sums["both"] == pytest.approx(sums["attention"] + sums["ffn"], abs=1e-5)


def test_a_rival_and_saving(tmp_path):
    found = asked("LlamaForCausalLM", target=11, versus=22, k=4)
    assert found.unit == "logits"
    assert open_result(found.save(tmp_path / "r")) == found
    assert found.spec()["layer"]


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="it is none"):
        query_neurons(model, IDS, ranking=neuron_attribution(model, IDS, level="head", draws=0))
    with pytest.raises(UnsupportedError, match="norms the sum"):
        query_neurons(Model(tiny("BartForCausalLM").hf), IDS)
    with pytest.raises(UnsupportedError, match="more than a norm lies in between"):
        asked("DeepseekV3ForCausalLM", values="attention")


def test_value_neurons_that_are_not_there_are_refused():
    model = load("planted-llama")
    for item, said in (("L7.mlp.act[0]", "layer 7"), ("L1.mlp.act[999]", "neuron 999"), ("embed", "embedding is none")):
        with pytest.raises(CutawayError, match=said):
            query_neurons(model, "Ada plays", ranking=Ranking(items=[item], scores=[1.0]), draws=0)
    with pytest.raises(CutawayError, match="the prompt has"):
        query_neurons(model, "Ada plays", ranking=Ranking(items=["L1.attn.z[0/1] from 90"], scores=[1.0]), draws=0)
