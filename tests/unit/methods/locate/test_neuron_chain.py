"""A chain wired by hand: a neuron that alone switches a second one on, and a head that brings the rest."""

import numpy as np
import pytest
import torch

from cutaway.core.errors import ParameterError
from cutaway.methods.locate.compare_neurons import compare_neurons
from cutaway.methods.locate.neuron_chain import neuron_chain
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from recipes.wiring import Blueprint, Head, Neuron, build

IDS = [5, 9, 6, 7, 8]
SITES = "L0.mlp.act[0-5], L1.mlp.act[0-5], L2.mlp.act[0-5]"


def wired():
    """Neuron 2 of layer 0 writes g at "then", a head brings f from "on"; of layer 1, 3 reads g, 4 f, 5 both alike."""
    words = ("<pad>", "<s>", "</s>", "<unk>", "on", "off", "then", "yes", "no")
    plan = Blueprint(
        words=words,
        embeddings={w: {f"token:{w}": 1.0} for w in words},
        layers=2,
        width=32,
        heads_per_layer=2,
        neurons_per_layer=8,
        heads={
            (0, 1): Head(match=[({"token:then": 60.0}, {"token:on": 1.0})], move=[({"token:on": 1.0}, {"f": 1.0})]),
        },
        neurons={
            (0, 2): Neuron(reads={"token:then": 1.0}, writes={"g": 1.0}),
            (1, 3): Neuron(reads={"g": 1.0}, writes={"out:yes": 1.0}),
            (1, 4): Neuron(reads={"f": 1.0}, writes={"out:yes": 1.0}),
            (1, 5): Neuron(reads={"f": 1.0, "g": 1.0}, writes={"out:yes": 1.0}),
        },
        readout={w: {f"out:{w}": 1.0} for w in words},
    )
    return Model(build(plan, "gpt2"))


def edges(found):
    return {
        (found.nodes[a], found.nodes[b]): float(share)
        for a, b, share in zip(found.source, found.target, found.edge_columns["share"], strict=True)
        if abs(share) > 1e-4
    }


def test_the_wired_chain_is_found_with_its_shares():
    model = wired()
    sites = "L0.mlp.act[0-7], L1.mlp.act[3-5]"
    found = neuron_chain(model, [4, 6], sites=sites, heads="L0.attn.z[0-1]", k=1)
    low, head = "L0.mlp.act[2]", "L0.attn.z[1] from 0"
    seen = edges(found)
    assert seen.keys() == {
        (low, "L1.mlp.act[3]"),
        (head, "L1.mlp.act[4]"),
        (low, "L1.mlp.act[5]"),
        (head, "L1.mlp.act[5]"),
    }
    assert seen[low, "L1.mlp.act[3]"] == pytest.approx(1, abs=1e-4)
    assert seen[head, "L1.mlp.act[4]"] == pytest.approx(1, abs=1e-4)
    activations = dict(zip(found.nodes, found.node_columns["coefficient"], strict=True))
    assert found.weight.sum() == pytest.approx(sum(activations[f"L1.mlp.act[{i}]"] for i in (3, 4, 5)), abs=1e-3)
    trace = model.trace([[4, 6]], want="L0.mlp.act@-1, L0.attn.z@-1")
    g = float(trace["L0.mlp.act@-1"][0, 0, 2])
    written = trace["L0.attn.z@-1"][0, 0, 1] @ model.weight("L0.attn.z[1]")[0]
    f = float(written.norm())  # along f alone
    assert seen[low, "L1.mlp.act[5]"] == pytest.approx(g / (f + g), abs=1e-3)
    assert seen[head, "L1.mlp.act[5]"] == pytest.approx(f / (f + g), abs=1e-3)
    assert found.proof.holds, str(found.proof)
    assert f"they bring: {low} " in found.notes[0]
    assert found.check.holds


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM"])
def test_edges_point_upwards_and_small_removals_agree(name):
    """Shares are linear: what zeroing a neuron takes from an ungated, nearly linear one has the sign and size told."""
    model = Model(tiny(name).hf)
    found = neuron_chain(model, IDS, sites=SITES, heads="L0.attn.z[0], L1.attn.z[1]", draws=0)
    assert found.check.holds
    assert (found.layer[found.source] < found.layer[found.target]).all()
    if name == "GPTNeoXForCausalLM":  # parallel: heads of a layer are not read by its own neurons
        assert not any(
            found.nodes[a].startswith("L1.attn") and found.nodes[b].startswith("L1.mlp")
            for a, b in zip(found.source, found.target, strict=True)
        )


def test_neurons_named_by_a_comparison_of_sums():
    model = load("town")
    prompt = "43 + 25 ="
    neurons = compare_neurons(model, prompt, layers="1-3", score="lost", k=20, draws=0)
    last = neuron_chain(model, prompt, ranking=neurons, heads="L3.attn.z")
    assert len(last.weight) > 20
    assert np.isfinite(last.weight).all()


@pytest.mark.parametrize("prompt", ["43 + 25 =", "Ada Reed lives in"])
def test_roots_in_the_first_layer_switch_the_second_on(prompt):
    found = neuron_chain(load("town"), prompt, sites="L0.mlp.act, L1.mlp.act", most=2000, k=10)
    assert found.proof.holds, str(found.proof)


def test_folder_with_experts(tmp_path):
    tiny("MixtralForCausalLM").hf.save_pretrained(tmp_path)
    found = neuron_chain(load(tmp_path), IDS, sites=SITES.replace("mlp.act[", "expert.act[0-1/"), most=100)
    assert found.check.holds


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="neither is given"):
        neuron_chain(model, IDS)
    with pytest.raises(ParameterError, match="two layers or more"):
        neuron_chain(model, IDS, sites="L1.mlp.act[0-3]")
    with pytest.raises(ParameterError, match="name heads"):
        neuron_chain(model, IDS, sites=SITES, heads="L0.mlp.act[1], L1.mlp.act[2]")
    with torch.no_grad(), pytest.raises(ParameterError, match="both are given"):
        neuron_chain(model, IDS, sites=SITES, ranking=compare_neurons(model, IDS, draws=0, k=2))
