"""Scores against arithmetic, against plain recomputation, and across architectures."""

import copy
from dataclasses import replace

import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.result_file import open_result
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.units import Unit
from recipes import planted

IDS = [5, 9, 6, 7, 8]
LEVELS = ("layer", "head", "head-position", "neuron", "attention-neuron")
NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "CohereForCausalLM",
    "GPTNeoXForCausalLM",
    "BloomForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
)


def attributed(name, **given):
    return neuron_attribution(Model(tiny(name).hf), IDS, draws=0, **given)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize(("level", "named"), [("head", "head"), ("neuron", "value_neuron")])
def test_planted_parts_come_first_with_their_analytic_score(family, level, named):
    model = load(f"planted-{family}")
    for truth in specimens.card(f"planted-{family}").truths["prompts"]:
        found = neuron_attribution(model, truth["prompt"], target=truth["answer"], level=level, draws=0)
        assert found.items[0] == truth[named]
        assert found.scores[0] == pytest.approx(truth[f"{named}_importance"], abs=1e-5)
        if level == "neuron":
            assert found.columns["coefficient"][0] == pytest.approx(truth["value_neuron_coefficient"], abs=1e-5)


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_what_the_planted_head_brings_has_its_analytic_score(family):
    """The head brings the subject's facts in one channel per subject; all by arithmetic on the recipe's constants."""
    model = load(f"planted-{family}")
    for subject in planted.SUBJECTS:
        truth = planted.Truth(family, subject, "plays")
        moved = [planted.moves(s) for s in planted.SUBJECTS]
        coefficients = [truth.attention * truth.source.read(read) / truth.source.scale() for read, _ in moved]
        written = [{n: c * x for n, x in writes.items()} for c, (_, writes) in zip(coefficients, moved, strict=True)]
        channel = planted.SUBJECTS.index(subject)
        whole = {name: sum(w.get(name, 0.0) for w in written) for w in written for name in w}
        prompt, given = f"{subject} plays", {"target": truth.answer, "draws": 0}
        found = neuron_attribution(model, prompt, level="head-position", **given)
        assert found.items[0] == "L1.attn.z[2] from 1"
        assert found.scores[0] == pytest.approx(truth.importance(truth.before_head, whole), abs=1e-5)
        found = neuron_attribution(model, prompt, level="attention-neuron", **given)
        assert found.items[0] == f"L1.attn.z[2/{channel}] from 1"
        assert found.scores[0] == pytest.approx(truth.importance(truth.before_head, written[channel]), abs=1e-5)
        assert found.columns["coefficient"][0] == pytest.approx(coefficients[channel], abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_the_planted_head_brings_it_from_the_subject(family):
    found = neuron_attribution(load(f"planted-{family}"), "Bea likes", level="head-position", draws=0)
    assert found.items[0] == "L1.attn.z[2] from 1"
    assert found.columns["source token"][0] == "Bea"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_sums_hold_and_the_set_is_certified(name, level):
    found = attributed(name, level=level, k=10)
    assert found.check.holds, str(found.check)
    if level != "layer":
        assert "certified" in found.notes[0]
        every = attributed(name, level=level, k=1_000_000)
        torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(every.scores[:10]), rtol=1e-5, atol=1e-5)
        assert (every.columns["bound"] >= every.scores - 1e-5).all()


@pytest.mark.parametrize("level", ["head", "neuron", "attention-neuron"])
@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GPT2LMHeadModel"])
def test_rivals_and_following_tokens(name, level):
    pair = attributed(name, level=level, target=11, versus=22, k=10)
    every = attributed(name, level=level, target=11, versus=22, k=1_000_000)
    torch.testing.assert_close(torch.tensor(pair.scores), torch.tensor(every.scores[:10]), rtol=1e-5, atol=1e-5)
    longer = attributed(name, level=level, target=11, then=[22, 13], k=10)
    every = attributed(name, level=level, target=11, then=[22, 13], k=1_000_000)
    torch.testing.assert_close(torch.tensor(longer.scores), torch.tensor(every.scores[:10]), rtol=1e-5, atol=1e-5)
    assert (every.columns["bound"] >= every.scores - 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_scores_are_the_definition_spelled_out(name):
    """One neuron and one attention neuron, through the norm's own formula, in double precision."""
    model = Model(tiny(name).hf)
    trace = model.trace([IDS], want="L1.resid_mid, L1.resid_pre, L1.mlp.act, L1.attn.pattern, L1.attn.v, L2.resid_post")
    if name.startswith("GPT2"):
        norm, gain = model.hf.transformer.ln_f, model.hf.transformer.ln_f.weight
        columns, heads = model.hf.transformer.h[1].mlp.c_proj.weight, model.hf.transformer.h[1].attn.c_proj.weight
        shift, eps, centre = norm.bias, norm.eps, True
    else:
        norm, gain = model.hf.model.norm, model.hf.model.norm.weight
        columns, heads = (
            model.hf.model.layers[1].mlp.down_proj.weight.T,
            model.hf.model.layers[1].self_attn.o_proj.weight.T,
        )
        shift, eps, centre = torch.zeros_like(gain), norm.variance_epsilon, False
    final = trace["L2.resid_post"][0, -1].double()
    around = final - final.mean() if centre else final
    s = (around.square().mean() + eps).sqrt()

    def logp(x):
        x = x.double()
        x = x - x.mean() if centre else x
        return ((x / s * gain.double() + shift.double()) @ model.hf.lm_head.weight.double().T).log_softmax(-1)[11]

    def score(baseline, vector):
        return float(logp(baseline + vector) - logp(baseline))

    neurons = attributed(name, level="neuron", target=11, k=1_000_000)
    base = trace["L1.resid_mid"][0, -1]
    vector = trace["L1.mlp.act"][0, -1, 7] * columns[7]
    assert dict(zip(neurons.items, neurons.scores, strict=True))["L1.mlp.act[7]"] == pytest.approx(
        score(base, vector), abs=1e-5
    )
    attention = attributed(name, level="attention-neuron", target=11, k=1_000_000)
    v = trace["L1.attn.v"][0]
    head, channel, source = 2, 5, 1
    group = head * v.shape[1] // model.layers[1].attention.heads
    coefficient = trace["L1.attn.pattern"][0, head, -1, source] * v[source, group, channel]
    vector = coefficient * heads[head * v.shape[2] + channel]
    found = dict(zip(attention.items, attention.scores, strict=True))
    assert found["L1.attn.z[2/5] from 1"] == pytest.approx(score(trace["L1.resid_pre"][0, -1], vector), abs=1e-5)


@torch.no_grad()
def test_layers_of_an_answer_of_two_tokens_add_up_to_its_probability():
    model = Model(tiny("LlamaForCausalLM").hf)
    found = neuron_attribution(model, IDS, target=11, then=[22], level="layer", k=100, draws=0)
    logits = model([[*IDS, 11]])[0, -2:].log_softmax(-1)
    states = model.trace([[*IDS, 11]], want="L0.resid_pre, L2.resid_post")
    start, end = states["L0.resid_pre"][0, -2:], states["L2.resid_post"][0, -2:]
    scale = (end.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    at_start = ((start / scale * model.hf.model.norm.weight) @ model.hf.lm_head.weight.T).log_softmax(-1)
    gained = float((logits - at_start)[[0, 1], [11, 22]].sum())
    assert found.scores.sum() == pytest.approx(gained, abs=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*NAMES[:4], "Gemma3ForCausalLM", "MixtralForCausalLM", "GPTNeoXForCausalLM"])
def test_bfloat16_names_the_same_components(name, level):
    """What it names is the best, give or take three hundredths of the largest score."""
    model = Model(tiny(name).hf)
    exact = neuron_attribution(model, IDS, target=11, level=level, k=1_000_000, draws=0)
    half = Model(copy.deepcopy(model.hf).bfloat16())
    found = neuron_attribution(half, IDS, target=11, level=level, k=5, draws=0)
    assert found.check.holds, str(found.check)
    scores = dict(zip(exact.items, exact.scores.tolist(), strict=True))
    near = 0.03 * max(abs(s) for s in scores.values())
    assert found.scores.tolist() == pytest.approx([scores[item] for item in found.items], abs=near)
    assert all(scores[item] >= exact.scores[4] - near for item in found.items)


def test_own_scale_is_not_certified_and_says_so():
    found = attributed("LlamaForCausalLM", level="neuron", scale="own", k=5)
    assert "certifies nothing" in found.notes[0]


def test_the_proof_is_against_five_draws_and_is_repeatable():
    model = load("planted-llama")
    found = neuron_attribution(model, "Ada plays", level="neuron")
    assert found.proof.n_draws == 5
    assert found.proof.holds, str(found.proof)
    again = neuron_attribution(model, "Ada plays", level="neuron")
    assert not found.same_as(again)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("level", ["head-position", "neuron"])
def test_padding_moves_nothing(level, side):
    model = Model(tiny("LlamaForCausalLM").hf)
    longer = model.inputs([IDS, [*IDS, 1, 2]], padding_side=side)
    rows = {name: getattr(longer, name)[:1] for name in ("ids", "mask", "tokens", "roles")}
    padded = replace(longer, **rows, extra={name: value[:1] for name, value in longer.extra.items()})
    assert padded.padded
    found = neuron_attribution(model, padded, level=level, k=8)
    assert not found.same_as(neuron_attribution(model, IDS, level=level, k=8))


def test_saved_and_opened(tmp_path):
    found = neuron_attribution(load("planted-llama"), "Ada plays", level="attention-neuron", k=5)
    assert open_result(found.save(tmp_path / "r")) == found
    assert found.spec()["layer"]


def test_items_read_back_as_components():
    found = attributed("LlamaForCausalLM", level="attention-neuron", k=5)
    assert [str(Unit.parse(item)) for item in found.items] == list(found.items)


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="versus"):
        neuron_attribution(model, IDS, target=1, versus=2, then=[3])
    with pytest.raises(ParameterError, match="no target"):
        neuron_attribution(model, IDS, then=[3])
    with pytest.raises(UnsupportedError, match="norms the sum"):
        neuron_attribution(Model(tiny("BartForCausalLM").hf), IDS)
    with pytest.raises(UnsupportedError, match="level='layer'"):
        neuron_attribution(Model(tiny("MambaForCausalLM").hf), IDS, level="head")
