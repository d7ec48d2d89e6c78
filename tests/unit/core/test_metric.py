"""Metrics against their definitions written out, and their text forms."""

from __future__ import annotations

import math

import pytest
import torch

from cutaway.core.errors import CutawayError, ParameterError
from cutaway.core.inputs import Inputs
from cutaway.core.metric import FORMS, Metric


class Words:
    """A vocabulary in which a word's id is its length, and ``#7`` is 7."""

    def token(self, text: str | int) -> int:
        text = str(text)
        return int(text[1:]) if text.startswith("#") and text[1:].isdigit() else len(text)


LOGITS = torch.linspace(-2, 3, 2 * 4 * 10).view(2, 4, 10).sin() * 3
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
GIVEN = Inputs(MASK, MASK, (("a",) * 4,) * 2, (("text",) * 4,) * 2)
LAST = torch.stack([LOGITS[0, 3], LOGITS[1, 2]])


def value(text: str) -> list[float]:
    return Metric.parse(text, Words())(LOGITS, GIVEN).tolist()


def chance(row: int, token: int) -> float:
    weights = [math.exp(float(x)) for x in LAST[row]]
    return weights[token] / sum(weights)


def test_each_is_its_definition() -> None:
    for b in range(2):
        assert value("logit: #3")[b] == pytest.approx(float(LAST[b, 3]))
        assert value("logit_diff: #3, #4")[b] == pytest.approx(float(LAST[b, 3] - LAST[b, 4]), abs=1e-6)
        assert value("logprob: #3")[b] == pytest.approx(math.log(chance(b, 3)), rel=1e-5)
        assert value("prob: #3")[b] == pytest.approx(chance(b, 3), rel=1e-5)
        assert value("loss: #3")[b] == pytest.approx(-math.log(chance(b, 3)), rel=1e-5)
        assert value("rank: #3")[b] == sum(float(x) > float(LAST[b, 3]) for x in LAST[b])
        assert value(f"accuracy: #{int(LAST[b].argmax())}")[b] == 1
        assert value(f"accuracy: #{int(LAST[b].argmin())}")[b] == 0
        entropy = -sum(chance(b, i) * math.log(chance(b, i)) for i in range(10))
        assert value("entropy")[b] == pytest.approx(entropy, rel=1e-5)
    assert value("logit: #3 @1") == LOGITS[:, 1, 3].tolist()
    assert value("logit: #3 @-2") == [float(LOGITS[0, 2, 3]), float(LOGITS[1, 1, 3])]


def test_kl_compares_with_a_reference_and_is_none_with_itself() -> None:
    kl = Metric("kl")
    with pytest.raises(ParameterError, match="nothing to compare with"):
        kl(LOGITS, GIVEN)
    assert kl.against(LAST[:, None])(LOGITS, GIVEN).tolist() == pytest.approx([0, 0], abs=1e-6)
    other = LAST.roll(1, -1)
    own = [
        sum(p * (math.log(p) - math.log(chance(b, i))) for i, p in enumerate(other[b].softmax(0).tolist()))
        for b in (0, 1)
    ]
    assert kl.against(other[:, None])(LOGITS, GIVEN).tolist() == pytest.approx(own, rel=1e-4)


def test_an_answer_is_scored_token_by_token_after_those_before_it() -> None:
    metric = Metric.parse("answer: #3, #5, #2", Words())
    row = GIVEN.row(0)
    longer = metric.prepare(row)
    assert longer.ids[0, -2:].tolist() == [3, 5]
    logits = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0))
    logp = logits.log_softmax(-1)[0]
    assert float(metric(logits, longer)[0]) == pytest.approx(float(logp[3, 3] + logp[4, 5] + logp[5, 2]), rel=1e-5)
    assert Metric.parse("answer: #3", Words()).prepare(row) is row


def test_metrics_keep_double_precision_and_lift_half() -> None:
    metric = Metric.parse("logprob: #3", Words())
    assert metric(LOGITS.double(), GIVEN).dtype == torch.float64
    assert metric(LOGITS.bfloat16(), GIVEN).dtype == torch.float32


@pytest.mark.parametrize(
    "text",
    [
        "logit: #3",
        "logit_diff: #1, #2",
        "entropy",
        "kl",
        "answer: a, bb, ccc",
        'logit: "a, b"',
        'logprob: " Paris" @3',
        "rank: x @-2",
    ],
)
def test_text_forms_read_back(text: str) -> None:
    metric = Metric.parse(text, Words())
    again = Metric.parse(str(metric), Words())
    assert (again.form, again.ids, again.position, again.words) == (
        metric.form,
        metric.ids,
        metric.position,
        metric.words,
    )


@pytest.mark.parametrize("word", ['say "hi"', "a\\b", 'tail\\"', " ", ",", "@3", "x@y", "a, b", '"', "ends "])
def test_strange_tokens_read_back(word: str) -> None:
    metric = Metric("logit", (1,), words=(word,))
    assert Metric.parse(str(metric), Words()).words == (word,)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("logit_dif: #1, #2", "did you mean 'logit_diff'"),
        ("logit", "it takes 1 tokens and got 0"),
        ("logit_diff: #1", "it takes 2 tokens and got 1"),
        ("entropy: #1", "got 1"),
        ("answer", "it takes some tokens and got 0"),
        ("", "does not read as one"),
    ],
)
def test_what_is_no_metric_says_why(text: str, found: str) -> None:
    with pytest.raises(ParameterError, match=found):
        Metric.parse(text, Words())


def test_a_position_outside_a_row_is_named() -> None:
    with pytest.raises(CutawayError, match="position 3 is not there"):
        value("logit: #1 @3")


@pytest.mark.parametrize("form", FORMS)
def test_each_has_a_unit_and_says_what_it_reads(form: str) -> None:
    ids = (1,) * (FORMS[form].n_tokens if FORMS[form].n_tokens is not None else 2)
    metric = Metric(form, ids)
    assert metric.unit
    assert metric.tokens_only is (form in ("logit", "logit_diff"))
