"""Shares of a circuit whose states are known sums, conservation on every way to build a layer, and the definition."""

import numpy as np
import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import SiteRangeError, UnsupportedError
from cutaway.methods.locate.information_flow import information_flow
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.flow import flow, routes

IDS = [5, 9, 6, 7, 8]
NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "GPTNeoXForCausalLM",
    "MixtralForCausalLM",
    "BloomForCausalLM",
    "GptOssForCausalLM",
)


def heads_of(found):
    """(source, target, head): weight, contribution of every head's edge that carries something."""
    edge = found.edge_columns
    return {
        (found.nodes[found.source[e]], found.nodes[found.target[e]], int(edge["head"][e])): (
            float(found.weight[e]),
            float(edge["contribution"][e]),
        )
        for e in range(len(found.weight))
        if edge["kind"][e] == "head" and abs(found.weight[e]) > 1e-4
    }


def test_the_circuit_is_all_that_flows_and_its_shares_are_known():
    """States are sums of unit vectors at right angles: token and place, the letter before, what is copied."""
    model = load("circuit-induction")
    found = information_flow(model, "k b i p g n e l k", share="projection")
    edges = heads_of(found)
    assert edges.keys() == {
        ("L0.resid_pre@1", "L0.resid_mid@2", 0),  # k is written behind it
        ("L0.resid_pre@8", "L0.resid_mid@9", 0),  # so is l, which nothing asks for
        ("L1.resid_pre@2", "L1.resid_mid@9", 1),  # what stands behind the first k is copied
    }
    assert edges["L1.resid_pre@2", "L1.resid_mid@9", 1] == pytest.approx((1 / 4, 1 / 4), abs=1e-4)
    assert edges["L0.resid_pre@1", "L0.resid_mid@2", 0] == pytest.approx((1 / 4 / 3, 1 / 3), abs=1e-4)
    assert edges["L0.resid_pre@8", "L0.resid_mid@9", 0] == pytest.approx((1 / 4, 1 / 3), abs=1e-4)
    assert found.proof.holds, str(found.proof)


@pytest.mark.parametrize("number", range(4))
def test_the_true_path_is_the_strongest(number):
    model = load("circuit-induction")
    prompt = specimens.card("circuit-induction").examples[number]["prompt"]
    tokens = ["<s>", *prompt.split()]
    last = len(tokens) - 1
    behind = tokens.index(tokens[last]) + 1
    found = information_flow(model, prompt)
    edges = heads_of(found)
    into_last = {key: w for key, (w, _) in edges.items() if key[1].startswith("L1.")}
    assert max(into_last, key=into_last.get) == (f"L1.resid_pre@{behind}", f"L1.resid_mid@{last}", 1)
    assert len(into_last) == 1
    assert (f"L0.resid_pre@{behind - 1}", f"L0.resid_mid@{behind}", 0) in edges
    assert {head for _, target, head in edges if target.startswith("L0.")} == {0}
    assert found.proof.holds, str(found.proof)


@pytest.mark.parametrize("by", ["proximity", "projection"])
@pytest.mark.parametrize("name", NAMES)
def test_contributions_to_each_state_sum_to_one_and_nothing_is_lost(name, by):
    model = Model(tiny(name).hf)
    found = flow(model, model.inputs(IDS), by)
    assert found.error < 1e-5
    for sums in found.layers:
        total = sums.stays + sums.constant + sums.heads.sum((1, 2))
        if sums.parallel:
            total = total + sums.mlp
        else:
            torch.testing.assert_close(sums.after + sums.mlp, torch.ones(len(IDS)), rtol=0, atol=1e-4)
        torch.testing.assert_close(total, torch.ones(len(IDS)), rtol=0, atol=1e-4)
        assert not sums.heads.permute(2, 0, 1).triu(1).abs().gt(1e-6).any()  # nothing comes from later
    through = routes(found, len(IDS) - 1)
    assert float(through.states[0].sum()) + through.constant == pytest.approx(1, abs=1e-4)
    graph = information_flow(model, IDS, share=by, draws=0)
    assert graph.check.holds
    ends = graph.nodes.tolist().index(f"L{model.n_layers - 1}.resid_post@4")
    assert graph.edge_columns["contribution"][graph.target == ends].sum() == pytest.approx(
        1 - (float(found.layers[-1].constant[-1]) if found.layers[-1].parallel else 0), abs=1e-4
    )


@pytest.mark.parametrize("by", ["proximity", "projection"])
@pytest.mark.parametrize("name", ["BambaForCausalLM", "Qwen3NextForCausalLM", "NemotronHForCausalLM"])
def test_paths_end_in_mixers_and_nothing_is_lost(name, by):
    """State spaces and linear attention add a vector that comes from no position in particular."""
    model = Model(tiny(name).hf)
    found = flow(model, model.inputs(IDS), by)
    mixers = [i for i, plan in enumerate(model.layers) if plan.has("attn.out") and not plan.has("attn.pattern")]
    assert [i for i, sums in enumerate(found.layers) if sums.mixer is not None] == mixers
    assert mixers
    for sums in (found.layers[i] for i in mixers):
        torch.testing.assert_close(sums.stays + sums.mixer, torch.ones(len(IDS)), rtol=0, atol=1e-4)
        assert sums.heads is None
    through = routes(found, len(IDS) - 1)
    mixed = sum(float(weights.sum()) for weights in through.mixer.values())
    assert float(through.states[0].sum()) + through.constant + mixed == pytest.approx(1, abs=1e-4)
    graph = information_flow(model, IDS, share=by, draws=0)
    assert f"mixers, which do not say from which tokens: {mixed:.3f}" in graph.notes
    kinds, names = graph.edge_columns["kind"], graph.nodes
    ends = {str(names[s]) for s, kind in zip(graph.source, kinds, strict=True) if kind == "mixer"}
    assert ends <= {f"L{i}.attn.out@{t}" for i in mixers for t in range(len(IDS))}
    assert ends.isdisjoint(map(str, names[graph.target]))
    assert graph.weight[kinds == "mixer"].sum() == pytest.approx(mixed, abs=1e-4)
    assert graph.check.holds
    assert graph.spec()


def test_a_model_without_heads_is_refused():
    with pytest.raises(UnsupportedError, match="no attention that ends in a softmax"):
        information_flow(Model(tiny("FalconMambaForCausalLM").hf), IDS)


@torch.no_grad()
def test_a_share_is_its_definition():
    """One head from one position, spelled out with the model's own matrices."""
    model = Model(tiny("LlamaForCausalLM").hf)
    trace = model.trace([IDS], want="L1.resid_pre, L1.resid_mid, L1.attn.pattern, L1.attn.v")
    c = trace["L1.attn.v"].shape[-1]
    o = model.hf.model.layers[1].self_attn.o_proj.weight
    n_heads, n_kv = trace["L1.attn.pattern"].shape[1], trace["L1.attn.v"].shape[2]
    t, y = 3, trace["L1.resid_mid"][0, 3]

    def brought(h, s):
        v = trace["L1.attn.v"][0, s, h * n_kv // n_heads]
        return trace["L1.attn.pattern"][0, h, t, s] * (o[:, h * c : (h + 1) * c] @ v)

    addends = [trace["L1.resid_pre"][0, t], *(brought(h, s) for s in range(t + 1) for h in range(n_heads))]
    near = [max(0.0, float(y.abs().sum() - (y - z).abs().sum())) for z in addends]
    sums = flow(model, model.inputs(IDS), "proximity").layers[1]
    assert float(sums.stays[t]) == pytest.approx(near[0] / sum(near), abs=1e-5)
    assert float(sums.heads[t, 2, 1]) == pytest.approx(near[1 + 2 * n_heads + 1] / sum(near), abs=1e-5)


def test_heads_that_carry_most_are_needed_on_town():
    model = load("town")
    held = [information_flow(model, p).proof for p in ("Ada Reed lives in", "Abel Nash plays")]
    for proof in held:
        assert proof.holds, str(proof)


def test_an_earlier_state_is_traced_from_what_it_could_see():
    found = information_flow(Model(tiny("LlamaForCausalLM").hf), IDS, position=2)
    assert max(found.node_columns["position"]) == 2
    assert found.proof is None
    with pytest.raises(SiteRangeError, match="9 is not there"):
        information_flow(Model(tiny("LlamaForCausalLM").hf), IDS, position=9)


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "MixtralForCausalLM"])
def test_folders_that_nobody_has_seen(name, tmp_path):
    tiny(name).hf.save_pretrained(tmp_path)
    found = information_flow(load(tmp_path), IDS)
    assert found.check.holds
    assert np.isfinite(found.weight).all()
    assert found.spec()["layer"]


def test_streams_that_are_no_sums_are_refused():
    with pytest.raises(UnsupportedError, match="norms the sum"):
        information_flow(Model(tiny("OpenAIGPTLMHeadModel").hf), IDS)
