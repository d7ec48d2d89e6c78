"""The certified top-k of real layers is what scoring every element through the whole vocabulary gives."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.ops.importance import Goal, top_elements
from cutaway.ops.parts import Level, Parts, take_apart
from cutaway.ops.readout import Head

NORMS = ("GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM")  # LayerNorm with biases, RMSNorm, soft cap
VOCABULARIES = (200, 1_000, 10_000, 50_000)
SIZES = (30.0, 3.0, 0.3)  # of the head: under the first one, heads move the answer by tens of nats
WAYS = (
    "Gemma3ForCausalLM",  # norms on what layers write, two kinds of attention
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",  # what layers write is multiplied, logits are divided
    "CohereForCausalLM",  # parallel, LayerNorm without bias
    "GPTNeoXForCausalLM",  # parallel, with biases
    "PhiForCausalLM",  # a head with a bias
    "BloomForCausalLM",
    "MixtralForCausalLM",  # experts
    "GptOssForCausalLM",  # experts with biases, sinks
    "DeepseekV3ForCausalLM",  # shared experts, latent attention
    "Gemma2ForCausalLM",
)
LEVELS: tuple[Level, ...] = ("neuron", "attention-neuron", "head", "head-position")
EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
COUNTS = (20, 15, 10, 5)  # cases per vocabulary
CASES = [(i, v) for i, v in enumerate(v for v, n in zip(VOCABULARIES, COUNTS, strict=True) for _ in range(n))]


@cache
def model(name: str, vocabulary: int, size: float) -> Model:
    hf = tiny(name, vocab_size=vocabulary, num_hidden_layers=2).hf
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(size)  # type: ignore[operator]
    return Model(hf)


def spelled_out(parts: Parts, head: Head, ids: list[int], rival: int | None = None) -> Tensor:
    """Every element's score in double precision, with the final norm's formula and the whole vocabulary at once."""
    norm, final = head.norm, parts.final.double()
    centred = final - final.mean(-1, keepdim=True) if norm.centres else final
    config = head.model.hf.config
    (eps,) = {float(getattr(config, name)) for name in EPSILONS if hasattr(config, name)}
    s = (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def logp(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if norm.centres else x
        z = (x / s * norm.gain.double() + norm.shift.double()) @ head.weight.double().T
        y = head.finish(z if head.bias is None else z + head.bias.double()).log_softmax(-1)
        return y[:, range(len(ids)), ids].sum(-1) if rival is None else y[:, 0, ids[0]] - y[:, 0, rival]

    found = []
    for group in parts.groups:
        layer = parts.layers[group.layer]
        base = (layer.x if group.kind == "attn.z" else layer.before_mlp).double()
        before = logp(base[None])
        for index in torch.arange(len(group)).split(200):
            found.append(logp(base + group.vectors(index).double()) - before)
    return torch.cat(found)


def compare(of: Model, prompt: Tensor, ids: list[int], level: Level, rival: int | None = None) -> None:
    parts = take_apart(of, of.inputs(prompt), len(ids), level)
    head = Head(of)
    found = top_elements(parts, Goal.of(head.frozen(parts.final, parts.logits), ids, rival), 5)
    brute = spelled_out(parts, head, ids, rival)
    best = brute.topk(5)
    assert found.certified
    assert found.total == len(brute)
    rounding = 1e-5 + 1e-6 * float(parts.logits.abs().max())  # of log-probabilities in single precision
    torch.testing.assert_close(found.scores.double(), best.values, rtol=1e-5, atol=rounding)
    named = [str(group.unit(i)) for group in parts.groups for i in range(len(group))]
    where = [named.index(str(unit)) for unit in found.units]
    torch.testing.assert_close(brute[where], best.values, rtol=1e-5, atol=rounding)
    assert bool((found.bounds.double() >= brute[where] * (1 - 1e-5) - rounding).all())


@torch.no_grad()
@pytest.mark.parametrize(("case", "vocabulary"), CASES)
def test_the_certified_set_is_that_of_brute_force(case: int, vocabulary: int) -> None:
    of = model(NORMS[case % 3], vocabulary, SIZES[case // 12 % 3])
    generator = torch.Generator().manual_seed(case)
    prompt = torch.randint(vocabulary, (1, 6), generator=generator)
    ids = torch.randint(vocabulary, (1 + case % 2,), generator=generator).tolist()
    compare(of, prompt, ids, LEVELS[case // 3 % 4])


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_build_a_layer(name: str, level: Level) -> None:
    of = model(name, 200, 3.0)
    prompt = torch.randint(200, (1, 6), generator=torch.Generator().manual_seed(0))
    compare(of, prompt, [11], level, rival=22)
    compare(of, prompt, [11, 22, 33], level)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "more"), [("Gemma2ForCausalLM", 1.0), ("Gemma3ForCausalLM", 1.0), ("Olmo2ForCausalLM", 0.0)]
)
def test_vectors_pass_the_norm_of_their_layers_output(name: str, more: float) -> None:
    """Neuron and head vectors by the post-norm's own formula, its scale that of the whole output."""
    of = model(name, 200, 3.0)
    layer = of.hf.get_submodule("model.layers.1")
    raw = {}
    matrices = {"mlp.act": layer.mlp.down_proj, "attn.z": layer.self_attn.o_proj}
    norms = {"mlp.act": layer.post_feedforward_layernorm, "attn.z": layer.post_attention_layernorm}
    hooks = [
        matrix.register_forward_hook(lambda _, args, out, kind=kind: raw.update({kind: (args[0][0, -1], out[0, -1])}))
        for kind, matrix in matrices.items()
    ]
    prompt = torch.tensor([[5, 9, 6, 7]])
    of(prompt)
    for hook in hooks:
        hook.remove()
    for level, kind in (("neuron", "mlp.act"), ("head", "attn.z")):
        (group,) = [g for g in take_apart(of, of.inputs(prompt), 1, level).groups if g.layer == 1]
        entered, out = raw[kind]
        s = (out.square().mean() + of.hf.config.rms_norm_eps).sqrt()
        single = entered[:, None] * matrices[kind].weight.T / s * (more + norms[kind].weight)
        expected = single.view(-1, group.width, single.shape[-1]).sum(1)
        torch.testing.assert_close(group.vectors(torch.arange(len(group)))[:, 0], expected, rtol=1e-4, atol=1e-6)
