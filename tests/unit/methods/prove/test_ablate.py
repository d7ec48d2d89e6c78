"""Ablations against weights that are really zeroed, against plain interventions, and against the planted truth."""

import copy

import pytest
import torch

import cutaway
from cutaway import specimens
from cutaway.core.errors import CutawayError, ParameterError, SiteRangeError, SiteSyntaxError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Mean, Zero
from cutaway.data.scenes import Scenes
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.methods.prove.ablate import ablate
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import Draws, sizes
from cutaway.ops.units import INDEXED, Unit
from cutaway.results.ranking import Ranking
from tests import architectures

IDS = [5, 9, 6, 7, 8]


def logp(model, token=11, do=()):
    return float(model.trace([IDS], do=do).logits[0, -1].log_softmax(-1)[token])


def ablation(model, **given):
    return Ablation(model, model.inputs([IDS]), [11], **given)


def test_zeroing_is_setting_weights_to_zero():
    model = Model(tiny("LlamaForCausalLM").hf)
    units = [Unit("mlp.act", 0, 3), Unit("mlp.act", 2, 7), Unit("attn.z", 1, 2), Unit("attn.z", 1, 0, 5)]
    changed = copy.deepcopy(model.hf)
    width = model.layers[1].attention.d_value
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight[:, 3] = 0
        changed.model.layers[2].mlp.down_proj.weight[:, 7] = 0
        changed.model.layers[1].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
        changed.model.layers[1].self_attn.o_proj.weight[:, 5] = 0
    found = ablation(model)([units, []])
    assert float(found.logp[0]) == pytest.approx(logp(Model(changed)), abs=1e-5)
    assert float(found.logp[1]) == pytest.approx(logp(model), abs=1e-5)
    assert abs(float(found.logp[0] - found.logp[1])) > 1e-3


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "GPTNeoXForCausalLM"])
def test_rows_of_a_batch_are_single_interventions(name):
    model = Model(tiny(name).hf)
    neuron = "expert.act" if name.startswith("Mixtral") else "mlp.act"
    sets = [
        [Unit("attn.z", 1, 1)],
        [Unit("attn.out", 2)],
        [Unit("mlp.out", 0), Unit("attn.out", 0)],
        [Unit(neuron, 1, 2, 3 if neuron == "expert.act" else -1)],
    ]
    do = [["L1.attn.z[1]"], ["L2.attn.out"], ["L0.mlp.out", "L0.attn.out"], [str(sets[3][0])]]
    found = ablation(model)(sets).logp
    last = ablation(model, reach="last")(sets).logp
    for i, sites in enumerate(do):
        assert float(found[i]) == pytest.approx(logp(model, do=[Zero(s) for s in sites]), abs=1e-5)
        assert float(last[i]) == pytest.approx(logp(model, do=[Zero(f"{s}@-1") for s in sites]), abs=1e-5)


def test_the_mean_is_over_the_reference():
    model = Model(tiny("LlamaForCausalLM").hf)
    found = ablation(model, how="mean")([[Unit("attn.z", 1, 1)]])
    assert float(found.logp[0]) == pytest.approx(logp(model, do=Mean("L1.attn.z[1]")), abs=1e-5)
    other = model.inputs([[1, 2, 3, 4], [9, 8, 7, 6]])
    value = model.trace(other, want="L1.attn.z[1]")["L1.attn.z[1]"].mean(dim=(0, 1))
    found = ablation(model, how="mean", reference=[other])([[Unit("attn.z", 1, 1)]])
    assert float(found.logp[0]) == pytest.approx(logp(model, do=Mean("L1.attn.z[1]", value)), abs=1e-5)


def test_resampling_puts_in_what_was_seen_elsewhere():
    model = Model(tiny("LlamaForCausalLM").hf)
    other = model.inputs([[1, 2, 3, 4]])
    values = model.trace(other, want="L1.mlp.act[3]")["L1.mlp.act[3]"][0, :, 0]
    possible = [logp(model, do=Mean("L1.mlp.act[3]", v)) for v in values]
    found = ablation(model, how="resample", reference=[other])([[Unit("mlp.act", 1, 3)]] * 6).logp
    assert all(min(abs(p - float(f)) for p in possible) < 1e-5 for f in found)
    assert len({round(float(f), 5) for f in found}) > 1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_all_sources_of_a_head_together_are_the_head_at_the_last_position(name):
    model = Model(tiny(name).hf)
    whole = [Unit("attn.z", 1, 1, -1, p) for p in range(5)]
    channels = [Unit("attn.z", 1, 1, c, p) for p in range(5) for c in range(model.layers[1].attention.d_value)]
    found = ablation(model)([whole, channels]).logp
    expected = logp(model, do=Zero("L1.attn.z[1]@-1"))
    assert [float(f) for f in found] == pytest.approx([expected, expected], abs=1e-5)


def test_keeping_takes_everything_else():
    model = Model(tiny("LlamaForCausalLM").hf)
    kept = [Unit("attn.z", 1, 1), Unit("attn.z", 0, 3)]
    found = ablation(model).keeping([kept], [Unit("attn.z", i, 0) for i in range(3)]).logp
    others = [Zero("L0.attn.z[0-2]"), Zero("L1.attn.z[0+2+3]"), Zero("L2.attn.z")]
    assert float(found[0]) == pytest.approx(logp(model, do=others), abs=1e-5)


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("LlamaForCausalLM", Unit("attn.out", 1, at=2)),
        ("LlamaForCausalLM", Unit("mlp.out", 1, at=2)),
        ("LlamaForCausalLM", Unit("attn.z", 1, 2, at=3)),
        ("LlamaForCausalLM", Unit("attn.z", 1, 0, 5, at=1)),
        ("LlamaForCausalLM", Unit("mlp.act", 1, 7, at=4)),
        ("MixtralForCausalLM", Unit("expert.act", 1, 1, 6, at=4)),
    ],
    ids=lambda value: str(value),
)
def test_a_component_at_one_position_is_taken_away_there_alone(name, unit, how):
    model = Model(tiny(name).hf)
    site, inner = f"L{unit.layer}.{unit.kind}", tuple(i for i in (unit.number, unit.inner) if i >= 0)

    def by_hand(x, where):
        y = x.clone()
        y[(0, unit.at, *inner)] = 0.0 if how == "zero" else x[(0, slice(None), *inner)].mean(0)
        return y

    plain, wanted = logp(model), logp(model, do=[Apply(site, by_hand)])
    found = ablation(model, how=how)([[unit], []])
    assert float(found.logp[0]) == pytest.approx(wanted, abs=1e-5)
    assert float(found.logp[1]) == pytest.approx(plain, abs=1e-5)
    if unit.kind in INDEXED:  # not what a whole position would give
        everything = [unit._replace(number=i) for i in range(4)]
        assert abs(float(ablation(model, how=how)([everything]).logp[0]) - wanted) > 1e-5


def test_draws_of_few_heads_say_how_many_differ():
    model = Model(tiny("LlamaForCausalLM").hf)
    heads = model.layers[1].attention.heads
    drawer = Draws(model, [Unit("attn.z", 1, i) for i in range(heads // 2)], 5, 0)
    sets = drawer.sets([1, heads // 2], 6)
    assert sets[:2] == [drawer.units[:1], drawer.units]
    assert drawer.distinct == 1  # the other half of the layer's heads, every time
    found = ablate(model, [IDS], sites="L0-2.mlp.act[0]", draws=7)
    assert found.proof.n_distinct == 7


def test_draws_match_layers_and_avoid_what_is_named():
    model = Model(tiny("LlamaForCausalLM").hf)
    named = [Unit("mlp.act", 1, i) for i in range(10)] + [Unit("attn.z", 2, 1, 3, 4)]
    draws = Draws(model, named, 5, 0)
    drawn = draws.draw(11)
    assert len(set(drawn)) == 11
    assert not set(drawn) & set(named)
    assert sorted((u.layer, u.family) for u in drawn) == sorted((u.layer, u.family) for u in named)
    assert sizes(30) == [1, 3, 10, 30]
    assert sizes(7) == [1, 3, 7]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_planted_parts_carry_the_answer(family):
    model = load(f"planted-{family}")
    truth = specimens.card(f"planted-{family}").truths["prompts"][0]
    for part in (truth["head"], truth["value_neuron"], truth["query_neuron"]):
        found = ablate(model, truth["prompt"], sites=part, draws=8)
        assert found.check.holds
        assert found.proof.holds, str(found.proof)
        assert found.y[0, -1] > 0.3
        assert found.y[2, -1] < found.y[3, -1] + 1e-6


def test_a_ranking_that_was_saved_is_taken(tmp_path):
    model = load("planted-llama")
    ranking = neuron_attribution(model, "Ada plays", k=12, draws=0)
    folder = ranking.save(tmp_path / "r")
    direct, saved = (ablate(model, "Ada plays", ranking=r) for r in (ranking, str(folder)))
    assert not direct.same_as(saved)
    assert direct.x.tolist() == [1, 3, 10, 12]
    assert direct.labels["line"][0] == "top k away"
    for measure in ("probability", "rank"):
        assert ablate(model, "Ada plays", ranking=ranking, measure=measure).measure == f"drop in {measure}"


def test_a_ranking_of_another_prompt_is_taken_with_a_note():
    model = load("planted-llama")
    ranking = cutaway.run("neuron_attribution", model, prompt="Ada plays", k=3, draws=0)
    told = [cutaway.run(name, model, prompt="Bea plays", ranking=ranking) for name in ("ablate", "neuron_projection")]
    for found in told:
        assert sum("made on another prompt: 'Ada plays'" in note for note in found.notes) == 1
    ids = model.inputs("Ada plays").ids[0].tolist()
    for same in ("Ada plays", ids, model.inputs("Ada plays")):
        assert not any("another prompt" in note for note in ablate(model, same, ranking=ranking).notes)
    assert not any(
        "another prompt" in n for n in ablate(model, "Bea plays", ranking=ranking.replace(made_by=None)).notes
    )


def test_the_embedding_of_a_ranking_is_left_out():
    model = load("planted-llama")
    ranking = Ranking(items=["embed", "L1.mlp.act[2]", "L1.mlp.act[4]"], scores=[3.0, 2.0, 1.0])
    found = ablate(model, "Ada plays", ranking=ranking)
    assert found.x.tolist() == [1, 2]
    assert "'embed' is left out: the embedding is no component" in found.notes
    with pytest.raises(ParameterError, match="none is named"):
        ablate(model, "Ada plays", ranking=Ranking(items=["embed"], scores=[1.0]))


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="neither"):
        ablate(model, IDS)
    with pytest.raises(SiteSyntaxError, match="components are"):
        ablate(model, IDS, sites="L1.resid_pre")
    with pytest.raises(SiteSyntaxError, match="does not read"):
        ablate(model, IDS, ranking=Ranking(items=["L1.mlp"], scores=[1.0]))
    with pytest.raises(SiteRangeError):
        ablate(model, IDS, ranking=Ranking(items=["L1.mlp.act[99999]"], scores=[1.0]))
    with pytest.raises(ParameterError, match="use how='zero'"):
        ablate(model, IDS, ranking=Ranking(items=["L1.attn.z[0] from 1"], scores=[1.0]), how="mean")
    with pytest.raises(ParameterError, match="too few others"):
        ablate(Model(tiny("LlamaForCausalLM", num_hidden_layers=2).hf), IDS, sites="L0.attn.out")
    with pytest.raises(CutawayError, match="positions"):
        ablate(model, IDS, ranking=Ranking(items=["L1.attn.z[0] from 50"], scores=[1.0]))


def test_a_question_about_an_image_runs_in_rows():
    model = load("scenes")
    (scene, example), *_ = Scenes(seed=0).exam(1, "colour")
    inputs = model.inputs(example.prompt, image=scene.image())
    token = int(model(inputs)[0, -1].argmax())
    sets = [[Unit("attn.z", i, h)] for i in range(model.n_layers) for h in range(2)] + [[Unit("mlp.out", 1)]]
    found = Ablation(model, inputs, [token])
    assert found._at_once > 1
    for i, effect in enumerate(found(sets).logp):
        logits = model.trace(inputs, do=[Zero(str(unit)) for unit in sets[i]]).logits[0, -1]
        assert float(effect) == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)


@pytest.mark.parametrize("name", architectures.IMAGE)
def test_images_are_repeated_with_their_rows(name):
    model, inputs = architectures.model(name), architectures.inputs(name)
    logits = model(inputs.repeat(3))
    torch.testing.assert_close(logits, model(inputs).expand_as(logits), rtol=0, atol=1e-4)
    found = Ablation(model, inputs, [5])
    assert found._at_once > 1
    rows = found([[Unit("attn.out", 0)], [Unit("attn.out", 1)]]).logp
    for i in range(2):
        logits = model.trace(inputs, do=[Zero(f"L{i}.attn.out")]).logits[0, -1]
        assert float(rows[i]) == pytest.approx(float(logits.log_softmax(-1)[5]), abs=1e-4)


def test_inputs_that_a_model_does_not_take_repeated_run_one_by_one(monkeypatch):
    model, inputs = architectures.model("llava"), architectures.inputs("llava")
    expected = ablation_of(model, inputs)
    monkeypatch.setattr(Inputs, "_repeated", lambda self, value, n: value)  # one image for several rows
    found = Ablation(model, inputs, [5])
    assert found._at_once == 1
    torch.testing.assert_close(found([[Unit("attn.out", 0)]] * 2).logp, expected, rtol=0, atol=1e-5)


def ablation_of(model, inputs):
    return Ablation(model, inputs, [5])([[Unit("attn.out", 0)]] * 2).logp
