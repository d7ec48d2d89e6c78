"""Every way to read the residual stream, against the same done by hand: run with the sender's change where the layer
reads, keep what one head (or the MLP) makes of it, and put that alone into a plain run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Apply
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.ops.circuit_runs import CircuitRuns
from cutaway.ops.edge_scores import edge_scores
from cutaway.ops.fronts import Front, read_fronts
from cutaway.ops.pairs import Pairs
from cutaway.ops.senders import Senders
from cutaway.ops.wiring import Receiver, Wiring

CLEAN = torch.tensor([[70, 71, 72, 73, 74, 75], [80, 81, 82, 83, 84, 85]])
CORRUPT = torch.tensor([[70, 90, 72, 93, 74, 75], [80, 81, 95, 83, 84, 11]])
ONE_MATRIX = ["GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "BloomForCausalLM"]
ONE_MATRIX += ["HyperCLOVAXForCausalLM"]  # multiplies what it normed
NORMED_TOGETHER = ["Olmo2ForCausalLM", "OlmoeForCausalLM", "MiniMaxM2ForCausalLM"]
LATENT = ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "MiniCPM3ForCausalLM"]
NORMED_STREAM = ["BertLMHeadModel", "OpenAIGPTLMHeadModel", "BartForCausalLM"]
GATED = ["AfmoeForCausalLM", "LagunaForCausalLM"]
EVERY = pytest.mark.parametrize("name", [*ONE_MATRIX, *NORMED_TOGETHER, *LATENT, *NORMED_STREAM, *GATED])


class Ready(NamedTuple):
    model: Model
    pairs: Pairs
    wiring: Wiring
    fronts: list[Front]

    def change(self, sender: int, receiver: Receiver) -> Tensor:
        """[row, pos, d] how what the sender has in the stream that the receiver reads changes."""
        return held(self, self.pairs.corrupt, receiver)[sender] - held(self, self.pairs.clean, receiver)[sender]


@cache
def ready(name: str) -> Ready:
    hf = copy.deepcopy(tiny(name).hf).double()
    if hasattr(hf, "set_experts_implementation"):
        hf.set_experts_implementation("batched_mm")  # the default has no float64 kernel
    model = Model(hf, name=name)
    pairs = Pairs.of(model.inputs(CLEAN), model.inputs(CORRUPT), model.metric("logit_diff: #11, #22"))
    wiring = Wiring.of_model(model, pairs.clean)
    return Ready(model, pairs, wiring, read_fronts(model, pairs.clean, wiring))


@cache
def run(name: str, corrupt: bool) -> tuple[Tensor, Any]:
    """([sender, row, pos, d] what is written, the stream everywhere)."""
    of = ready(name)
    inputs = of.pairs.corrupt if corrupt else of.pairs.clean
    kinds = ["resid_pre", "attn.out", "mlp.out", "resid_post"]
    kinds += [] if any(of.wiring.parallel) else ["resid_mid"]
    states = of.model.trace(inputs, want=[f"L*.{kind}" for kind in kinds])
    return Senders(of.model, of.wiring).run(inputs)[0].outs, states


def held(of: Ready, inputs: Inputs | None, receiver: Receiver) -> Tensor:
    """What senders have in the stream that a receiver reads: as written, but for layer norms of the stream itself."""
    outs, states = run(of.model.name, inputs is of.pairs.corrupt)
    outs = outs.clone()
    for i, layer in enumerate(of.model.layers):
        for part, before, after in (("attn", "resid_pre", "resid_mid"), ("mlp", "resid_mid", "resid_post")):
            if (i, part) > (receiver.layer, "") and not (part == "attn" and i == receiver.layer and not receiver.into):
                return outs
            if part in layer.norms:
                norm: Any = of.model.hf.get_submodule(layer.norms[part])
                total = states[f"L{i}.{before}"] + states[f"L{i}.{part}.out"]
                scale = (total.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
                n = of.wiring.first(i) + of.wiring.heads[i] + (part == "mlp")
                outs[1:n] = norm.weight * (outs[1:n] - outs[1:n].mean(-1, keepdim=True)) / scale
                outs[0] = states[f"L{i}.{after}"] - outs[1:n].sum(0)
    return outs


def sampled(of: Ready, layer: int) -> list[tuple[int, int]]:
    """(sender, receiver) for each side and the MLP of a layer: its last head, and a head, an MLP or the embedding.

    Without queries where heads are gated: the gate reads what they read.
    """
    wiring, sides = of.wiring, "kv" if of.fronts[layer].gate else "qkv"
    receivers = [*(wiring.side(layer, side)[-1] for side in sides), wiring.block(layer).stop]
    return [(sender, r) for r in receivers for sender in (0, 2, wiring.first(layer) - 1)]


def place(of: Ready, receiver: Receiver) -> tuple[str, str]:
    """(where the receiver reads, where what it makes can be replaced)."""
    i = receiver.layer
    if receiver.into:
        return f"L{i}.resid_pre", f"L{i}.attn.{receiver.into}"
    return f"L{i}.resid_pre" if of.wiring.parallel[i] else f"L{i}.resid_mid", f"L{i}.mlp.out"


def makes(of: Ready, receiver: Receiver, change: Tensor) -> Tensor:
    """What the receiver's site holds when the stream it reads is changed."""
    reads, site = place(of, receiver)
    return of.model.trace(of.pairs.clean, want=site, do=[Add(reads, change)])[site]


def own(x: Tensor, receiver: Receiver) -> Tensor:
    """The receiver's part of a site."""
    return x[:, :, receiver.number] if receiver.into else x


def value(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits[:, -1, 11] - logits[:, -1, 22]


@EVERY
def test_the_front_is_found(name: str) -> None:
    asked = {tuple(front.asked) for front in ready(name).fronts}
    assert all(bool(front.gate) == (name in GATED) for front in ready(name).fronts)
    if name in ONE_MATRIX + NORMED_STREAM + GATED:
        assert asked == {()}
    elif name in NORMED_TOGETHER:
        assert asked == {("q", "k")}
    else:
        assert all({"k", "v"} <= set(each) for each in asked)


@EVERY
def test_a_corrupt_edge_is_the_intervention_by_hand(name: str) -> None:
    of = ready(name)
    chosen = sampled(of, 1)
    keep = torch.as_tensor(of.wiring.real).repeat(len(chosen), 1, 1)
    for row, (sender, receiver) in enumerate(chosen):
        keep[row, sender, receiver] = False
    runs = CircuitRuns(of.model, of.pairs, of.wiring, of.fronts)
    ours = runs(keep) - runs.clean
    theirs = []
    for sender, number in chosen:
        receiver = of.wiring.receivers[number]
        made = own(makes(of, receiver, of.change(sender, receiver)), receiver)

        def put(x: Tensor, where: Any, receiver: Receiver = receiver, made: Tensor = made) -> Tensor:
            new = x.clone()
            own(new, receiver).copy_(made)
            return new

        changed = of.model.trace(of.pairs.clean, do=[Apply(place(of, receiver)[1], put)])
        theirs.append(value(changed.logits) - value(of.model.trace(CLEAN).logits))
    expected = torch.stack(theirs).float()
    assert bool((expected.abs() > 1e-7).any(dim=1).float().mean() > 0.5)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@EVERY
def test_a_score_is_the_slope_of_the_metric_along_its_edge(name: str) -> None:
    of = ready(name)
    found = edge_scores(of.model, of.pairs, of.wiring, of.fronts, [1.0])
    assert found.error < 1e-5
    ours, theirs = [], []
    for sender, number in sampled(of, 1):
        receiver = of.wiring.receivers[number]
        reads, site = place(of, receiver)
        gradient = own(of.model.trace(of.pairs.clean, want=site, grad="logit_diff: #11, #22").grads[site], receiver)
        length = torch.zeros((), requires_grad=True)
        change = of.change(sender, receiver)
        move = Apply(reads, lambda x, where, change=change, length=length: x + length * change)
        made = own(of.model.trace(of.pairs.clean, want=site, do=[move], grad=True)[site], receiver)
        (slope,) = torch.autograd.grad((gradient * made).sum(), length)
        theirs.append(float(slope) / len(CLEAN))
        ours.append(float(found.scores[sender, number]))
    size = max(map(abs, theirs))
    assert size > 0
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5 * size)


@EVERY
def test_all_edges_are_the_run_and_none_the_corrupt_one(name: str) -> None:
    of = ready(name)
    runs = CircuitRuns(of.model, of.pairs, of.wiring, of.fronts)
    for found, ids in ((runs.clean, CLEAN), (runs.corrupt, CORRUPT)):
        expected = value(of.model.trace(ids).logits).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [NORMED_TOGETHER[0], LATENT[0], NORMED_STREAM[1], GATED[1]])
def test_rows_of_unequal_length_are_as_they_are_alone(name: str) -> None:
    of = ready(name)
    clean, corrupt = ([[70, 71, 72, 73, 74, 75], [80, 81, 82]], [[70, 90, 72, 93, 74, 75], [80, 95, 82]])
    metric = of.model.metric("logit_diff: #11, #22")
    keep = torch.rand(3, *of.wiring.real.shape, generator=torch.Generator().manual_seed(0)) < 0.5

    def found(rows: slice) -> tuple[Tensor, Tensor]:
        pairs = Pairs.of(of.model.inputs(clean[rows]), of.model.inputs(corrupt[rows]), metric)
        scores = edge_scores(of.model, pairs, of.wiring, of.fronts, [0.5, 1.0]).scores
        return scores, CircuitRuns(of.model, pairs, of.wiring, of.fronts)(keep)

    scores, values = found(slice(2))
    alone = [found(slice(row, row + 1)) for row in range(2)]
    torch.testing.assert_close(scores, (alone[0][0] + alone[1][0]) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values, torch.cat([each for _, each in alone], dim=1), rtol=1e-4, atol=1e-6)


def test_a_stream_that_the_model_changes_between_its_layers_is_refused() -> None:
    built = tiny("IdeficsForVisionText2Text", "image-text-to-text")
    model = Model(built.hf, name="idefics")
    inputs = model.inputs(dict(built.inputs))
    with pytest.raises(UnsupportedError, match="between layers 0 and 1 it computes something from the stream"):
        read_fronts(model, inputs, Wiring.of_model(model, inputs))


@contextmanager
def gates(of: Ready, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What Afmoe's heads are gated with, [row, pos, head * d_head] before the sigmoid, goes through ``change``."""
    module = of.model.hf.get_submodule(f"{of.model.layers[layer].path}.self_attn.gate_proj")
    handle = module.register_forward_hook(lambda _, given, out: change(out))
    try:
        yield
    finally:
        handle.remove()


def test_a_gate_reads_what_its_query_reads() -> None:
    of, seen = ready("AfmoeForCausalLM"), dict[str, Tensor]()
    sender, number = 2, of.wiring.side(1, "q")[-1]
    receiver = of.wiring.receivers[number]
    change, site = of.change(sender, receiver), "L1.attn.q"
    size = of.model.layers[1].attention.d_value  # type: ignore[union-attr]
    columns = slice(receiver.number * size, (receiver.number + 1) * size)

    def keep(name: str, leaf: bool = False) -> Callable[[Tensor], Tensor]:
        def kept(x: Tensor) -> Tensor:
            seen[name] = x.detach().requires_grad_() if leaf else x
            return seen[name]

        return kept

    def put(x: Tensor) -> Tensor:
        return torch.cat([x[..., : columns.start], seen["moved"][..., columns], x[..., columns.stop :]], dim=-1)

    length = torch.zeros((), requires_grad=True)
    with gates(of, 1, keep("along")):
        move = Apply("L1.resid_pre", lambda x, where: x + length * change)
        q = own(of.model.trace(of.pairs.clean, want=site, do=[move], grad=True)[site], receiver)
    with gates(of, 1, keep("gate", leaf=True)):
        logits = of.model.trace(of.pairs.clean, want=site, grad=True).logits
    (at_gate,) = torch.autograd.grad(value(logits).sum(), seen["gate"])
    at_q = of.model.trace(of.pairs.clean, want=site, grad="logit_diff: #11, #22").grads[site]
    product = (own(at_q, receiver) * q).sum() + (at_gate * seen["along"])[..., columns].sum()
    (slope,) = torch.autograd.grad(product, length)
    found = edge_scores(of.model, of.pairs, of.wiring, of.fronts, [1.0])
    torch.testing.assert_close(found.scores[sender, number], slope.float() / len(CLEAN), rtol=1e-4, atol=1e-7)

    with gates(of, 1, keep("moved")):
        made = own(makes(of, receiver, change), receiver)

    def put_query(x: Tensor, where: Any) -> Tensor:
        new = x.clone()
        own(new, receiver).copy_(made)
        return new

    with gates(of, 1, put):
        changed = value(of.model.trace(of.pairs.clean, do=[Apply(site, put_query)]).logits)
    keep_all = torch.as_tensor(of.wiring.real).clone()
    keep_all[sender, number] = False
    runs = CircuitRuns(of.model, of.pairs, of.wiring, of.fronts)
    expected = changed - value(of.model.trace(CLEAN).logits)
    assert float(expected.abs().max()) > 1e-6
    torch.testing.assert_close((runs(keep_all[None]) - runs.clean)[0], expected.float(), rtol=1e-4, atol=1e-6)
