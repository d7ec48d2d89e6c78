"""GPT-2 and Llama written out plainly from their weights, with a place to look and to intervene at every site."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

At = Callable[[str, Tensor], Tensor]
"""Called with a site's text and its tensor, in the axes of ``cutaway.core.site.KINDS``; gives what goes on."""


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int, at: At) -> Tensor:
    """[batch, pos, head, d] from [batch, pos, head, d], causal; keys and values may have fewer heads."""
    q, k, v = (at(f"L{layer}.attn.{name}", x) for name, x in (("q", q), ("k", k), ("v", v)))
    groups = q.shape[2] // k.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, key) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = at(f"L{layer}.attn.scores", scores.masked_fill(later, torch.finfo(scores.dtype).min))
    pattern = at(f"L{layer}.attn.pattern", scores.exp() / scores.exp().sum(-1, keepdim=True))
    return at(f"L{layer}.attn.z", torch.einsum("bhqk,bkhd->bqhd", pattern, value))


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gpt2(hf: Any, ids: Tensor, at: At) -> Tensor:
    """[batch, pos, vocab] logits."""
    core, config = hf.transformer, hf.config
    x = at("embed", core.wte.weight[ids]) + core.wpe.weight[: ids.shape[1]]
    for i, block in enumerate(core.h):
        x = at(f"L{i}.resid_pre", x)
        qkv = _layer_norm(x, block.ln_1) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.unflatten(-1, (config.n_head, -1)) for part in qkv.chunk(3, dim=-1))
        z = _attend(q, k, v, i, at).flatten(2)
        x = at(f"L{i}.resid_mid", x + at(f"L{i}.attn.out", z @ block.attn.c_proj.weight + block.attn.c_proj.bias))
        into = at(f"L{i}.mlp.in", _layer_norm(x, block.ln_2))
        wide = into @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
        act = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        out = at(f"L{i}.mlp.act", act) @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
        x = at(f"L{i}.resid_post", x + at(f"L{i}.mlp.out", out))
    return at("final_norm", _layer_norm(x, core.ln_f)) @ hf.lm_head.weight.T


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def _rotated(x: Tensor, theta: float) -> Tensor:
    """[batch, pos, head, d] with rotary positions: halves are the two coordinates of each plane."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1]).double()[:, None] * theta ** -(torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def llama(hf: Any, ids: Tensor, at: At) -> Tensor:
    """[batch, pos, vocab] logits."""
    core, config = hf.model, hf.config
    theta = config.rope_parameters["rope_theta"]
    x = at("embed", core.embed_tokens.weight[ids])
    for i, block in enumerate(core.layers):
        x = at(f"L{i}.resid_pre", x)
        normed, own = _rms_norm(x, block.input_layernorm), block.self_attn
        parts = (own.q_proj, own.k_proj, own.v_proj)
        q, k, v = ((normed @ part.weight.T).unflatten(-1, (-1, config.head_dim)) for part in parts)
        z = _attend(_rotated(q, theta), _rotated(k, theta), v, i, at).flatten(2)
        x = at(f"L{i}.resid_mid", x + at(f"L{i}.attn.out", z @ own.o_proj.weight.T))
        into = at(f"L{i}.mlp.in", _rms_norm(x, block.post_attention_layernorm))
        gate = into @ block.mlp.gate_proj.weight.T
        act = at(f"L{i}.mlp.act", gate * torch.sigmoid(gate) * (into @ block.mlp.up_proj.weight.T))
        x = at(f"L{i}.resid_post", x + at(f"L{i}.mlp.out", act @ block.mlp.down_proj.weight.T))
    return at("final_norm", _rms_norm(x, core.norm)) @ hf.lm_head.weight.T


REFERENCES = {"dense": gpt2, "grouped-query": llama}
