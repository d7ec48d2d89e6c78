"""No key-value cache is built where a model can be told so, whichever way it takes the word."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from cutaway.core.inputs import Inputs
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny

AMONG_KEYWORDS = (
    ("LlavaForConditionalGeneration", "image-text-to-text"),
    ("Qwen3VLForConditionalGeneration", "image-text-to-text"),
    ("InternVLForConditionalGeneration", "image-text-to-text"),
    ("GraniteMoeForCausalLM", "causal-lm"),
)
"""Classes whose forward does not name ``use_cache``."""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose keys were put into a cache."""
    layers: list[int] = []
    update = DynamicCache.update

    def counted(self: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        layers.append(layer)
        return update(self, keys, values, layer, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", counted)
    return layers


def one_row(given: dict[str, Any]) -> Inputs:
    extra = dict(given)
    ids = extra.pop("input_ids")[:1]
    mask = extra.pop("attention_mask", torch.ones_like(ids))[:1]
    return Inputs(ids, mask, (("",) * ids.shape[1],), (("text",) * ids.shape[1],), extra)


@pytest.mark.parametrize(("name", "task"), AMONG_KEYWORDS)
def test_a_class_that_takes_it_among_other_keywords(name: str, task: str, written: list[int]) -> None:
    made = tiny(name, task)
    inputs = one_row(made.inputs)
    with torch.no_grad():
        bare = made.hf(**inputs.kwargs(torch.device("cpu"))).logits
    assert written, "this class builds no cache anyway"
    model = Model(made.hf)
    model.anatomy(inputs)
    written.clear()
    assert torch.equal(model(inputs), bare)
    assert torch.equal(model.trace(inputs, want="L*.resid_post").logits, bare)
    assert not written


class Swallowing(LlamaForCausalLM):
    """Takes keywords it does not know, and does something else when one is there."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        shift = 0.0 if kwargs.pop("use_cache", True) else 1.0
        out = super().forward(input_ids, attention_mask, use_cache=not shift)
        out.logits = out.logits + shift
        return out


class Refusing(LlamaForCausalLM):
    """Takes keywords, but not this one."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if kwargs:
            raise TypeError(f"unexpected {[*kwargs]}")
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("kind", [Swallowing, Refusing])
def test_a_class_that_it_would_change_is_left_alone(kind: type) -> None:
    hf = tiny("LlamaForCausalLM").hf
    hf.__class__ = kind
    model, ids = Model(hf), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        bare = hf(ids).logits
    assert torch.equal(model.trace(ids, want="L0.resid_post").logits, bare)
