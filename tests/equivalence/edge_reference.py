"""GPT-2 and Llama written out plainly with an input of its own for every head's q, k and v, every MLP and the logits.

Edge attribution patching straight from its formula, and circuits run edge by edge: slow, and independent of the code
that is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.equivalence.reference import _attend, _layer_norm, _rms_norm, _rotated

Read = Callable[[str, str, Tensor], Tensor]
"""Called with (node, into, residual stream): what that receiver reads."""
Write = Callable[[str, Tensor], None]
"""Called with a sender's name and what it adds."""


def through(name: str, x: Tensor) -> Tensor:
    """No intervention."""
    return x


def gpt2(hf: Any, embed: Tensor, read: Read, write: Write) -> Tensor:
    """[batch, pos, vocab] logits of embeddings with positions [batch, pos, d]."""
    n_head, x = hf.config.n_head, embed
    size = x.shape[-1] // n_head
    write("embed", x)
    for i, block in enumerate(hf.transformer.h):
        weight, bias = block.attn.c_attn.weight.chunk(3, dim=1), block.attn.c_attn.bias.chunk(3)
        made: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for side, w, b in zip("qkv", weight, bias, strict=True):
            for h in range(n_head):
                own = slice(h * size, (h + 1) * size)
                normed = _layer_norm(read(f"L{i}.attn.z[{h}]", side, x), block.ln_1)
                made[side].append(normed @ w[:, own] + b[own])
        z = _attend(*(torch.stack(made[side], dim=2) for side in "qkv"), i, through)
        out = block.attn.c_proj.bias
        for h in range(n_head):
            written = z[:, :, h] @ block.attn.c_proj.weight[h * size : (h + 1) * size]
            write(f"L{i}.attn.z[{h}]", written)
            out = out + written
        x = x + out
        into = _layer_norm(read(f"L{i}.mlp.out", "", x), block.ln_2)
        out = block.mlp.act(into @ block.mlp.c_fc.weight + block.mlp.c_fc.bias) @ block.mlp.c_proj.weight
        out = out + block.mlp.c_proj.bias
        write(f"L{i}.mlp.out", out)
        x = x + out
    return _layer_norm(read("logits", "", x), hf.transformer.ln_f) @ hf.lm_head.weight.T


def llama(hf: Any, embed: Tensor, read: Read, write: Write) -> Tensor:
    """[batch, pos, vocab] logits of embeddings [batch, pos, d]; keys and values of a group are one receiver."""
    config, x = hf.config, embed
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    write("embed", x)
    for i, block in enumerate(hf.model.layers):
        own = block.self_attn
        made: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for side, proj, n in (("q", own.q_proj, heads), ("k", own.k_proj, groups), ("v", own.v_proj, groups)):
            for h in range(n):
                node = f"L{i}.attn.z[{h}]" if side == "q" or heads == groups else f"L{i}.attn.{side}[{h}]"
                normed = _rms_norm(read(node, side, x), block.input_layernorm)
                made[side].append(normed @ proj.weight[h * size : (h + 1) * size].T)
        q, k, v = (torch.stack(made[side], dim=2) for side in "qkv")
        z = _attend(_rotated(q, theta), _rotated(k, theta), v, i, through)
        for h in range(heads):
            written = z[:, :, h] @ own.o_proj.weight[:, h * size : (h + 1) * size].T
            write(f"L{i}.attn.z[{h}]", written)
        x = x + z.flatten(2) @ own.o_proj.weight.T
        into = _rms_norm(read(f"L{i}.mlp.out", "", x), block.post_attention_layernorm)
        gate = into @ block.mlp.gate_proj.weight.T
        out = gate * torch.sigmoid(gate) * (into @ block.mlp.up_proj.weight.T) @ block.mlp.down_proj.weight.T
        write(f"L{i}.mlp.out", out)
        x = x + out
    return _rms_norm(read("logits", "", x), hf.model.norm) @ hf.lm_head.weight.T


def gpt2_embed(hf: Any, ids: Tensor) -> Tensor:
    """[batch, pos, d]."""
    return hf.transformer.wte.weight[ids] + hf.transformer.wpe.weight[: ids.shape[1]]


def llama_embed(hf: Any, ids: Tensor) -> Tensor:
    """[batch, pos, d]."""
    return hf.model.embed_tokens.weight[ids]


MODELS = {"dense": (gpt2, gpt2_embed), "grouped-query": (llama, llama_embed)}


def outputs(name: str, hf: Any, ids: Tensor) -> dict[str, Tensor]:
    """What every sender writes in a run."""
    forward, embed = MODELS[name]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        forward(hf, embed(hf, ids), lambda node, into, x: x, found.__setitem__)
    return found


def eap_ig(
    name: str, hf: Any, clean: Tensor, corrupt: Tensor, measure: Callable[[Tensor], Tensor], points: list[float]
) -> dict[tuple[str, str, str], float]:
    """Score of every edge (sender, node, into), mean over rows: change of the sender times mean gradient."""
    forward, embed = MODELS[name]
    a, b = outputs(name, hf, clean), outputs(name, hf, corrupt)
    scores: dict[tuple[str, str, str], float] = {}
    for point in points:
        leaves: dict[tuple[str, str], Tensor] = {}
        before: dict[tuple[str, str], list[str]] = {}
        written: list[str] = []

        def read(
            node: str, into: str, x: Tensor, leaves: Any = leaves, before: Any = before, w: Any = written
        ) -> Tensor:
            leaves[node, into] = torch.zeros_like(x).requires_grad_()
            before[node, into] = list(w)
            return x + leaves[node, into]

        start = embed(hf, corrupt) + point * (embed(hf, clean) - embed(hf, corrupt))
        logits = forward(hf, start, read, lambda sender, _, w=written: w.append(sender))
        grads = torch.autograd.grad(measure(logits[:, -1]).sum(), list(leaves.values()))
        for (node, into), g in zip(leaves, grads, strict=True):
            for sender in before[node, into]:
                key = (sender, node, into)
                scores[key] = scores.get(key, 0.0) + float(((b[sender] - a[sender]) * g).sum())
    return {key: value / len(points) / len(clean) for key, value in scores.items()}


def circuit(name: str, hf: Any, clean: Tensor, replaced: dict[str, Tensor], edges: set[tuple[str, str, str]]) -> Tensor:
    """[batch, vocab] last logits when only these edges carry the run and the others what ``replaced`` holds."""
    forward, embed = MODELS[name]
    now: dict[str, Tensor] = {}

    def read(node: str, into: str, x: Tensor) -> Tensor:
        for sender, out in now.items():
            if (sender, node, into) not in edges:
                x = x - out + replaced[sender]
        return x

    with torch.no_grad():
        return forward(hf, embed(hf, clean), read, now.__setitem__)[:, -1]
