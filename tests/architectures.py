"""The tiny architectures that tests share: one of each way to build a layer. Nothing here may be changed by a test."""

from __future__ import annotations

import copy
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.site import KINDS
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny


class Architecture(NamedTuple):
    """A class of transformers, and what is special about it."""

    class_name: str
    task: str = "causal-lm"


ARCHITECTURES = {
    "dense": Architecture("GPT2LMHeadModel"),
    "grouped-query": Architecture("LlamaForCausalLM"),
    "parallel": Architecture("GPTNeoXForCausalLM"),
    "sliding-softcap": Architecture("Gemma2ForCausalLM"),
    "experts": Architecture("MixtralForCausalLM"),
    "no-interface": Architecture("BloomForCausalLM"),
    "sinks": Architecture("GptOssForCausalLM"),
    "post-norm": Architecture("OpenAIGPTLMHeadModel"),
    "both-ways": Architecture("BertLMHeadModel"),
    "llava": Architecture("LlavaForConditionalGeneration", "image-text-to-text"),
    "qwen-vl": Architecture("Qwen2_5_VLForConditionalGeneration", "image-text-to-text"),
}
TEXT = [name for name, about in ARCHITECTURES.items() if about.task == "causal-lm"]
IMAGE = [name for name in ARCHITECTURES if name not in TEXT]
CAUSAL = [name for name in TEXT if name != "both-ways"]
WITH_EXPERTS = ["experts", "sinks"]
ROWS = ([70, 71, 72, 73, 74, 75, 76], [80, 81, 82, 83], [90, 91, 92, 93, 94, 95, 96, 97, 98])
PROMPT = ROWS[2]


@cache
def model(name: str) -> Model:
    """The shared model of an architecture, in float32."""
    about = ARCHITECTURES[name]
    return Model(tiny(about.class_name, about.task).hf, name=name)


@cache
def double(name: str) -> Model:
    """The same model in float64, for comparisons that leave little room for rounding."""
    hf = copy.deepcopy(model(name).hf).double()
    if name in WITH_EXPERTS:
        hf.set_experts_implementation("batched_mm")  # the default has no float64 kernel
    return Model(hf, name=f"{name} in float64")


def fresh(name: str) -> Model:
    """A copy that a test may change."""
    return Model(copy.deepcopy(model(name).hf), name=name)


def features(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of one plain call; with an image where the architecture takes one."""
    about = ARCHITECTURES[name]
    given = _features(about.class_name, about.task)
    if about.task == "causal-lm":
        return {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.long)}
    draw = torch.Generator().manual_seed(seed)
    pixels = given["pixel_values"]
    return given | ({"pixel_values": torch.randn(pixels.shape, generator=draw)} if seed else {})


@cache
def _features(class_name: str, task: str) -> dict[str, Tensor]:
    return tiny(class_name, task).inputs


def inputs(name: str, of: Model | None = None, seed: int = 0) -> Inputs:
    """Inputs of ``features``, in the precision of a model."""
    given = features(name, seed)
    dtype = of.dtype if of is not None else torch.float32
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    return (of or model(name)).inputs(given)


def kinds(of: Model, scope: str = "") -> list[str]:
    """The layered kinds that some layer of a scope has."""
    layers = of.anatomy().stacks[scope]
    return [k for k, about in KINDS.items() if about.layered and any(layer.has(k) for layer in layers)]


def every_site(of: Model, given: Inputs) -> list[str]:
    """Every site of a model on these inputs, as text."""
    anatomy = of.anatomy(given)
    scopes = [s for s in anatomy.stacks if not s or given.has_images]
    layered = [f"{scope}/L*.{k}" if scope else f"L*.{k}" for scope in scopes for k in kinds(of, scope)]
    return [*layered, *(k for k in anatomy.taps if k != "projector" or given.has_images)]


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
