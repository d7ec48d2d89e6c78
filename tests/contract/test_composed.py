"""An explanation of every small architecture: what can be told is told, what cannot is left out with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import cutaway
from cutaway.explain import PARTS, explain
from cutaway.models.handle import Model
from tests import architectures
from tests.architectures import ARCHITECTURES
from tests.traces import Traces

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
PROMPT = "#5 #9 #6 #7 #8"


@EVERY
def test_every_architecture_is_explained_as_far_as_it_is_understood(name: str, tmp_path: Path) -> None:
    model: Model = architectures.model(name)
    explain(model, PROMPT, k=3)
    before = Traces.of(model.hf)
    told = explain(model, PROMPT, k=3)
    assert "lens" in told.parts
    assert told.parts.keys() | told.refused.keys() == {part for part in PARTS if part != "image_patches"}
    assert not [why for why in told.refused.values() if why.startswith("it broke")]
    assert bool(told.proofs) is ("heads" in told.parts)
    assert all(part.check is None or part.check.holds for part in told.parts.values())
    assert told.story
    assert cutaway.open(told.save(tmp_path / "told")) == told
    assert Traces.of(model.hf).differences(before) == []
