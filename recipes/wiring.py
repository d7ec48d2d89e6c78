"""Models wired by hand: components that read and write named directions of the residual stream.

A ``Blueprint`` says in words what a head or a neuron reads and writes ("reads subject:Ada, writes fact:Ada"). It is
then laid into a genuine Hugging Face model: every named direction becomes a row of one random rotation, so no
feature lies along an axis; every norm has a gain that is not one, and where the architecture has biases, a bias that
is not zero. Readers and biases are corrected for them, so the model computes what the blueprint says.

In the words of a blueprint a norm divides by ``s = sqrt(|x|^2 / width + eps)`` and does nothing else: under LayerNorm
the rotation leaves out the direction of all ones, along which each embedding has an offset that LayerNorm removes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Vector = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Head:
    """One attention head; each pair is (what is read, what it becomes).

    Attributes:
        match: pairs (read by the query, read by the key); each pair has its own channel of the head and adds
            ``query . x / s * key . x' / s' / sqrt(head width)`` to the score.
        move: pairs (read at the source, written at the destination), each through its own value channel.
    """

    match: Sequence[tuple[Vector, Vector]]
    move: Sequence[tuple[Vector, Vector]]


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """One neuron of a feed-forward layer: what it reads, what it writes, and under a gate what opens it."""

    reads: Vector
    writes: Vector
    gate: Vector | None = None


@dataclass(kw_only=True)
class Blueprint:
    """Words, directions and components of a decoder.

    Attributes:
        words: the vocabulary, in the order of token ids.
        embeddings: word -> its vector.
        positions: vector of each position (GPT-2 only).
        layers: how many.
        heads: {(layer, head): Head}. Under grouped queries the heads of a group share what they read at the source.
        neurons: {(layer, neuron): Neuron}.
        readout: word -> the vector that its logit reads after the final norm.
        prior: word -> constant added to its logit (only with biases).
        attention_bias, mlp_bias: vectors that each attention and feed-forward layer adds (only with biases).
        width, heads_per_layer, kv_heads, neurons_per_layer: the shape.
    """

    words: Sequence[str]
    embeddings: Mapping[str, Vector]
    layers: int
    width: int
    heads_per_layer: int
    neurons_per_layer: int
    kv_heads: int = 0
    positions: Sequence[Vector] = ()
    context: int = 32
    heads: dict[tuple[int, int], Head] = field(default_factory=dict)
    neurons: dict[tuple[int, int], Neuron] = field(default_factory=dict)
    readout: Mapping[str, Vector] = field(default_factory=dict)
    prior: Mapping[str, float] = field(default_factory=dict)
    attention_bias: Vector = field(default_factory=dict)
    mlp_bias: Vector = field(default_factory=dict)
    seed: int = 0

    @property
    def head_width(self) -> int:
        return self.width // self.heads_per_layer

    def directions(self) -> list[str]:
        """Every direction that something reads or writes, in order of first mention."""
        vectors: list[Vector] = [*self.embeddings.values(), *self.positions, self.attention_bias, self.mlp_bias]
        for head in self.heads.values():
            vectors += [v for pair in (*head.match, *head.move) for v in pair]
        for neuron in self.neurons.values():
            vectors += [neuron.reads, neuron.writes, neuron.gate or {}]
        vectors += list(self.readout.values())
        return list(dict.fromkeys(name for vector in vectors for name in vector))


class _Layout:
    """The rotation, the norms' gains and biases, and a blueprint's vectors as rows of numbers."""

    def __init__(self, blueprint: Blueprint, *, centred: bool) -> None:
        names = blueprint.directions()
        width = blueprint.width
        if len(names) > width - centred:
            raise ValueError(f"{len(names)} directions do not fit a width of {width}")
        random = np.random.default_rng(blueprint.seed)
        square = random.normal(size=(width, width))
        if centred:
            square[:, 0] = 1.0
        rows = np.linalg.qr(square)[0].T[int(centred) :]
        self.rows = dict(zip(names, rows, strict=False))
        self.width, self.random, self.centred = width, random, centred

    def row(self, vector: Vector) -> np.ndarray:
        return sum((value * self.rows[name] for name, value in vector.items()), np.zeros(self.width))

    def norm(self) -> tuple[np.ndarray, np.ndarray]:
        """A gain, and a bias (zero when the architecture has none)."""
        gain = self.random.uniform(0.5, 1.5, self.width)
        bias = self.random.normal(size=self.width) * 0.1 if self.centred else np.zeros(self.width)
        return gain, bias


def build(blueprint: Blueprint, family: str, **config: Any) -> Any:
    """The blueprint as a ``GPT2LMHeadModel``, ``LlamaForCausalLM`` or ``GemmaForCausalLM`` in fp32, in eval mode.

    Args:
        family: "gpt2" (LayerNorm with biases, learned positions), "llama" (RMSNorm, grouped queries, SiLU gate) or
            "gemma" (RMSNorm whose gain is 1 + w, scaled embeddings, GELU gate). Rotary positions turn so slowly in the
            channel that heads match with, that scores do not depend on position.
        config: further fields of the Hugging Face configuration.
    """
    builder = {"gpt2": _gpt2, "llama": _llama, "gemma": _llama}[family]
    return builder(blueprint, family, config).eval()


def _gpt2(plan: Blueprint, _: str, config: dict[str, Any]) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    layout = _Layout(plan, centred=True)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(plan.words),
            n_positions=plan.context,
            n_embd=plan.width,
            n_layer=plan.layers,
            n_head=plan.heads_per_layer,
            n_inner=plan.neurons_per_layer,
            tie_word_embeddings=False,
            **_special_ids(plan),
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            **config,
        )
    )
    state: dict[str, np.ndarray] = {}
    offset = layout.random.uniform(0.2, 0.4, (plan.context, 1))
    state["transformer.wte.weight"] = np.stack([layout.row(plan.embeddings[w]) for w in plan.words])
    blank: list[Vector] = [{}] * (plan.context - len(plan.positions))
    state["transformer.wpe.weight"] = np.stack([layout.row(v) for v in (*plan.positions, *blank)]) + offset
    for layer in range(plan.layers):
        at = f"transformer.h.{layer}"
        gain, bias = layout.norm()
        query, key, value, out = _attention(plan, layout, layer, slow=None)
        inward = np.concatenate([query, key, value]) / gain
        state |= {f"{at}.ln_1.weight": gain, f"{at}.ln_1.bias": bias}
        state |= {f"{at}.attn.c_attn.weight": inward.T, f"{at}.attn.c_attn.bias": -inward @ bias}
        state |= {f"{at}.attn.c_proj.weight": out.T, f"{at}.attn.c_proj.bias": layout.row(plan.attention_bias)}
        gain, bias = layout.norm()
        reads, writes, _gate = _neurons(plan, layout, layer)
        state |= {f"{at}.ln_2.weight": gain, f"{at}.ln_2.bias": bias}
        state |= {f"{at}.mlp.c_fc.weight": (reads / gain).T, f"{at}.mlp.c_fc.bias": -(reads / gain) @ bias}
        state |= {f"{at}.mlp.c_proj.weight": writes.T, f"{at}.mlp.c_proj.bias": layout.row(plan.mlp_bias)}
    gain = layout.norm()[0]
    head = np.stack([layout.row(plan.readout.get(w, {})) for w in plan.words]) / gain
    prior = np.array([plan.prior.get(w, 0.0) for w in plan.words])
    state |= {"transformer.ln_f.weight": gain, "transformer.ln_f.bias": np.linalg.pinv(head) @ prior}
    state["lm_head.weight"] = head
    return _load(model, state)


def _llama(plan: Blueprint, family: str, config: dict[str, Any]) -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

    layout = _Layout(plan, centred=False)
    shape: dict[str, Any] = {
        "vocab_size": len(plan.words),
        "hidden_size": plan.width,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads_per_layer,
        "num_key_value_heads": plan.kv_heads,
        "head_dim": plan.head_width,
        "intermediate_size": plan.neurons_per_layer,
        "max_position_embeddings": plan.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": SLOW_BASE},
        "tie_word_embeddings": False,
        **_special_ids(plan),
        **config,
    }
    gemma = family == "gemma"
    model = GemmaForCausalLM(GemmaConfig(**shape)) if gemma else LlamaForCausalLM(LlamaConfig(**shape))
    one, scale = (1.0, np.sqrt(plan.width)) if gemma else (0.0, 1.0)
    state: dict[str, np.ndarray] = {}
    state["model.embed_tokens.weight"] = np.stack([layout.row(plan.embeddings[w]) for w in plan.words]) / scale
    for layer in range(plan.layers):
        at = f"model.layers.{layer}"
        gain, _bias = layout.norm()
        query, key, value, out = _attention(plan, layout, layer, slow=plan.head_width - 1)
        state[f"{at}.input_layernorm.weight"] = gain - one
        for name, matrix in (("q", query), ("k", key), ("v", value)):
            state[f"{at}.self_attn.{name}_proj.weight"] = matrix / gain
        state[f"{at}.self_attn.o_proj.weight"] = out
        gain, _bias = layout.norm()
        reads, writes, gate = _neurons(plan, layout, layer)
        state[f"{at}.post_attention_layernorm.weight"] = gain - one
        state[f"{at}.mlp.up_proj.weight"], state[f"{at}.mlp.gate_proj.weight"] = reads / gain, gate / gain
        state[f"{at}.mlp.down_proj.weight"] = writes
    gain, _bias = layout.norm()
    state["model.norm.weight"] = gain - one
    state["lm_head.weight"] = np.stack([layout.row(plan.readout.get(w, {})) for w in plan.words]) / gain
    return _load(model, state)


EPS = {"gpt2": 1e-5, "llama": 1e-6, "gemma": 1e-6}  # of the norms
SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}

# With this base the slowest pair of a head turns by less than 1e-12 per position: nothing, in single precision.
SLOW_BASE = 1e15


def _attention(plan: Blueprint, layout: _Layout, layer: int, slow: int | None) -> tuple[np.ndarray, ...]:
    """Query, key, value (channel, width) and output (width, channel) matrices of a layer.

    ``slow``: the one channel that rotation leaves alone; then a head has one ``match`` at most.
    """
    width, size = plan.width, plan.head_width
    kv_heads = plan.kv_heads or plan.heads_per_layer
    query, out = np.zeros((plan.heads_per_layer, size, width)), np.zeros((plan.heads_per_layer, width, size))
    key, value = np.zeros((kv_heads, size, width)), np.zeros((kv_heads, size, width))
    for (at, h), head in plan.heads.items():
        if at != layer:
            continue
        group = h * kv_heads // plan.heads_per_layer
        if slow is not None and len(head.match) > 1:
            raise ValueError("under rotary positions a head matches through one channel")
        for channel, (asked, offered) in enumerate(head.match):
            query[h, channel if slow is None else slow] = layout.row(asked)
            key[group, channel if slow is None else slow] = layout.row(offered)
        for channel, (read, written) in enumerate(head.move):
            value[group, channel] = layout.row(read)
            out[h, :, channel] = layout.row(written)
    return query.reshape(-1, width), key.reshape(-1, width), value.reshape(-1, width), np.concatenate([*out], axis=1)


def _neurons(plan: Blueprint, layout: _Layout, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each neuron reads (neuron, width), writes (width, neuron) and is gated by (neuron, width)."""
    reads, writes, gate = (np.zeros((plan.neurons_per_layer, plan.width)) for _ in range(3))
    for (at, n), neuron in plan.neurons.items():
        if at == layer:
            reads[n], writes[n], gate[n] = map(layout.row, (neuron.reads, neuron.writes, neuron.gate or {}))
    return reads, writes.T, gate


def _special_ids(plan: Blueprint) -> dict[str, int]:
    return {f"{name}_token_id": plan.words.index(word) for name, word in SPECIAL.items()}


def _load(model: Any, state: Mapping[str, np.ndarray]) -> Any:
    wanted = {name for name, _ in model.named_parameters()}
    if wanted != set(state):
        raise ValueError(f"parameters not laid out: {sorted(wanted ^ set(state))}")
    model.load_state_dict({k: torch.tensor(v, dtype=torch.float32) for k, v in state.items()}, strict=False)
    return model
