"""What an intervention does equals what an edit of the weights, or a plain hook, does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.intervention import Add, Scale, Set, Swap, Zero
from cutaway.models.handle import Model
from cutaway.models.plan import Layer
from tests.architectures import ARCHITECTURES, IMAGE, WITH_EXPERTS, fresh, gap, inputs, model


def scopes(of: Model, name: str) -> Iterator[tuple[str, Layer]]:
    """Every layer whose output depends on nothing after it, with the prefix of its sites."""
    for scope, layers in of.anatomy(inputs(name)).stacks.items():
        for i, layer in enumerate(layers):
            yield (f"{scope}/" if scope else "") + f"L{i}.", layer


def rows_of(of: Model, path: str) -> Tensor:
    """[in, out] the weight of a linear module, as a view that may be written to."""
    module = of.hf.get_submodule(path)
    weight: Any = module.weight
    return weight.data if type(module).__name__ == "Conv1D" else weight.data.T


@contextmanager
def zeroed(*parts: Tensor) -> Iterator[None]:
    kept = [part.clone() for part in parts]
    for part in parts:
        part.zero_()
    try:
        yield
    finally:
        for part, was in zip(parts, kept, strict=True):
            part.copy_(was)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroing_heads_and_neurons_is_zeroing_what_they_write_with(name: str) -> None:
    of, given = fresh(name), inputs(name)
    seen = 0
    for at, layer in scopes(of, name):
        assert layer.attention is not None
        width = layer.attention.d_value
        for head in (0, layer.attention.heads - 1):
            ablated = of.trace(given, do=Zero(f"{at}attn.z[{head}]")).logits
            with zeroed(rows_of(of, layer.w_o)[head * width : (head + 1) * width]):
                assert gap(of(given), ablated) < 1e-5, (at, head)
        if layer.has("mlp.act"):
            ablated = of.trace(given, do=Zero(f"{at}mlp.act[3+40]")).logits
            with zeroed(*(rows_of(of, layer.w_out)[n : n + 1] for n in (3, 40))):
                assert gap(of(given), ablated) < 1e-5, at
            seen += 1
    assert seen or name in WITH_EXPERTS


@pytest.mark.parametrize("name", ["dense", "grouped-query", "parallel", "sliding-softcap", "experts", "no-interface"])
def test_zeroing_what_attention_adds_is_zeroing_its_output_matrix(name: str) -> None:
    of, given = fresh(name), inputs(name)
    for at, layer in scopes(of, name):
        module = of.hf.get_submodule(layer.w_o)
        parts = [p.data for p in module.parameters()]
        ablated = of.trace(given, do=Zero(f"{at}attn.out")).logits
        with zeroed(*parts):
            assert gap(of(given), ablated) < 1e-5, at


@pytest.mark.parametrize("name", ["dense", "grouped-query", "no-interface", "llava"])
def test_the_weight_of_a_neuron_is_what_adding_to_it_adds(name: str) -> None:
    of, given = model(name), inputs(name)
    plain = of.trace(given, want="L1.mlp.out, L1.attn.out")
    value = of.weight("L1.mlp.act[7]")
    assert value.shape == (1, 64)
    moved = of.trace(given, want="L1.mlp.out", do=Add("L1.mlp.act[7]", 0.5))["L1.mlp.out"]
    assert gap(moved - plain["L1.mlp.out"], (0.5 * value).expand_as(moved)) < 1e-4
    head = of.weight("L1.attn.z[2]")
    assert head.shape == (1, 16, 64)
    added = torch.linspace(-1, 1, 16)
    moved = of.trace(given, want="L1.attn.out", do=Add("L1.attn.z[2]", added))["L1.attn.out"]
    assert gap(moved - plain["L1.attn.out"], (added @ head[0]).expand_as(moved)) < 1e-4
    assert of.weight("L1.mlp.act").shape[0] == of.layers[1].d_mlp
    assert not of.weight("L1.mlp.act").requires_grad


# -- experts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_expert_neurons_are_what_the_experts_output_matrix_reads(name: str) -> None:
    of, given = fresh(name), inputs(name)
    layer = of.layers[1]
    experts: Any = of.hf.get_submodule(layer.experts)
    ablated = of.trace(given, do=Zero("L1.expert.act[1/5-9]")).logits
    down = experts.down_proj.data[1]
    with zeroed(down[5:10] if experts.is_transposed else down[:, 5:10]):
        assert gap(of(given), ablated) < 1e-5
    assert gap(ablated, of(given)) > 1e-7


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_closing_a_gate_is_zeroing_all_that_the_expert_writes(name: str) -> None:
    of, given = fresh(name), inputs(name)
    experts: Any = of.hf.get_submodule(of.layers[0].experts)
    trace = of.trace(given, want="L0.expert.gate, L0.expert.act")
    gate, act = trace["L0.expert.gate"], trace["L0.expert.act"]
    assert gap(gate.sum(-1), torch.ones(gate.shape[:2])) < 1e-5
    assert ((gate != 0).sum(-1) == 2).all()
    assert not act[gate == 0].any()
    for expert in range(4):
        closed = of.trace(given, do=Zero(f"L0.expert.gate[{expert}]")).logits
        parts = [experts.down_proj.data[expert]]
        parts += [experts.down_proj_bias.data[expert]] if getattr(experts, "has_bias", False) else []
        with zeroed(*parts):
            assert gap(of(given), closed) < 1e-5, expert


def test_what_the_experts_add_is_gates_times_neurons_times_output_matrices() -> None:
    of, given = model("experts"), inputs("experts")
    trace = of.trace(given, want="L1.expert.gate, L1.expert.act, L1.mlp.out")
    down: Tensor = of.hf.get_submodule(of.layers[1].experts).down_proj  # type: ignore[assignment]
    own = torch.einsum("bpe,bpen,edn->bpd", trace["L1.expert.gate"], trace["L1.expert.act"], down)
    assert gap(trace["L1.mlp.out"], own.detach()) < 1e-5


# -- vision -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", IMAGE)
def test_interventions_in_the_vision_tower_are_those_of_a_plain_hook(name: str) -> None:
    of, given = fresh(name), inputs(name)
    layers = of.anatomy(given).stacks["vision"]
    for i, layer in enumerate(layers):
        for kind, path in (("resid_post", layer.path), ("mlp.act", layer.w_out), ("attn.z", layer.w_o)):
            module, half = of.hf.get_submodule(path), 0.5

            def before(m: Any, args: Any, half: float = half) -> Any:
                return (args[0] * half, *args[1:])

            def after(m: Any, args: Any, out: Any, half: float = half) -> Any:
                return out * half if isinstance(out, Tensor) else (out[0] * half, *out[1:])

            out = kind == "resid_post"
            # in front of the hooks that transformers keeps its hidden states with
            handle = (
                module.register_forward_hook(after, prepend=True) if out else module.register_forward_pre_hook(before)
            )
            expected = of(given)
            handle.remove()
            found = of.trace(given, do=Scale(f"vision/L{i}.{kind}", half)).logits
            assert gap(found, expected) < 1e-6, (i, kind)


@pytest.mark.parametrize("name", IMAGE)
def test_projected_features_are_what_stands_at_the_image_positions(name: str) -> None:
    of, given = model(name), inputs(name)
    trace = of.trace(given, want="projector, L0.resid_pre@image, L0.resid_pre@text")
    assert torch.equal(trace["projector"], trace["L0.resid_pre@image"][0])
    assert trace["L0.resid_pre@text"].shape[1] == given.roles[0].count("text")
    count = given.roles[0].count("image")
    assert trace["projector"].shape == (count, 64)
    zeroed_features = of.trace(given, do=Zero("projector")).logits
    assert gap(zeroed_features, of.trace(given, do=Zero("L0.resid_pre@image")).logits) < 1e-6
    assert gap(zeroed_features, trace.logits) > 1e-4


@pytest.mark.parametrize("name", IMAGE)
def test_patterns_of_the_vision_tower_make_its_heads(name: str) -> None:
    of, given = model(name), inputs(name)
    for i in range(2):
        kinds = [f"vision/L{i}.attn.{k}" for k in ("pattern", "v", "z", "scores")]
        pattern, v, z, scores = (of.trace(given, want=kinds)[k] for k in kinds)
        assert gap(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z) < 1e-5
        assert gap(scores.softmax(-1), pattern) < 1e-5


def test_windows_of_a_vision_tower_lie_along_the_diagonal() -> None:
    of, given = model("qwen-vl"), inputs("qwen-vl")
    trace = of.trace(given, want="vision/L*.attn.pattern")
    windowed, full = trace.stack("vision/L*.attn.pattern")
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 4).bool()
    assert torch.equal(windowed[0] > 0, blocks.expand(4, -1, -1))
    assert bool((full > 0).all())


@pytest.mark.parametrize("name", IMAGE)
def test_one_image_may_be_patched_into_another_inside_the_tower(name: str) -> None:
    of = model(name)
    one, other = inputs(name), inputs(name, seed=5)
    source = of.trace(other, want="vision/L*.attn.q, vision/L*.attn.z, vision/L*.attn.pattern, vision/L*.resid_pre")
    plain = of.trace(one, want="vision/L0.attn.z")
    for kind in ("attn.q", "attn.z", "attn.pattern"):
        site = f"vision/L0.{kind}"
        found = of.trace(one, want=[site, "vision/L0.attn.z"], do=Swap(site, source))
        assert gap(found[site], source[site]) < 1e-6
        if kind == "attn.z":
            assert torch.equal(found["vision/L0.attn.z"], source["vision/L0.attn.z"])
        assert gap(found["vision/L0.attn.z"], plain["vision/L0.attn.z"]) > 1e-3
    swapped = of.trace(one, do=Set("vision/L0.resid_pre", source["vision/L0.resid_pre"])).logits
    assert gap(swapped, of(other)) < 1e-5
