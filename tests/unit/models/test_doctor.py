"""The doctor finds a lie: each claim turns to NO when what it claims is made untrue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cutaway.models import seers
from cutaway.models.doctor import Finding, doctor, examine
from cutaway.models.handle import Model
from cutaway.models.plan import Anatomy
from cutaway.models.sites import site_table
from cutaway.models.support import STATUSES, counts, examine_class, survey
from tests.architectures import ARCHITECTURES, fresh, inputs, model

Lie = Callable[[Model, pytest.MonkeyPatch], None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_claim_holds_of_an_honest_model(name: str) -> None:
    found = examine(fresh(name), inputs(name))
    assert [f for f in found if not f.holds] == []
    assert len(found) >= 7
    assert all(f.places for f in found)


def _with_layer(of: Model, i: int, **changes: Any) -> None:
    known = of.anatomy()
    layers = list(known.stacks[""])
    layers[i] = replace(layers[i], **changes)
    of._anatomy = replace(known, stacks={**known.stacks, "": tuple(layers)})


def _swapped_taps(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read = dict(of.layers[1].read)
    read["attn.out"], read["mlp.out"] = read["mlp.out"], read["attn.out"]
    _with_layer(of, 1, read=read)


def _another_output_matrix(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_layer(of, 0, w_out=of.layers[1].w_out)


def _another_head_matrix(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_layer(of, 0, w_o=of.layers[2].w_o)


def _patterns_of_other_heads(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    see = seers.AttentionSeer._see
    monkeypatch.setattr(
        seers.AttentionSeer, "_see",
        lambda self, kind, x, *rest, **kw: see(self, kind, x.roll(1, 1), *rest, **kw).roll(-1, 1)
        if kind == "pattern" else see(self, kind, x, *rest, **kw),
    )  # fmt: skip


def _patterns_that_do_not_sum_to_one(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    see = seers.AttentionSeer._see
    monkeypatch.setattr(
        seers.AttentionSeer, "_see",
        lambda self, kind, x, *rest, **kw: see(self, kind, x * 1.1 if kind == "pattern" else x, *rest, **kw),
    )  # fmt: skip


def _a_tail_without_its_norm(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    known: Anatomy = of.anatomy()
    of._anatomy = replace(known, tail=known.tail[1:])


def _reading_that_changes(of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    see = seers.AttentionSeer._see
    monkeypatch.setattr(
        seers.AttentionSeer, "_see",
        lambda self, kind, x, *rest, **kw: see(self, kind, x, *rest, **kw) * (1.001 if kind == "z" else 1),
    )  # fmt: skip


LIES: dict[str, tuple[Lie, str]] = {
    "swapped taps": (_swapped_taps, "resid_pre + attn.out + mlp.out == resid_post"),
    "another output matrix": (_another_output_matrix, "ablating a neuron == zeroing its outgoing weights"),
    "another head matrix": (_another_head_matrix, "ablating a head == zeroing its slice"),
    "patterns of other heads": (_patterns_of_other_heads, "pattern @ v == z"),
    "patterns too large": (_patterns_that_do_not_sum_to_one, "pattern rows sum to 1"),
    "a tail without its norm": (_a_tail_without_its_norm, "readout(last resid_post) == logits"),
    "reading that changes": (_reading_that_changes, "watched logits == unwatched logits"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = fresh("grouped-query")
    of.anatomy()
    tell, claim = LIES[lie]
    tell(of, monkeypatch)
    found = {f.claim: f for f in examine(of, inputs("grouped-query"))}
    assert not found[claim].holds
    table = doctor(of, inputs("grouped-query")).table().set_index("claim")
    assert table.loc[claim, "holds"] == "NO"
    assert table.loc[claim, "error"] > table.loc[claim, "tolerance"]


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    of = fresh("grouped-query")
    of.anatomy()
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: tuple(g * 1.5 for g in grad(*a, **k)))
    found = {f.claim: f for f in examine(of, inputs("grouped-query"))}
    assert not found["gradient == finite difference"].holds


def test_an_error_that_is_no_number_does_not_hold() -> None:
    assert not Finding("c", float("nan"), 1.0, 1).holds
    assert Finding("c", 1.0, 1.0, 1).holds


def test_an_intervention_on_experts_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    of = fresh("experts")
    of.anatomy()
    monkeypatch.setattr(seers, "gather_acts", lambda index, full: seers.scatter_acts(index, full[:, :2], 4)[:, :2] + 1)
    found = {f.claim: f for f in examine(of, inputs("experts"))}
    assert not found["silencing an expert's neurons == closing its gate"].holds


# -- the survey -------------------------------------------------------------------------------------------------------
def test_the_survey_says_verified_partly_or_why_not() -> None:
    pairs = [
        ("LlamaForCausalLM", "causal-lm"),
        ("LlavaForConditionalGeneration", "image-text-to-text"),
        ("MambaForCausalLM", "causal-lm"),
        ("NoSuchForCausalLM", "causal-lm"),
    ]
    found = {s.class_name: s for s in survey(pairs)}
    assert [s.status for s in found.values()] == ["verified", "verified", "partly", "cannot be built"]
    assert "attn.z" in found["MambaForCausalLM"].refused
    assert found["LlamaForCausalLM"].as_json() == {
        "class": "LlamaForCausalLM", "task": "causal-lm", "status": "verified", "refused": {}, "error": "",
    }  # fmt: skip
    assert "not among" in found["NoSuchForCausalLM"].error
    assert counts(found.values())["causal-lm"] == dict(zip(STATUSES, (1, 1, 1), strict=True))


def test_attention_by_named_products_and_streams_with_positions_first() -> None:
    named, first = (examine_class(name, "causal-lm") for name in ("ProphetNetForCausalLM", "XLNetLMHeadModel"))
    assert not named.error
    assert set(named.refused) == {"final_norm", "readout"}  # it predicts from a second stream
    for kind in ("resid_pre", "attn.out", "resid_post"):
        assert "not [batch, pos, d_model]" in first.refused[kind]


def test_a_class_whose_claims_fail_is_partly(monkeypatch: pytest.MonkeyPatch) -> None:
    see = seers.AttentionSeer._see
    monkeypatch.setattr(
        seers.AttentionSeer, "_see",
        lambda self, kind, x, *rest, **kw: see(self, kind, x * 1.1 if kind == "pattern" else x, *rest, **kw),
    )  # fmt: skip
    found = examine_class("LlamaForCausalLM", "causal-lm")
    assert found.status == "partly"
    assert "pattern rows sum to 1: error" in found.as_json()["error"]


def test_what_breaks_in_a_model_of_a_stranger_belongs_into_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a stranger's bug")

    monkeypatch.setattr("cutaway.models.handle.probe", broken)
    found = examine_class("LlamaForCausalLM", "causal-lm")
    assert (found.status, found.error) == ("partly", "ZeroDivisionError: a stranger's bug")


# -- the table of sites -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_of_sites_is_true(name: str) -> None:
    of, given = model(name), inputs(name)
    of.anatomy(given)
    table = site_table(of).table()
    listed = list(table["site"])
    assert len(listed) == len(set(listed))
    trace = of.trace(given, want=listed)
    assert {str(s) for s in trace} == set(listed)
    for _, row in table.iterrows():
        axes = [axis.partition("=") for axis in row["axes"].split(", ")]
        x = trace[row["site"]]
        assert tuple(axis[0] for axis in axes) == next(s for s in trace if str(s) == row["site"]).axes
        assert all(not axis[2] or int(axis[2]) == size for axis, size in zip(axes, x.shape, strict=True)), row["site"]
        if row["TransformerLens"]:
            assert torch.equal(trace[row["TransformerLens"]], x)
        assert row["equation"]
