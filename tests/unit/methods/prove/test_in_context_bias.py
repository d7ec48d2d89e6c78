"""The closed form cancels the majority bias of the wired towers, and leaving positions out cancels recency."""

import math

import pytest
import torch

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.data import Labels
from cutaway.methods.locate.in_context_heads import in_context_heads
from cutaway.methods.prove.in_context_bias import in_context_bias
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.labelled import labelled, last_logits
from cutaway.ops.towers import recency_slope, without_positions
from cutaway.ops.units import Unit
from recipes import two_towers as towers

LABELS = ("foo", "bar")
TOWERS = "L1.attn.z[1-2]"


def alike(*counts):
    """Prompts whose examples are all of the asked kind, foo and bar so often."""
    return [towers.prompt(towers.demonstrations(f, b, same_cluster=True), "fox") for f, b in counts]


def rows(found):
    names = zip(found.columns["experiment"], found.columns["mitigation"], strict=True)
    return {
        key: {c: float(found.columns[c][n]) for c in ("accuracy", "lean", "attention slope")}
        for n, key in enumerate(names)
    }


def test_the_closed_form_cancels_the_majority_bias():
    table = rows(in_context_bias(load("two-towers"), alike((3, 1), (1, 4), (3, 2)), LABELS, sites=TOWERS))
    assert table["majority", "none"]["lean"] > 5
    assert abs(table["majority", "shortcut, weight in closed form"]["lean"]) < 1e-3
    assert abs(table["majority", "attention offset"]["lean"]) < 1e-3
    assert abs(table["majority", "contextual calibration"]["lean"]) < 1e-3
    fixed = table["majority", "shortcut, fixed weight 0.03"]["lean"]
    assert 0.8 < fixed / table["majority", "none"]["lean"] < 1  # tuned for other heads, it does not carry over


def test_one_prompt_leans_as_its_closed_form_says():
    model = load("two-towers")
    found = rows(in_context_bias(model, alike((3, 1)), LABELS, sites=TOWERS))
    logits = last_logits(model, model.inputs(alike((3, 1))[0]))
    margin = float(logits[model.token("foo")] - logits[model.token("bar")])
    assert found["majority", "none"]["lean"] == pytest.approx(margin, abs=1e-4)
    # margin = readout * kappa (n_f - n_b) / (n_f + n_b) / scale; with a = n_f / n_b - 1 on bar it is zero
    fixed = found["majority", "shortcut, fixed weight 0.03"]["lean"]
    assert fixed < margin
    share, added = (3 - 1) / 4, 0.03 * 3 / 4
    scale = margin / (towers.READOUT * towers.KAPPA * share)
    assert fixed == pytest.approx(towers.READOUT * towers.KAPPA * (share - added) * scale, rel=0.02)


def test_leaving_positions_out_removes_the_recency_slope():
    table = rows(in_context_bias(load("two-towers-recency"), alike((2, 2), (3, 3)), LABELS, sites=TOWERS))
    assert table["recency", "none"]["attention slope"] == pytest.approx(towers.SLOPE, abs=1e-3)
    assert table["recency", "positions left out"]["attention slope"] == pytest.approx(0, abs=1e-5)
    assert table["recency", "none"]["lean"] > 1
    assert table["recency", "positions left out"]["lean"] < 1e-2
    steady = rows(in_context_bias(load("two-towers"), alike((2, 2)), LABELS, sites=TOWERS))
    assert steady["recency", "none"]["attention slope"] == pytest.approx(0, abs=1e-5)


def test_heads_that_were_found_are_taken_and_no_others():
    model = load("two-towers")
    shown = alike((3, 1), (1, 4))
    mixed = [towers.prompt(towers.demonstrations(2, 2, same_cluster=False), word) for word in ("fox", "pear")]
    heads = in_context_heads(model, mixed, LABELS, draws=0)
    found = in_context_bias(model, shown, LABELS, ranking=heads)
    assert found.same_as(in_context_bias(model, shown, LABELS, sites=TOWERS), atol=1e-4).lines == ()
    assert "heads: L1.attn.z[1], L1.attn.z[2]" in found.notes[-1] or "L1.attn.z[2], L1.attn.z[1]" in found.notes[-1]


def test_trained_labels_run_through():
    shown = Labels().examples(3, shots=6)
    named = sorted({word for e in shown for word in e.prompt.split()[1::3]})
    found = in_context_bias(
        load("labels"),
        [e.prompt for e in shown],
        named,
        sites="L2.attn.z",
        gold=[e.answer.strip() for e in shown],
        orders=3,
    )
    assert found.check.holds
    table = rows(found)
    assert table["majority", "none"]["accuracy"] > 0.9
    assert all(math.isfinite(row["lean"]) for row in table.values())


@torch.no_grad()
def test_rotary_heads_are_scored_as_if_all_stood_in_one_place():
    model = Model(tiny("LlamaForCausalLM").hf)
    (prompt,) = labelled(model, model.inputs([70, 71, 80, 72, 73]), [71, 72], None)
    (change,) = without_positions(model, prompt, [Unit("attn.z", 1, 2)])
    attention = model.hf.model.layers[1].self_attn
    x = model.hf.model.layers[1].input_layernorm(model.trace(prompt.inputs, want="L1.resid_pre")["L1.resid_pre"][0])
    c, groups = attention.head_dim, attention.num_key_value_groups
    q = attention.q_proj(x)[-1, 2 * c : 3 * c]
    k = attention.k_proj(x)[:, (2 // groups) * c : (2 // groups + 1) * c]
    expected = (k @ q * attention.scaling).softmax(-1)
    torch.testing.assert_close(change.value[0, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_slope_is_found_behind_examples_and_orders():
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(5, generator=generator) for _ in range(4)]).float()
    own, order = torch.randn(5, generator=generator), torch.randn(4, generator=generator)
    log = 0.3 * places + own + order[:, None]
    assert recency_slope(log.exp(), places) == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "MixtralForCausalLM", "BloomForCausalLM"])
def test_folders_that_nobody_has_seen(name, tmp_path):
    tiny(name).hf.save_pretrained(tmp_path)
    shown = [[70, 71, 80, 72, 81, 71, 73], [74, 72, 75, 71, 76]]
    found = in_context_bias(load(tmp_path), shown, [71, 72], sites="L1.attn.z[0-1]", orders=3)
    assert found.check.holds
    told = ("recency", "positions left out") in rows(found)
    assert told is (name != "BloomForCausalLM")  # its positions are no input


def test_refusals():
    model = Model(tiny("BloomForCausalLM").hf)
    (prompt,) = labelled(model, model.inputs([70, 71, 80, 72, 73]), [71, 72], None)
    with pytest.raises(UnsupportedError, match="takes no position_ids"):
        without_positions(model, prompt, [Unit("attn.z", 1, 0)])
    with pytest.raises(ParameterError, match="neither is given"):
        in_context_bias(model, [[70, 71, 80, 72, 73]], [71, 72])
    with pytest.raises(ParameterError, match="name heads"):
        in_context_bias(model, [[70, 71, 80, 72, 73]], [71, 72], sites="L0.mlp.act[3]")
