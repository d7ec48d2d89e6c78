"""Two towers wired by hand are found and told apart; what they write is their own arithmetic."""

import numpy as np
import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import InputError, ParameterError
from cutaway.data import Labels
from cutaway.methods.locate.in_context_heads import EVERY, in_context_heads
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.labelled import again, labelled
from cutaway.ops.readout import Head
from cutaway.ops.towers import read
from recipes import two_towers as towers

LABELS = ("foo", "bar")
SIX = [example["prompt"] for example in specimens.card("two-towers").examples]


@pytest.mark.parametrize("name", ["two-towers", "two-towers-recency"])
def test_fooheads_and_barheads_are_found_exactly(name):
    truths = specimens.card(name).truths
    found = in_context_heads(load(name), SIX, LABELS)
    kinds = {item: kind for item, kind in zip(found.items, found.columns["kind"], strict=True) if kind}
    expected = dict.fromkeys(truths["fooheads"], "foo") | dict.fromkeys(truths["barheads"], "bar")
    assert kinds == expected
    assert found.items[:2].tolist().count(truths["previous-token head"]) == 0  # needed, but writes no label
    assert found.proof.holds, str(found.proof)
    assert found.proof.ks == (1, 2)
    assert found.check.holds


def test_queries_and_keys_decide_and_values_stay():
    found = in_context_heads(load("two-towers"), SIX, LABELS)
    columns = found.columns
    for row in (0, 1):
        assert columns["attention, asked"][row] > 0.9
        assert columns["attention, not asked"][row] < 0.1
        assert columns["writes, asked"][row] == pytest.approx(columns["writes, not asked"][row], rel=1e-3)
        assert columns["writes, asked"][row] > 1
        assert columns["margin drop, its label"][row] > 5
        assert columns["margin drop, other labels"][row] < 0  # without it the other label gains nothing: it helps
        assert columns["accuracy drop"][row] == pytest.approx(0.5)


@torch.no_grad()
def test_what_a_head_writes_is_its_matrices_times_the_state():
    model = load("two-towers")
    (prompt,) = labelled(model, model.inputs(SIX[0]), [model.token(" foo"), model.token(" bar")], None)
    assert model.decode(prompt.gold).strip() == "foo"
    reading = read(model, Head(model), prompt, [0, 1])
    block, final = model.hf.transformer.h[1], model.hf.transformer.ln_f
    trace = model.trace(prompt.inputs, want="L1.resid_pre, L1.resid_post, L1.attn.pattern")
    c, head = 32, 1
    at = slice(head * c, head * c + c)
    v = (block.ln_1(trace["L1.resid_pre"][0]) @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)[2]
    written = v[:, at] @ block.attn.c_proj.weight[at]
    last = trace["L1.resid_post"][0, -1]
    scale = (last.var(correction=0) + final.eps).sqrt()
    logits = (written - written.mean(-1, keepdim=True)) * final.weight / scale @ model.hf.lm_head.weight.T
    for n, (place, label) in enumerate(zip(prompt.places, prompt.labels, strict=True)):
        expected = logits[place, label] - logits[place, prompt.other(label)]
        assert float(reading.writes[1, head, n]) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
        assert float(reading.attention[1, head, n]) == pytest.approx(
            float(trace["L1.attn.pattern"][0, head, -1, place]), abs=1e-6
        )


def test_trained_labels_need_all_heads_of_the_last_layer():
    shown = Labels().examples(12, shots=8)
    named = sorted({word for e in shown for word in e.prompt.split()[1::3]})
    found = in_context_heads(load("labels"), [e.prompt for e in shown], named, gold=[e.answer.strip() for e in shown])
    kinds = dict(zip(found.items, found.columns["kind"], strict=True))
    assert {item for item, kind in kinds.items() if kind} == {f"L2.attn.z[{h}]" for h in range(4)}
    assert set(kinds.values()) <= {EVERY, "", *named}
    for row in range(4):
        assert found.columns["attention, asked"][row] > found.columns["attention, not asked"][row] + 0.5
    assert found.proof.effect[-1] > found.proof.random[:, -1].max()


def test_examples_are_cut_where_they_end():
    model = load("labels")
    prompt = "dog pell ; brass rask ; bear pell ; cat"
    ids = [model.token(" pell"), model.token(" rask")]
    (read_,) = labelled(model, model.inputs(prompt), ids, [ids[0]])
    words = [read_.inputs.tokens[0][a:b] for a, b in read_.shots]
    assert [[w.strip() for w in shot] for shot in words] == [
        ["dog", "pell", ";"],
        ["brass", "rask", ";"],
        ["bear", "pell", ";"],
    ]
    turned = again(model, read_, [2, 0])
    assert [t.strip() for t in turned.inputs.tokens[0] if t.strip() not in ("<s>",)] == (
        ["bear", "pell", ";", "dog", "pell", ";", "cat"]
    )
    assert turned.gold == read_.gold
    two = load("two-towers")
    (plain,) = labelled(two, two.inputs("cat foo pear bar dog"), [two.token("foo"), two.token("bar")], None)
    assert len(plain.shots) == 2
    assert towers.cluster(plain.inputs.tokens[0][-1].strip()) == "animal"


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"])
def test_folders_that_nobody_has_seen(name, tmp_path):
    tiny(name).hf.save_pretrained(tmp_path)
    rows = [[70, 71, 80, 72, 73], [74, 72, 75, 71, 76]]
    found = in_context_heads(load(tmp_path), rows, [71, 72], k=6)
    assert found.check.holds
    told = [bool(kind) for kind in found.columns["kind"]]
    assert told == sorted(told, reverse=True)  # those found come first
    assert (np.diff(found.scores[sum(told) :]) <= 1e-6).all()


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(InputError, match="prompt 1: it shows"):
        in_context_heads(model, [[70, 71, 80, 72, 73], [1, 2, 3, 4, 5]], [71, 72])
    with pytest.raises(ParameterError, match="1 for 2 prompts"):
        in_context_heads(model, [[70, 71, 80, 72, 73], [70, 72, 3, 71, 5]], [71, 72], gold=[71])
    wrong = [
        71 if p == 72 else 72 for p in [labelled(model, model.inputs([70, 71, 80, 72, 73]), [71, 72], None)[0].gold]
    ]
    with pytest.raises(ParameterError, match="none of 1 is answered rightly"):
        in_context_heads(model, [[70, 71, 80, 72, 73]], [71, 72], gold=wrong)
