"""Readers against what the layers themselves read, over ways to build a layer."""

import pytest
import torch

from cutaway.core.errors import UnsupportedError
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.ops.readers import expert_readers, mlp_readers, value_reader, value_row

IDS = [5, 9, 6, 7, 8]
NAMES = (
    "GPT2LMHeadModel",  # fused q, k, v; LayerNorm with shift; biases
    "LlamaForCausalLM",  # grouped query heads, gate
    "Gemma3ForCausalLM",  # gain 1 + w, norms on both sides
    "Qwen2ForCausalLM",  # biases of q, k, v alone
    "GPTNeoXForCausalLM",  # parallel, q, k, v interleaved by head
    "FalconForCausalLM",  # one key-value head behind all queries, parallel
    "Phi3ForCausalLM",  # fused q, k, v and fused gate and up
    "BloomForCausalLM",  # no attention interface
    "OPTForCausalLM",  # its MLP has no module of its own
    "Olmo2ForCausalLM",  # no norm in front
    "CodeGenForCausalLM",  # q, v, k in blocks
    "GraniteMoeForCausalLM",  # a fresh cache in between; experts
    "NemotronForCausalLM",  # gain 1 + w in a LayerNorm, squared ReLU
)


def _values(model, layer):
    trace = model.trace([IDS], want=[f"L{layer}.resid_pre", f"L{layer}.attn.v"])
    return trace[f"L{layer}.resid_pre"][0], trace[f"L{layer}.attn.v"][0]


def _mlp(model, layer):
    state = "resid_pre" if model.layers[layer].parallel else "resid_mid"
    kinds = (state, "mlp.in", "mlp.act")
    trace = model.trace([IDS], want=[f"L{layer}.{kind}" for kind in kinds])
    return [trace[f"L{layer}.{kind}"][0] for kind in kinds]


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_stream_sum_to_the_values(name):
    model = Model(tiny(name).hf)
    x, v = _values(model, 1)
    reader = value_reader(model, 1, x, v)
    parts = torch.stack([x / 3, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))])
    parts = torch.cat([parts, (x - parts.sum(0))[None]])
    torch.testing.assert_close(reader(parts).sum(0) + reader.constant, v.flatten(1), rtol=1e-4, atol=1e-5)
    keys = reader.keys([3, 0], 2)
    torch.testing.assert_close(keys.vectors @ x[2] + keys.constant, v.flatten(1)[2, [3, 0]], rtol=1e-4, atol=1e-5)
    g = torch.randn(v.flatten(1).shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((reader.pull(g) * x).sum(), (g * reader(x)).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if "Moe" not in name])
def test_sub_keys_share_the_activations_out(name):
    model = Model(tiny(name).hf)
    x, normed, act = _mlp(model, 1)
    readers = mlp_readers(model, 1, x, normed, act)
    torch.testing.assert_close(readers.activation(readers.read_up, readers.read_gate), act, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(readers.up(x) + readers.up.constant, readers.read_up, rtol=1e-4, atol=1e-5)
    keys = readers.keys(range(8), 4)
    torch.testing.assert_close(keys.vectors @ x[4] + keys.constant, act[4, :8], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_interleaved_and_grouped_channels_are_those_of_their_head():
    """Changing one head's rows of the fused matrix changes that head's values, and no other's."""
    neox = Model(tiny("GPTNeoXForCausalLM").hf)
    attention = neox.layers[1].attention
    rows = neox.layers[1].intakes["v"].rows
    width, heads = attention.d_head, attention.heads
    assert rows == tuple(h * 3 * width + 2 * width + c for h in range(heads) for c in range(width))
    llama = Model(tiny("LlamaForCausalLM").hf)
    plan = llama.layers[1]
    assert plan.attention.heads == 2 * plan.attention.kv_heads
    assert [value_row(plan, h, 5) for h in range(4)] == [5, 5, 21, 21]
    trace = llama.trace([IDS], want="L1.resid_pre, L1.attn.v, L1.attn.pattern, L1.attn.z")
    reader = value_reader(llama, 1, trace["L1.resid_pre"][0], trace["L1.attn.v"][0])
    read = reader(reader.states) + reader.constant
    z = trace["L1.attn.pattern"][0, 2, -1] @ read[:, value_row(plan, 2, 5)]
    assert float(z) == pytest.approx(float(trace["L1.attn.z"][0, -1, 2, 5]), abs=1e-5)


@torch.no_grad()
def test_the_two_factors_of_a_gate_share_equally():
    model = Model(tiny("LlamaForCausalLM").hf)
    x, normed, act = _mlp(model, 1)
    readers = mlp_readers(model, 1, x, normed, act)
    part = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0))
    share = readers.keys([7], 4).vectors @ part / act[4, 7]
    plain = normed[4] / x[4]  # an RMSNorm's gain over its scale
    mlp = model.hf.model.layers[1].mlp
    u, g = mlp.up_proj.weight[7] @ (plain * part), mlp.gate_proj.weight[7] @ (plain * part)
    whole_u, whole_g = mlp.up_proj.weight[7] @ normed[4], mlp.gate_proj.weight[7] @ normed[4]
    assert float(share) == pytest.approx(float((u / whole_u + g / whole_g) / 2), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "MixtralForCausalLM",
        "GptOssForCausalLM",  # gate and up interleaved, biases, one added to what comes up
        "Qwen3MoeForCausalLM",
        "GraniteMoeForCausalLM",
    ],
)
def test_sub_keys_of_experts_share_their_activations_out(name):
    model = Model(tiny(name).hf)
    kinds = ("resid_mid", "expert.gate", "expert.act")
    trace = model.trace([IDS], want=[f"L1.{kind}@-1" for kind in kinds])
    x, gate, act = (trace[f"L1.{kind}@-1"][0] for kind in kinds)
    routed = gate[0].nonzero().flatten().tolist()
    assert routed
    for expert in routed:
        readers = expert_readers(model, 1, expert, x, act[:, expert])
        assert readers.error < 1e-5
        keys = readers.keys(range(8), 0)
        torch.testing.assert_close(keys.vectors @ x[0] + keys.constant, act[0, expert, :8], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(readers.again(x, range(8))[0], act[0, expert, :8], rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedError, match="misses the activations"):
        expert_readers(model, 1, routed[0], x, act[:, routed[0]].flip(1))


def test_bfloat16_holds_within_its_rounding():
    model = Model(tiny("GPT2LMHeadModel").hf.bfloat16())
    assert value_reader(model, 1, *_values(model, 1)).error < 0.02


def test_what_is_no_matrix_of_the_stream_is_refused():
    deepseek = Model(tiny("DeepseekV3ForCausalLM").hf)
    with pytest.raises(UnsupportedError, match="more than a norm lies in between"):
        value_reader(deepseek, 1, *_values(deepseek, 1))
    mixtral = Model(tiny("MixtralForCausalLM").hf)
    x, v = _values(mixtral, 1)
    assert value_reader(mixtral, 1, x, v).error < 1e-5
    with pytest.raises(UnsupportedError, match="single output matrix"):
        mlp_readers(mixtral, 1, x, x, x)


def test_a_run_of_another_prompt_is_not_found_again():
    model = Model(tiny("LlamaForCausalLM").hf)
    x, v = _values(model, 1)
    with pytest.raises(UnsupportedError, match="misses what the layer read"):
        value_reader(model, 1, x.flip(0), v)
