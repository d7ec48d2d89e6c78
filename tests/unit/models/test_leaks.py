"""The model is left as it was: whatever ran, however it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cutaway.core.errors import CutawayError, InterventionError, SiteError
from cutaway.core.intervention import Add, Apply, Zero
from cutaway.models.doctor import doctor
from cutaway.models.handle import Model
from tests.architectures import ARCHITECTURES, every_site, fresh, inputs
from tests.traces import Traces

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)


class Stumble(Exception):
    """Raised by a user's own code."""


def stumble(*_: Any) -> Any:
    raise Stumble


def _trace(of: Model, name: str) -> None:
    given = inputs(name)
    of.trace(given, want=every_site(of, given), do=[Zero("L0.attn.z[0]"), Add("L*.resid_post@-1", 0.1)])


def _gradients(of: Model, name: str) -> None:
    given = inputs(name)
    of.trace(given, want=every_site(of, given), grad="logit: #11")


def _stopped(of: Model, name: str) -> None:
    of.trace(inputs(name), want="L0.attn.pattern", stop=True)


def _doing(of: Model, name: str) -> None:
    with of.doing(["zero L0.attn.pattern[0]", "zero L1.resid_post@-1"]), torch.no_grad():
        of.hf(**of._kwargs(inputs(name)))


def _doctor(of: Model, name: str) -> None:
    doctor(of, inputs(name))


def _broken_intervention(of: Model, name: str) -> None:
    with pytest.raises(Stumble):
        of.trace(inputs(name), want="L*.attn.z", do=Apply("L1.attn.scores", stumble))


def _refused_intervention(of: Model, name: str) -> None:
    with pytest.raises(InterventionError):
        of.trace(inputs(name), do=[Zero("L0.attn.q"), Apply("L1.attn.pattern", lambda x, where: x[..., :1])])


def _broken_block(of: Model, name: str) -> None:
    with pytest.raises(Stumble), of.doing([Zero("L*.attn.v"), Zero("embed")]):
        stumble()


def _refused_site(of: Model, name: str) -> None:
    with pytest.raises(SiteError):
        of.trace(inputs(name), want="L0.attn.z[99]")
    with pytest.raises(CutawayError), of.doing("zero L0.sae"):
        pass


def _broken_model(of: Model, name: str) -> None:
    handle = of.hf.get_submodule(of.layers[1].path).register_forward_hook(stumble)
    for _ in range(2):
        with pytest.raises(Stumble):
            of.trace(inputs(name), want="L*.attn.pattern, L*.attn.out, L*.resid_pre")
    handle.remove()


USES: list[Callable[[Model, str], None]] = [
    _trace, _gradients, _stopped, _doing, _doctor, _broken_intervention, _refused_intervention, _broken_block,
    _refused_site, _broken_model,
]  # fmt: skip


@EVERY
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.strip("_"))
def test_nothing_is_left_behind(name: str, use: Callable[[Model, str], None]) -> None:
    of = fresh(name)
    before = Traces.of(of.hf)
    plain = of(inputs(name))
    use(of, name)
    assert Traces.of(of.hf).differences(before) == []
    assert torch.equal(of(inputs(name)), plain)


@pytest.mark.parametrize("name", ["dense", "grouped-query", "no-interface", "experts", "qwen-vl"])
def test_a_model_in_training_stays_in_training_and_keeps_its_random_numbers(name: str) -> None:
    of = fresh(name)
    of.hf.train()
    of.hf.get_submodule(of.layers[0].path).eval()  # some modules train, some do not
    before = Traces.of(of.hf)
    given = inputs(name)
    torch.manual_seed(0)
    plain = of(given)
    after = torch.rand(1)
    again = Model(of.hf)
    torch.manual_seed(0)
    again.anatomy(given)
    watched = again.trace(given, want=every_site(again, given)).logits
    assert torch.equal(watched, plain)
    assert torch.equal(torch.rand(1), after)
    assert Traces.of(of.hf).differences(before) == []


@pytest.mark.parametrize("name", ["dense", "llava", "experts"])
def test_what_is_saved_is_the_same_before_and_after(name: str, tmp_path: Any) -> None:
    of = fresh(name)
    of.hf.save_pretrained(tmp_path / "before")
    for use in (_trace, _gradients, _doing, _broken_block):
        use(of, name)
    with of.doing("zero L0.attn.z[0]"):
        of.hf.save_pretrained(tmp_path / "within")
    of.hf.save_pretrained(tmp_path / "after")
    files = {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()}
    for folder in ("within", "after"):
        assert {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} == files


@EVERY
def test_hidden_states_that_a_user_asks_for_are_the_same_before_within_and_after(name: str) -> None:
    of = fresh(name)
    given = of._kwargs(inputs(name))
    with torch.no_grad():
        before = of.hf(**given, output_hidden_states=True).hidden_states
        of.trace(inputs(name), want="L*.resid_post, L*.attn.z", do=Zero("L1.attn.z"))
        after = of.hf(**given, output_hidden_states=True).hidden_states
        with of.doing(Add("L0.resid_post", 1.0)):
            within = of.hf(**given, output_hidden_states=True).hidden_states
    assert before is not None
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(within[0], before[0])
    assert torch.allclose(within[1], before[1] + 1)
