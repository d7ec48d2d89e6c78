"""A model that remembers one prompt says what the model says, and runs it no more often than it must."""

from __future__ import annotations

import pytest
import torch

import cutaway
from cutaway.models.handle import Model
from cutaway.models.remembered import Remembered

PROMPT = "Ada plays"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every forward pass."""
    found: list[str] = []
    forward = Model._forward

    def counted(self: Model, inputs: object) -> object:
        found.append("run")
        return forward(self, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "_forward", counted)
    return found


def test_what_is_handed_out_is_what_a_run_sees(runs: list[str]) -> None:
    model = cutaway.load("planted-llama")
    inputs = model.inputs(PROMPT)
    seen = Remembered.of(model, inputs)
    seen.prefetch(inputs)
    n = len(runs)
    want = "L*.resid_pre@-1, L*.attn.out@0+2, L1.attn.z@-1, L*.attn.pattern@-1, L*.attn.v, L2.mlp.act@-1"
    found = seen.trace(PROMPT, want=want)
    assert len(runs) == n
    exact = model.trace(PROMPT, want=want)
    assert set(found) == set(exact)
    for site in exact:
        torch.testing.assert_close(found[site], exact[site], rtol=0, atol=0)
    torch.testing.assert_close(found.logits, exact.logits, rtol=0, atol=0)
    torch.testing.assert_close(seen(PROMPT), model(PROMPT), rtol=0, atol=0)
    assert seen.digest == model.digest
    assert seen.name == model.name


def test_the_model_is_run_for_what_was_not_seen_and_for_everything_else(runs: list[str]) -> None:
    model = cutaway.load("planted-llama")
    inputs = model.inputs(PROMPT)
    seen = Remembered.of(model, inputs)
    seen.prefetch(inputs)
    for extra in ({"want": "L0.attn.q"}, {"do": "zero L0.mlp.out"}, {"want": "L0.mlp.out", "grad": "entropy"}):
        n = len(runs)
        found, exact = seen.trace(PROMPT, **extra), model.trace(PROMPT, **extra)
        assert len(runs) == n + 2
        torch.testing.assert_close(found.logits, exact.logits, rtol=0, atol=0)
    n = len(runs)
    torch.testing.assert_close(seen("Bea plays"), model("Bea plays"), rtol=0, atol=0)
    assert len(runs) == n + 2


def test_who_listens_to_modules_hears_every_run(runs: list[str]) -> None:
    model = cutaway.load("planted-llama")
    inputs = model.inputs(PROMPT)
    seen = Remembered.of(model, inputs)
    seen.prefetch(inputs)
    heard = []
    handle = model.hf.get_submodule("model.layers.0").register_forward_hook(lambda *_: heard.append(1))
    seen.trace(PROMPT, want="L0.resid_pre")
    handle.remove()
    assert heard == [1]
    n = len(runs)
    seen.trace(PROMPT, want="L0.resid_pre")
    assert len(runs) == n
