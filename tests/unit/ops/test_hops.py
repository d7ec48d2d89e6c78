"""What positions bring and hand on, against the same sums with every vector made, on many ways to build a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.ops.hops import KEPT, Sources, sources
from cutaway.ops.importance import Baselines
from cutaway.ops.readers import value_reader
from cutaway.ops.writers import rows_of, writer

NAMES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "GPTNeoXForCausalLM",
    "GptOssForCausalLM",
    "MixtralForCausalLM",
)
IDS = [5, 9, 6, 7, 8, 4, 3]
VIA = [2, 4, 5, 6]


def slowly(model: Model, inputs: Inputs, found: Sources) -> Tensor:
    """[via, pos] carried: a vector for every pair of layers, written, read again, and written at the last position."""
    trace = model.trace(inputs, want=[f"L*.{kind}" for kind in (*KEPT, "attn.v")])
    groups = found.parts.groups
    bases = Baselines(found.goal, torch.stack([found.parts.layers[g.layer].x for g in groups]))
    written: list[Tensor] = []  # [pos, via, d] per layer
    total = torch.zeros(len(VIA), len(IDS))
    for n, group in enumerate(groups):
        x, pattern, z, out = (trace[f"L{group.layer}.{kind}"][0].float() for kind in KEPT)
        v = trace[f"L{group.layer}.attn.v"][0].float()
        shared = z.shape[1] // v.shape[1]
        rows, bias = rows_of(model, model.layers[group.layer].w_o)
        reads = value_reader(model, group.layer, x[VIA], v[VIA])
        for vectors in written:
            values = reads(vectors).unflatten(-1, (v.shape[1], -1)).repeat_interleave(shared, dim=2)
            looked = pattern[:, -1, VIA].T[None, :, :, None] * values
            added = group.writer((looked.flatten(2) @ rows.float())[:, :, None])
            total += (added[:, :, 0] @ bases.gradient[n, 0]).T
        moved = pattern[:, VIA].permute(2, 1, 0)[..., None] * v.repeat_interleave(shared, dim=1)[:, None]
        writes = writer(model, group.layer, "attn", z[VIA].flatten(1) @ rows.float(), bias, out[VIA])
        written.append(writes(moved.flatten(2) @ rows.float()))
    return total


@torch.no_grad()
@pytest.mark.parametrize("rival", [None, 22])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_making_every_vector_gives(name: str, rival: int | None) -> None:
    model = Model(tiny(name).hf)
    inputs = model.inputs([IDS])
    found = sources(model, inputs, VIA, target=11, rival=rival, exact=True)
    assert not found.missing
    assert found.error < 1e-5
    torch.testing.assert_close(found.carried, slowly(model, inputs, found), rtol=1e-4, atol=1e-5)
    assert found.exact is not None
    if rival is None:
        assert (found.exact <= found.direct + 1e-5).all()
    elif name != "Gemma2ForCausalLM":  # its soft cap bends the logits
        torch.testing.assert_close(found.exact, found.direct, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_brought_and_what_is_left_add_up() -> None:
    model = Model(tiny("LlamaForCausalLM").hf)
    found = sources(model, model.inputs([IDS]), VIA, target=11)
    image = [0, 1, 3]
    total = found.brought(image).sum() + found.left(image).sum()
    assert float(total) == pytest.approx(float(found.direct.sum()), abs=1e-5)
    assert found.carried[0, 3:].abs().max() == 0  # nothing is carried from what comes later


@torch.no_grad()
def test_a_layer_that_cannot_be_followed_is_named() -> None:
    model = Model(tiny("DeepseekV3ForCausalLM").hf)
    found = sources(model, model.inputs([IDS]), VIA)
    assert set(found.missing) == {0, 1, 2}
    assert not found.carried.any()
    assert found.direct.abs().max() > 0
