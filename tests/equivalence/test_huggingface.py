"""What Cutaway sees is what transformers returns: logits, hidden states, attentions, router logits, image features.

The other side is always another module with equal weights, which Cutaway never touched. Asking transformers for more
than logits leaves hooks behind, so a copy is asked and thrown away. Only eager attention returns patterns.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cutaway.core.inputs import Inputs
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny

TEXT = [
    "BloomForCausalLM", "CohereForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel",
    "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM",
    "GraniteForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM",
    "PhiForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
]  # fmt: skip
IMAGE = ["LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]
SOFTMAX = 1e-5  # a pattern of ours is worked out beside fused attention, theirs by eager attention
PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34]]


class Pair(NamedTuple):
    """A model and its inputs, the same module untouched, and what that returns with eager attention."""

    model: Model
    inputs: Inputs
    bare: nn.Module
    eager: Any


def run(hf: nn.Module, inputs: Inputs, **asked: bool) -> Any:
    module = copy.deepcopy(hf) if asked else hf
    with torch.no_grad():
        return module(**inputs.kwargs("cpu"), use_cache=False, **asked)


@cache
def built(name: str) -> tuple[Model, nn.Module, dict[str, Tensor]]:
    made = tiny(name, "causal-lm" if name in TEXT else "image-text-to-text")
    return Model(made.hf, name=name), copy.deepcopy(made.hf), dict(made.inputs)


def with_eager_attention(hf: nn.Module) -> nn.Module:
    twin = type(hf)._from_config(copy.deepcopy(hf.config), attn_implementation="eager", dtype=torch.float32)
    twin.load_state_dict(hf.state_dict())
    return twin.eval()


@cache
def pair(name: str, padding: str = "") -> Pair:
    model, bare, given = built(name)
    inputs = model.inputs(PROMPTS, padding_side=padding) if padding else model.inputs(given)
    eager = run(with_eager_attention(bare), inputs, output_attentions=True)
    return Pair(model, inputs, bare, eager)


CASES = [(name, side) for name in TEXT for side in ("", "left", "right")] + [(name, "") for name in IMAGE]
cases = pytest.mark.parametrize(("name", "padding"), CASES)


@cases
def test_logits_are_equal_to_the_bit(name: str, padding: str) -> None:
    model, inputs, bare, _ = pair(name, padding)
    plain = run(bare, inputs).logits
    assert torch.equal(model(inputs), plain)
    watched = model.trace(inputs, want="embed, L*.resid_pre, L*.attn.out, L*.mlp.out, L*.resid_post, final_norm")
    assert watched.logits is not None
    assert torch.equal(watched.logits, plain)


@cases
def test_hidden_states_are_the_residual_stream_to_the_bit(name: str, padding: str) -> None:
    model, inputs, bare, _ = pair(name, padding)
    states = run(bare, inputs, output_hidden_states=True).hidden_states
    trace = model.trace(inputs, want="L*.resid_pre, L*.resid_post, final_norm")
    assert len(states) == model.n_layers + 1
    for i in range(model.n_layers):
        assert torch.equal(trace[f"L{i}.resid_pre"], states[i])
        if i:
            assert torch.equal(trace[f"L{i - 1}.resid_post"], states[i])
    assert torch.equal(trace["final_norm"], states[-1])  # transformers puts the last one through the final norm


@cases
def test_attentions_are_the_patterns(name: str, padding: str) -> None:
    model, inputs, _, eager = pair(name, padding)
    trace = model.trace(inputs, want="L*.attn.pattern")
    assert len(eager.attentions) == model.n_layers
    for i, theirs in enumerate(eager.attentions):
        ours = trace[f"L{i}.attn.pattern"]
        assert ours.shape == theirs.shape
        for row, real in enumerate(inputs.real):  # what padding attends to means nothing
            near(ours[row][:, real][:, :, real], theirs[row][:, real][:, :, real])


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=SOFTMAX, atol=SOFTMAX)


@pytest.mark.parametrize(("name", "sums_to_one"), [("MixtralForCausalLM", True), ("Qwen3MoeForCausalLM", False)])
def test_expert_gates_are_the_routers_best_probabilities(name: str, *, sums_to_one: bool) -> None:
    model, inputs, bare, _ = pair(name)
    routers = run(bare, inputs, output_router_logits=True).router_logits
    trace = model.trace(inputs, want="L*.expert.gate")
    assert len(routers) == len(trace)
    for logits, gates in zip(routers, trace.values(), strict=True):
        best, which = logits.reshape(gates.shape).softmax(-1).topk(bare.config.num_experts_per_tok, dim=-1)
        kept = best / best.sum(-1, keepdim=True) if sums_to_one else best
        near(gates, torch.zeros_like(gates).scatter(-1, which, kept))


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"])
def test_image_hidden_states_are_the_projectors_output(name: str) -> None:
    model, inputs, bare, _ = pair(name)
    theirs = run(bare, inputs).image_hidden_states
    ours = model.trace(inputs, want="projector")["projector"]
    assert torch.equal(ours, theirs.reshape(ours.shape))


def test_the_vision_tower_by_itself_shows_the_same() -> None:
    model, inputs, bare, _ = pair("LlavaForConditionalGeneration")
    tower = with_eager_attention(bare).get_submodule("model.vision_tower")
    with torch.no_grad():
        theirs = tower(inputs.extra["pixel_values"], output_hidden_states=True, output_attentions=True)
    trace = model.trace(inputs, want="vision/L*.resid_pre, vision/L*.resid_post, vision/L*.attn.pattern")
    assert len(theirs.attentions) == len(model.anatomy().stacks["vision"])
    for i, pattern in enumerate(theirs.attentions):
        near(trace[f"vision/L{i}.attn.pattern"], pattern)
        near(trace[f"vision/L{i}.resid_pre"], theirs.hidden_states[i])
        near(trace[f"vision/L{i}.resid_post"], theirs.hidden_states[i + 1])
