"""Flows sit where they were planted, are handed back whole, and are proved by taking their cells away."""

import numpy as np
import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import UnsupportedError
from cutaway.core.intervention import Apply
from cutaway.core.result_file import open_result
from cutaway.data import recall
from cutaway.methods.locate.logit_flow import FLOWS, Cell, _units, logit_flow
from cutaway.methods.locate.query_neurons import query_neurons
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.ablation import Ablation

IDS = [5, 9, 6, 7, 8]
VALUE_ATTENTION, VALUE_FFN, QUERY_ATTENTION, QUERY_FFN = range(4)
NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "FalconForCausalLM",
    "MixtralForCausalLM",
)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_flow_sits_in_the_planted_cells(family):
    """Value: the head of layer 1 from the subject, the neuron of layer 2. Query: layer 0 at the subject, the head."""
    model = load(f"planted-{family}")
    for truth in specimens.card(f"planted-{family}").truths["prompts"][:4]:
        found = logit_flow(model, truth["prompt"], target=truth["answer"], draws=0)
        total = found.values[:2, 1:].sum()
        assert found.values[VALUE_ATTENTION, 1 + 1, 1] + found.values[VALUE_FFN, 1 + 2, 2] > 0.95 * total
        # The planted neurons' own importance is the card's; the rest of their cells are neurons that hardly add.
        assert found.values[VALUE_FFN, 1 + 2, 2] == pytest.approx(truth["value_neuron_importance"], abs=2e-2)
        queries = found.values[2:].copy()
        strongest = np.unravel_index(np.nanargmax(queries), queries.shape)
        assert strongest == (QUERY_FFN - 2, 1 + 0, 1)
        assert np.nanargmax(queries[0]) == np.ravel_multi_index((1 + 1, 2), queries[0].shape)


@pytest.mark.parametrize("name", NAMES)
def test_what_value_neurons_add_is_handed_back_whole(name):
    found = logit_flow(Model(tiny(name).hf), IDS, most=20, draws=0)
    assert found.check.holds, str(found.check)
    constants = float(found.notes[0].rpartition(" ")[2])
    values = np.nansum(found.values[:2])
    assert np.nansum(found.values[2:]) + constants == pytest.approx(values, rel=1e-3, abs=1e-4)
    assert np.isnan(found.values[:3, 0]).all()
    assert found.along("flow") == FLOWS


def test_query_cells_are_the_sublayers_of_query_neurons():
    model = Model(tiny("LlamaForCausalLM").hf)
    flow = logit_flow(model, IDS, target=11, most=30, draws=0)
    layers = query_neurons(model, IDS, target=11, level="layer", most=30, k=100, draws=0)
    by_item = dict(zip(layers.items, layers.scores.tolist(), strict=True))
    assert np.nansum(flow.values[QUERY_FFN, 0]) == pytest.approx(by_item["embed"], abs=1e-5)
    assert flow.values[QUERY_ATTENTION, 2].sum() == pytest.approx(by_item["L1.attn.out"], abs=1e-5)
    assert flow.values[QUERY_FFN, 1].sum() == pytest.approx(by_item["L0.mlp.out"], abs=1e-5)


def test_in_recall_the_value_flows_from_behind_its_key():
    """The second layer reads the value at its own position; what brought it there is the embedding."""
    model = load("recall-2")
    for example in recall(8, pairs=6, seed=3):
        words = example.prompt.split()
        found = logit_flow(model, example.prompt, draws=0)
        place = words.index(words[-1]) + 1 + (found.values.shape[-1] - len(words))
        flow, layer, position = np.unravel_index(np.nanargmax(found.values[:2]), found.values[:2].shape)
        assert (flow, layer, position) == (VALUE_ATTENTION, 1 + 1, place)
        flow, layer, position = np.unravel_index(np.nanargmax(found.values[2:]), found.values[2:].shape)
        assert (2 + flow, layer, position) == (QUERY_FFN, 0, place)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("town", "Ada Reed lives in"), ("recall-2", "a P t Q h C k L s E r K t"), ("planted-gpt2", "Ada plays")],
)
def test_taking_its_cells_away_costs_more_than_random_cells(name, prompt):
    found = logit_flow(load(name), prompt)
    assert found.proof.n_draws == 5
    assert found.proof.holds, str(found.proof)
    alone = logit_flow(load(name), prompt, curve=False).proof
    assert (alone.ks, alone.effect[0]) == (found.proof.ks[-1:], pytest.approx(found.proof.effect[-1], abs=1e-4))
    assert not found.same_as(logit_flow(load(name), prompt))


def test_a_rival_is_subtracted(tmp_path):
    model = Model(tiny("LlamaForCausalLM").hf)
    own, rival = (logit_flow(model, IDS, target=t, most=20, draws=0) for t in (11, 22))
    both = logit_flow(model, IDS, target=11, versus=22, most=20, draws=0)
    np.testing.assert_allclose(both.values, own.values - rival.values, atol=1e-6)
    assert both.notes[:2] == own.notes[:1] + rival.notes[:1]
    assert open_result(both.save(tmp_path / "r")) == both


@torch.no_grad()
def test_cells_are_taken_away_where_they_are():
    model = Model(tiny("LlamaForCausalLM").hf)
    batch = model.inputs(IDS)
    cells = [Cell("mlp.out", 1, 2), Cell("attn.out", 0, 4), Cell("from", 1, 3)]
    found = Ablation(model, batch, [11])([_units(model, cell) for cell in cells])

    def logp(do):
        return float(model.trace(batch, do=do).logits[0, -1].log_softmax(-1)[11])

    assert float(found.logp[0]) == pytest.approx(logp("zero L1.mlp.out@2"), abs=1e-5)
    assert float(found.logp[1]) == pytest.approx(logp("zero L0.attn.out@4"), abs=1e-5)
    trace = model.trace(batch, want="L1.attn.pattern@-1, L1.attn.v")
    brought = trace["L1.attn.pattern@-1"][0, :, 0, 3, None] * trace["L1.attn.v"][0, 3].repeat_interleave(2, dim=0)
    without = Apply("L1.attn.z@-1", lambda x, where: x - brought)
    assert float(found.logp[2]) == pytest.approx(logp(without), abs=1e-5)


def test_refusals():
    with pytest.raises(UnsupportedError, match="norms the sum"):
        logit_flow(Model(tiny("BartForCausalLM").hf), IDS)
