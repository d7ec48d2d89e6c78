"""Attention patterns against those that Hugging Face's eager attention gives out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cutaway import catalog
from cutaway.core.errors import SiteRangeError
from cutaway.results import Pattern
from tests.architectures import ARCHITECTURES, features, gap, inputs, model


def pattern(name: str, **params: Any) -> Pattern:
    found = catalog.run("attention_pattern", model(name), **{"prompt": inputs(name), **params})
    assert isinstance(found, Pattern)
    return found


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "no-interface"])
def test_it_is_what_eager_attention_gives_out(name: str) -> None:
    eager = copy.deepcopy(model(name).hf)
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        theirs = eager(**features(name), output_attentions=True).attentions
    found = pattern(name)
    assert len(theirs) == len(found.pattern) == 3
    for ours, own in zip(found.pattern, theirs, strict=True):
        assert gap(torch.tensor(ours), own[0]) < 1e-5
    assert found.check is not None
    assert found.check.holds


def test_without_the_interface_rows_sum_to_one_over_what_is_seen() -> None:
    found = pattern("no-interface")
    assert gap(torch.tensor(found.pattern).sum(-1), torch.ones(3, 4, 9)) < 1e-6
    assert not torch.tensor(found.pattern).triu(1).any()


def test_layers_and_heads_are_parts_of_the_whole() -> None:
    whole, part = pattern("grouped-query"), pattern("grouped-query", layers="-1", heads=[3, 1])
    assert (part.pattern == whole.pattern[[2]][:, [3, 1]]).all()
    assert part.labels["head"] == (3, 1)


@pytest.mark.parametrize("name", ["llava", "qwen-vl"])
def test_the_vision_tower_has_patterns_of_its_own(name: str) -> None:
    found = torch.tensor(pattern(name, tower="vision").pattern)
    assert gap(found.sum(-1), torch.ones(found.shape[:-1])) < 1e-6
    if name == "qwen-vl":  # windows of 4 patches attend among themselves in the first layer
        blocks = torch.block_diag(*[torch.ones(4, 4)] * 4)
        assert not (found[0] * (1 - blocks)).any()
        assert (found[0][:, blocks.bool()] > 0).all()


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(SiteRangeError, match="head 4 is not there: the valid heads are 0-3"):
        pattern("grouped-query", heads=[4])


def test_layers_are_those_of_the_tower_that_is_named() -> None:
    whole = pattern("llava", tower="vision")  # two layers, beside three of the language model
    assert (pattern("llava", tower="vision", layers="-1").pattern == whole.pattern[[1]]).all()
    with pytest.raises(SiteRangeError, match="valid layers are 0-1"):
        pattern("llava", tower="vision", layers="2")
