"""A neuron that a head switches on is the whole difference without it; bounds and curves against brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import MismatchError, ParameterError
from cutaway.methods.locate.compare_neurons import compare_neurons
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.comparison import Case, Comparison
from cutaway.ops.importance import Goal
from cutaway.ops.maskkeep import mask_and_keep
from cutaway.ops.parts import take_apart
from cutaway.ops.readout import Head as Readout
from cutaway.ops.units import Unit
from recipes.wiring import Blueprint, Head, Neuron, build

IDS = [5, 9, 6, 7, 8]
HEAD, NEURON = "L0.attn.z[1]", "L1.mlp.act[3]"
ON_THEN, YES = [4, 6], 7


def wired(family, against):
    """Head 1 of layer 0 brings f from the first word; neuron 3 of layer 1 reads f and raises "yes"; two say "no"."""
    words = ("<pad>", "<s>", "</s>", "<unk>", "on", "off", "then", "yes", "no")
    plan = Blueprint(
        words=words,
        embeddings={w: {f"token:{w}": 1.0, "one": 1.0} for w in words},
        layers=2,
        width=32,
        heads_per_layer=2,
        kv_heads=2,
        neurons_per_layer=8,
        heads={
            (0, 1): Head(match=[({"token:then": 60.0}, {"token:on": 1.0})], move=[({"token:on": 1.0}, {"f": 1.0})]),
            (0, 0): Head(match=[], move=[({"one": 1.0}, {"noise": 0.3})]),
        },
        neurons={
            (0, 0): Neuron(reads={"one": 1.0}, writes={"out:no": against}, gate={"one": 1.0}),
            (1, 3): Neuron(reads={"f": 1.0}, writes={"out:yes": 1.0}, gate={"one": 1.0}),
            (1, 5): Neuron(reads={"noise": 1.0}, writes={"out:no": against}, gate={"one": 1.0}),
        },
        readout={w: {f"out:{w}": 4.0} for w in words},
    )
    return Model(build(plan, family))


@pytest.mark.parametrize(("score", "against"), [("difference", 0.001), ("lost", 0.2)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_neuron_behind_the_head_is_the_whole_difference(family, score, against):
    model = wired(family, against)
    found = compare_neurons(model, ON_THEN, target=YES, score=score, k=16, draws=0)
    assert f"the largest: {HEAD} " in found.notes[0]  # the sweep finds the head by itself
    assert found.items[0] == NEURON
    assert found.columns["coefficient lost"][0] == pytest.approx(1.0, abs=1e-5)
    assert found.columns["coefficient there"][0] == pytest.approx(0.0, abs=1e-5)
    plain = neuron_attribution(model, ON_THEN, target=YES, k=1, draws=0)
    assert plain.items[0] == NEURON
    assert found.scores[0] == pytest.approx(plain.scores[0], abs=1e-5)  # all of its importance
    assert found.scores[0] > 2
    assert found.scores[1] < 0.01 * found.scores[0]
    assert found.check.holds


def test_a_difference_also_names_neurons_that_speak_up_when_the_head_is_gone():
    """Without the head the stream is shorter, the norm scales up what is left, and an opponent changes most."""
    model = wired("llama", 0.2)
    found = compare_neurons(model, ON_THEN, target=YES, do=f"zero {HEAD}", k=3, draws=0)
    first = found.items[0]
    assert first != NEURON
    assert found.columns["importance"][0] < 0
    assert found.columns["importance there"][0] < -1
    assert found.columns["coefficient lost"][0] < 0  # it grew
    assert compare_neurons(model, ON_THEN, target=YES, score="lost", k=1, draws=0).items[0] == NEURON


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_planted_value_neurons_lose_everything_without_their_head(family):
    model = load(f"planted-{family}")
    for truth in specimens.card(f"planted-{family}").truths["prompts"][:3]:
        found = compare_neurons(model, truth["prompt"], do=f"zero {truth['head']}", target=truth["answer"], k=3)
        assert found.items[0] == truth["value_neuron"]
        assert found.columns["importance"][0] == pytest.approx(truth["value_neuron_importance"], abs=1e-5)
        assert found.columns["coefficient lost"][0] == pytest.approx(1.0, abs=0.02)
        assert found.scores[1] < 0.02
        assert found.columns["among the most important"][0]
        assert found.proof.holds, str(found.proof)
        assert found.columns["p without"][0] < found.columns["p without, random"][0] - 0.2
        assert found.columns["p alone"][0] > 0.99


def compared(name, do, layers=(0, 1, 2)):
    model = Model(tiny(name).hf)
    batch = model.inputs(IDS)
    a = take_apart(model, batch, 1, "neuron")
    with model.doing(do):
        b = take_apart(model, batch, 1, "neuron")
    goal = Goal.of(Readout(model).frozen(a.final, a.logits), [11])
    return model, Comparison([Case(goal, a, b)], layers)


@pytest.mark.parametrize("by", ["difference", "lost", "importance"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "MixtralForCausalLM", "GPTNeoXForCausalLM"])
def test_the_largest_are_those_that_computing_all_gives(name, by):
    _, both = compared(name, ["zero L0.attn.z[1]", "scale L1.attn.out 3"])
    every = both.score(torch.arange(both.total), by)
    best = both.top(10, by)
    assert both.certified
    torch.testing.assert_close(best.score, every.topk(10).values, rtol=1e-4, atol=1e-6)
    for a, b in both.sides:
        assert (both._bound(a, b, by) >= every - 1e-5).all()


def test_under_a_soft_cap_nothing_is_certified():
    _, both = compared("Gemma2ForCausalLM", "zero L0.attn.z[1]")
    assert not both.certified
    every = both.score(torch.arange(both.total), "difference")
    assert float(both.top(10, "difference").score[0]) == pytest.approx(float(every.max()), abs=1e-5)


def test_differences_are_those_of_two_separate_attributions():
    """With the second run's scale put back, importance there is what attribution gives under the intervention."""
    model = Model(tiny("LlamaForCausalLM").hf)
    found = compare_neurons(model, IDS, do="scale L1.mlp.out 1", target=11, k=20, draws=0)
    assert "WARNING: the answer changes in 0 of 1 prompts" in found.notes[0]
    np.testing.assert_allclose(found.scores, 0, atol=1e-6)
    plain = neuron_attribution(model, IDS, target=11, k=100_000, draws=0)
    known = dict(zip(plain.items, plain.scores, strict=True))
    np.testing.assert_allclose(found.columns["importance there"], [known[i] for i in found.items], atol=1e-5)


@torch.no_grad()
def test_another_model_that_differs_in_one_neuron(tmp_path: Path):
    model = Model(tiny("LlamaForCausalLM").hf)
    tuned = tiny("LlamaForCausalLM").hf
    module = tuned.get_submodule("model.layers.1.mlp.up_proj")
    kept = module.weight[17].clone()
    module.weight[17] *= -3
    tuned.save_pretrained(tmp_path)
    module.weight[17] = kept
    found = compare_neurons(model, IDS, other=str(tmp_path), layers="0-1", k=300, draws=0)
    rows = {item: i for i, item in enumerate(found.items)}
    lost = found.columns["coefficient lost"]
    assert lost[rows["L1.mlp.act[17]"]] == pytest.approx(4.0, abs=1e-4)
    assert sum(abs(x) > 1e-4 for x in lost) == 1
    assert found.title.endswith(str(tmp_path))


def test_before_and_after_tuning_and_between_prompts():
    """A pair of prompts, as for gender: what makes the difference to the one answer."""
    town = load("town")
    tuned = compare_neurons(town, "Ada Reed lives in", other="town-tuned", k=5, draws=0)
    assert tuned.check.holds
    pair = compare_neurons(town, ["The queen is a"], against=["The king is a"], target=" woman", k=10)
    assert pair.scores[0] > 0.05
    assert pair.proof is not None
    assert (np.diff(pair.scores) <= 1e-6).all()


@torch.no_grad()
def test_curves_are_plain_interventions():
    model = Model(tiny("LlamaForCausalLM").hf)
    inputs = model.inputs(IDS)
    units = [Unit("mlp.act", 1, 3), Unit("mlp.act", 2, 9)]
    left = mask_and_keep(model, [inputs], [11], [units], [Unit("mlp.act", 1, 0), Unit("mlp.act", 2, 0)])
    without = model.trace(inputs, do=["zero L1.mlp.act[3]", "zero L2.mlp.act[9]"]).logits[0, -1].softmax(-1)
    assert float(left.masked[0, 1]) == pytest.approx(float(without[11]), rel=1e-4)
    n = model.layers[1].d_mlp
    alone = model.trace(inputs, do=[f"zero L1.mlp.act[0-2+4-{n - 1}]", "zero L2.mlp.act"]).logits[0, -1].softmax(-1)
    assert float(left.kept[0, 0]) == pytest.approx(float(alone[11]), rel=1e-4)
    assert float(left.right_masked[0, 1]) == float(without.argmax() == 11)


def test_several_prompts_are_averaged_and_only_those_that_change_are_kept():
    model = Model(tiny("LlamaForCausalLM").hf)
    rows = [[5, 9, 6, 7], [8, 3, 12, 40]]
    do = "zero L0.attn.z[1], scale L1.attn.out 8"
    both = compare_neurons(model, rows, do=do, k=100_000, draws=0)
    each = [compare_neurons(model, row, do=do, k=100_000, draws=0) for row in rows]
    parts = [dict(zip(one.items, one.scores, strict=True)) for one in each]
    for item, score in list(zip(both.items, both.scores, strict=True))[:20]:
        assert score == pytest.approx((parts[0][item] + parts[1][item]) / 2, abs=1e-5)
    with pytest.raises(ParameterError, match="none of 2 prompts has another answer"):
        compare_neurons(model, rows, do="scale L1.mlp.out 1", changed=True)


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "MixtralForCausalLM"])
def test_folders_that_nobody_has_seen(name, tmp_path):
    tiny(name).hf.save_pretrained(tmp_path)
    found = compare_neurons(load(tmp_path), [IDS, IDS[::-1]], k=5)
    assert found.check.holds
    assert "the largest: L" in found.notes[0]
    assert found.proof.n_draws == 5
    for what in ("p without", "p without, plain", "p without, random", "p alone", "p alone, plain", "p alone, random"):
        assert ((found.columns[what] >= 0) & (found.columns[what] <= 1)).all()


def test_refusals(tmp_path: Path):
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="differ in two things"):
        compare_neurons(model, IDS, do="zero L0.attn.z[0]", against=IDS)
    with pytest.raises(MismatchError, match="3 and 2 are given"):
        compare_neurons(model, [IDS, IDS, IDS], against=[IDS, IDS])
    with pytest.raises(MismatchError, match="their shapes are"):
        compare_neurons(model, IDS, other="town")
    tiny("MistralForCausalLM").hf.save_pretrained(tmp_path)  # as wide and as deep, but built otherwise
    with pytest.raises(MismatchError, match=r"'architecture': 'llama', .* and {'architecture': 'mistral'"):
        compare_neurons(model, IDS, other=str(tmp_path))
