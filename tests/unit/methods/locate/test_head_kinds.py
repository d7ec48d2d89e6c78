"""Kinds of heads against circuits wired by hand, and against the definitions spelled out."""

import numpy as np
import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import CutawayError, ParameterError
from cutaway.data import Labels
from cutaway.methods.locate.head_kinds import KINDS, head_kinds
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from cutaway.ops.ov import circuits
from cutaway.ops.relations import attention_by_chance, attention_on, label_signs, relations
from cutaway.ops.texts import labelled_tokens, plain_ids, repeated_tokens

NAMES = ("Ada", "Bea", "Cal", "Dot", "Eli", "Fay")


def kinds(found):
    """[layer, head] scores of every kind."""
    return dict(zip(KINDS, found.values, strict=True))


def prompts(name):
    return [example["prompt"] for example in specimens.card(name).examples]


def others(scores, *heads):
    """Scores of all heads but those named, by [layer][head]."""
    rest = scores.copy()
    for layer, head in heads:
        rest[layer, head] = np.nan
    return rest


def test_circuit_induction_is_told_on_random_tokens():
    found = head_kinds(load("circuit-induction"))
    score = kinds(found)
    assert score["previous token"][0, 0] > 0.99
    assert np.nanmax(others(score["previous token"], (0, 0))) < 0.2
    for kind in ("induction", "in-context", "copying"):
        assert score[kind][1, 1] > 0.99, kind
    assert np.nanmax(others(score["induction"], (1, 1))) < 0.2
    assert np.nanmax(np.abs(others(score["in-context"], (1, 1)))) < 1e-3
    assert np.isnan(others(score["copying"], (1, 1))).all()  # no other head writes what is read
    assert found.proof.holds, str(found.proof)
    assert found.proof.ks == (1,)
    assert found.check.holds


def test_circuit_ioi_is_told_on_its_own_sentences():
    """The duplicate-token head, the mover, and the head whose mark keeps the mover from the name said twice."""
    found = head_kinds(load("circuit-ioi"), prompts=prompts("circuit-ioi")[:12], labels=NAMES, prove="copying")
    score = kinds(found)
    assert score["duplicate token"][0, 3] > 0.99
    assert np.nanmax(others(score["duplicate token"], (0, 3))) < 0.2
    assert score["copying"][2, 2] > 0.99
    assert np.isnan(others(score["copying"], (2, 2))).all()
    assert score["in-context"][2, 2] > 0.99
    assert score["in-context"][1, 0] < -0.99
    assert found.proof.holds, str(found.proof)


def test_two_towers_read_labels_of_the_asked_cluster():
    """On random tokens they are no induction heads; on their own prompts both read labels in context, and copy."""
    model = load("two-towers")
    by_prompt = head_kinds(model, prompts=prompts("two-towers"), labels=("foo", "bar"), prove="in-context")
    score = kinds(by_prompt)["in-context"]
    assert score[1, 1] > 0.9
    assert score[1, 2] > 0.9
    assert np.abs(others(score, (1, 1), (1, 2)))[~np.isnan(others(score, (1, 1), (1, 2)))].max() < 0.05
    assert by_prompt.proof.holds, str(by_prompt.proof)
    by_chance = head_kinds(model)
    assert kinds(by_chance)["previous token"][0, 0] > 0.99
    assert by_chance.proof is None
    assert "no head is of kind 'induction'" in by_chance.notes[-1]


def test_recall_needs_a_previous_token_head_below_an_induction_head():
    score = kinds(head_kinds(load("recall-2")))
    assert score["previous token"][0].max() > 0.5
    assert score["previous token"][1].max() < 0.1
    assert score["induction"][1].min() > 0.6
    assert score["induction"][0].max() < 0.1
    assert score["copying"][1].min() > 0.95
    alone = kinds(head_kinds(load("recall-1"), draws=0))
    assert alone["induction"].max() < 0.1  # one layer cannot know what stood before a position


def test_trained_labels_are_read_by_the_last_layer():
    shown = Labels().examples(12, shots=8)
    named = sorted({word for e in shown for word in e.prompt.split()[1::3]})
    found = head_kinds(load("labels"), prompts=[e.prompt for e in shown], labels=named, prove="in-context")
    score = kinds(found)["in-context"]
    assert score[2].max() > 0.8
    assert score[2].min() > score[:2].max() + 0.2
    assert found.proof.holds, str(found.proof)


@torch.no_grad()
def test_a_copying_circuit_is_the_product_of_its_matrices():
    model = Model(tiny("GPT2LMHeadModel").hf)
    tokens = list(range(20, 60))
    found, missing = circuits(model, model.inputs([5, 9, 6]), model.inputs([[i] for i in tokens]))
    assert not missing
    hf, layer, head = model.hf.transformer, 1, 2
    block = hf.h[layer]
    e = hf.wte.weight[tokens] + hf.wpe.weight[0]
    v = (block.ln_1(e) @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)[2]
    c = found[layer].seen.shape[2]
    at = slice(head * c, head * c + c)
    written = v[:, at] @ block.attn.c_proj.weight[at]
    raised = ((written - written.mean(-1, keepdim=True)) * hf.ln_f.weight) @ model.hf.lm_head.weight[tokens].T
    circuit = raised - raised.mean(0)
    circuit = circuit - circuit.mean(1, keepdim=True)
    ours = found[layer].seen[head] @ found[layer].raised[head]
    ratio = ours / circuit
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-2, atol=0)  # one scale for all
    plain = torch.linalg.eigvals(ours)
    values = found[layer].eigenvalues()[head]
    assert float(values.abs().sum()) == pytest.approx(float(plain.abs().sum()), rel=1e-4)
    assert float(values.real.sum()) == pytest.approx(float(ours.diagonal().sum()), rel=1e-3)
    place = torch.stack([(row < row[i]).sum() - (row > row[i]).sum() for i, row in enumerate(ours)]).float()
    assert float(found[layer].own_place()[head]) == pytest.approx(float(place.mean()) / 39, abs=1e-5)
    assert float(found[layer].size[head]) == pytest.approx(float(ours.norm()), rel=1e-4)


def test_relations_are_what_their_names_say():
    model = Model(tiny("LlamaForCausalLM").hf)
    inputs = model.inputs([[7, 8, 7, 9, 8, 7], [7, 7, 9]], padding_side="left")
    before, same, behind = relations(inputs)
    assert before[0].nonzero().tolist() == [[1, 0], [2, 1], [3, 2], [4, 3], [5, 4]]
    assert same[0].nonzero().tolist() == [[2, 0], [4, 1], [5, 0], [5, 2]]
    assert behind[0].nonzero().tolist() == [[2, 1], [4, 2], [5, 1], [5, 3]]
    assert before[1].nonzero().tolist() == [[4, 3], [5, 4]]  # padding stands in no relation
    assert same[1].nonzero().tolist() == [[4, 3]]
    assert not behind[1].any()
    signs = label_signs(inputs, [8, 9], [8, 9])
    assert signs[0, 5].tolist() == [0, 1, 0, -1, 1, 0]
    pattern = model.trace(inputs, want="L1.attn.pattern")["L1.attn.pattern"]
    by_hand = torch.stack([pattern[0, :, q, k] for q, k in [[2, 0], [4, 1], [5, 0], [5, 2]]])
    total = by_hand.sum(0) + pattern[1, :, 4, 3]
    found = attention_on(model, inputs, [1], [same])[1][0]
    torch.testing.assert_close(found, total / 4)  # queries 2, 4, 5 of the first row and 4 of the second
    assert attention_by_chance(inputs, [same]) == pytest.approx([(1 / 3 + 1 / 5 + 2 / 6 + 1 / 2) / 4])


def test_random_texts_are_of_plain_tokens_and_fit():
    model = load("circuit-induction")  # 20 positions, and four tokens that are no text
    allowed = plain_ids(model)
    assert allowed == list(range(4, 20))
    generator = torch.Generator().manual_seed(0)
    said = repeated_tokens(model, allowed, 3, 25, generator)
    assert said.ids.shape == (3, 19)
    assert (said.ids[:, 1:10] == said.ids[:, 10:]).all()
    assert all(len(set(row[1:10].tolist())) == 9 for row in said.ids)
    asked, signs = labelled_tokens(model, allowed, 3, generator)
    for row, sign in zip(asked.ids.tolist(), signs[:, -1].tolist(), strict=True):
        label = row[row.index(row[-1]) + 1]
        assert {row[i] for i, s in enumerate(sign) if s == 1} == {label}
        assert {row[i] for i, s in enumerate(sign) if s == -1} == set(row[2::2]) - {label}


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_folders_that_nobody_has_seen(name, tmp_path):
    tiny(name).hf.save_pretrained(tmp_path)
    found = head_kinds(load(tmp_path), copying="place", tokens=64)
    assert found.check.holds
    assert not np.isnan(found.values).any()


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="no prompts are given"):
        head_kinds(model, labels=[11])
    with pytest.raises(CutawayError, match="none has more than one token"):
        head_kinds(model, prompts=[5])
    with pytest.raises(CutawayError, match="heads of"):
        head_kinds(Model(tiny("MambaForCausalLM").hf))
