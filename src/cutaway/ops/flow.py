"""How much of each token state every addend of it makes: what stood there, each head from each position, the MLP.

A state y is a sum of vectors z. The share of one of them is

    proximity    max(0, |y|_1 - |y - z|_1), over their sum: how much nearer z brings the rest to y
    projection   <z, y> / <y, y>: signed, sums to 1 by itself

Where norms remove the mean of a state, as LayerNorm does, means are taken out of all vectors first: nothing reads them,
and one large mean would stand for the whole state.

A mixer (linear attention, a state space, a convolution) adds one vector and does not say from which positions: its
share is told, and traced no further.

Multiplied along paths, shares say how much of a last state came through a place: what flows into a state is divided
among its addends, from the end to the embeddings.

Source: Ferrando and Voita (2024), "Information flow routes: automatically interpreting language models at scale", for
the proximity; there edges below a threshold are cut, here none is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.ops.parts import Parts, refuse_other_keys, take_apart
from cutaway.ops.readout import Head
from cutaway.ops.watched import WatchedModel
from cutaway.ops.writers import Writer, rows_of, writer

By = Literal["proximity", "projection"]


@dataclass(frozen=True)
class Sums:
    """The shares of all addends of one layer's states.

    Attributes:
        stays: [pos] of what stood there. heads: [pos, source, head]; None in a layer without attention.
        mixer: [pos] of what a mixer added in place of heads.
        mlp: [pos]; None without an MLP. after: [pos] of the state behind the attention, where the MLP adds to that.
        constant: [pos] of biases and norms' shifts.
        parallel: heads and MLP add to one and the same state; then ``after`` is None.
    """

    stays: Tensor
    heads: Tensor | None
    constant: Tensor
    mixer: Tensor | None = None
    mlp: Tensor | None = None
    after: Tensor | None = None
    parallel: bool = False


class Flow(NamedTuple):
    """The shares of a whole run, by layer, and the largest gap between a state and the sum of its addends.

    Attributes:
        error: relative to the largest number of the state.
    """

    layers: tuple[Sums, ...]
    error: float


def flow(model: WatchedModel, inputs: Inputs, by: By) -> Flow:
    """The shares of every state of a prompt, from one forward pass.

    Raises:
        UnsupportedError: a layer does not add to the stream, or what its heads bring from where cannot be told.
    """
    n = inputs.ids.shape[1]
    layers = model.anatomy(inputs).stacks[""]  # with its image, where layers run that otherwise do not
    attends = [i for i, plan in enumerate(layers) if plan.has("attn.out") and plan.attention is not None]
    if not attends:
        why = next((plan.refused["attn.pattern"] for plan in layers if "attn.pattern" in plan.refused), "no heads")
        raise UnsupportedError(f"what heads of {model.name} bring from each position", why, "")
    for i in attends:
        plan = layers[i]
        if not (plan.has("attn.pattern") and plan.has("attn.v") and plan.w_o):
            why = plan.refused.get("attn.pattern") or "its heads are not written by one matrix"
            raise UnsupportedError(f"what heads of layer {i} of {model.name} bring from each position", why, "")
    extra = [f"L{i}.{kind}" for i in attends for kind in ("attn.pattern", "attn.v")]
    extra += [f"L{i}.attn.z" for i in attends if layers[i].gated]
    parts = take_apart(model, inputs, n, "layer", extra)
    centres = Head(model).norm.centres
    found = [_layer(model, parts, i, by, centres) for i in range(len(parts.layers))]
    return Flow(tuple(sums for sums, _ in found), max(error for _, error in found))


def _layer(model: WatchedModel, parts: Parts, i: int, by: By, centres: bool) -> tuple[Sums, float]:
    layer = parts.layers[i]
    n = layer.x.shape[0]
    brings, how = _brings(model, parts, i)
    mixes = layer.attn if brings is None else None
    stays, constant, heads, mixed, mlps, errors = [], [], [], [], [], []
    for t in range(n):
        fixed = torch.zeros_like(layer.x[t]) if how is None else how.constant[t]
        addends = [layer.x[t][None], fixed[None]]
        y = layer.x[t] + (0 if layer.attn is None else layer.attn[t])
        if layer.parallel and layer.mlp is not None:
            addends.append(layer.mlp[t][None])
            y = y + layer.mlp[t]
        if mixes is not None:
            addends.append(mixes[t][None])
        first = sum(len(a) for a in addends)
        if brings is not None and how is not None:
            addends.append(how.at(t)(brings.moved(t)[:, :, None])[:, :, 0].flatten(0, 1))
        z = torch.cat(addends)
        share = _shares(z, y, by, centres)
        errors.append(float((z.sum(0) - y).abs().max() / y.abs().max()))
        stays.append(share[0])
        constant.append(share[1])
        if layer.parallel and layer.mlp is not None:
            mlps.append(share[2])
        if mixes is not None:
            mixed.append(share[first - 1])
        heads.append(share[first:].view(n, -1) if brings is not None else share[first:])
    after = None
    if layer.mlp is not None and not layer.parallel:
        before = layer.before_mlp
        pairs = [_shares(torch.stack([b, m]), b + m, by, centres) for b, m in zip(before, layer.mlp, strict=True)]
        after, mlp = torch.stack(pairs).T
        mlps = list(mlp)
    return (
        Sums(
            torch.stack(stays),
            torch.stack(heads) if brings is not None else None,
            torch.stack(constant),
            torch.stack(mixed) if mixed else None,
            torch.stack(mlps) if mlps else None,
            after,
            layer.parallel,
        ),
        max(errors),
    )


@dataclass(frozen=True)
class _Brings:
    """What the heads of a layer bring: attention [head, pos, source], values [source, head, channel], output matrix by
    head [head, channel, d], and what is multiplied with at the position they bring it to, [pos, head, channel]."""

    alpha: Tensor
    v: Tensor
    rows: Tensor
    gate: Tensor | None

    @cached_property
    def _written(self) -> Tensor:
        return torch.einsum("shc,hcd->shd", self.v, self.rows)

    def moved(self, t: int) -> Tensor:
        """[source, head, d] to one position."""
        if self.gate is None:
            return self.alpha[:, t, :, None].transpose(0, 1) * self._written
        return torch.einsum("hs,shc,hcd->shd", self.alpha[:, t], self.v, self.rows * self.gate[t][:, :, None])


def _brings(model: WatchedModel, parts: Parts, i: int) -> tuple[_Brings | None, Writer | None]:
    """What heads bring from where to where, and the way on."""
    layer, plan = parts.layers[i], model.layers[i]
    if layer.attn is None or plan.attention is None or parts.trace is None:
        return None, None
    at = {site.kind: x[0].float() for site, x in parts.trace.items() if site.layer == i and site.kind[:5] == "attn."}
    alpha, v = at["attn.pattern"], at["attn.v"]
    refuse_other_keys(i, v.shape[0], len(layer.x))
    rows, bias = rows_of(model, plan.w_o)
    groups = alpha.shape[0] // v.shape[1]
    v = v.repeat_interleave(groups, dim=1) if groups > 1 else v
    z = torch.einsum("hts,shc->thc", alpha, v)
    gate = parts.gates.get(i)
    total = (z if gate is None else z * gate).flatten(1) @ rows.float()
    brings = _Brings(alpha, v, rows.float().unflatten(0, (v.shape[1], -1)), gate)
    return brings, writer(model, i, "attn", total, bias, layer.attn)


def _shares(z: Tensor, y: Tensor, by: By, centres: bool) -> Tensor:
    """[n] shares of vectors [n, d] in their sum [d]."""
    if centres:
        z, y = z - z.mean(-1, keepdim=True), y - y.mean()
    if by == "projection":
        return (z @ y) / (y @ y)
    near = (y.abs().sum() - (y - z).abs().sum(-1)).clamp_min(0)
    return near / near.sum().clamp_min(torch.finfo(near.dtype).tiny)


@dataclass(frozen=True)
class Routes:
    """What of one last state came through each place.

    Attributes:
        states: [layer + 1, pos] through the states before each layer and at the end. middle: [layer, pos] through those
            between attention and MLP; 0 where there is none.
        heads: by layer [pos, source, head]. mixer, mlp, stays, after: by layer [pos]. constant: from biases, in all.
    """

    states: Tensor
    middle: Tensor
    heads: dict[int, Tensor]
    mixer: dict[int, Tensor]
    mlp: dict[int, Tensor]
    stays: Tensor
    after: dict[int, Tensor]
    constant: float


def routes(found: Flow, position: int) -> Routes:
    """The flow into the last state of a position, back to the embeddings."""
    n_layers, n = len(found.layers), found.layers[0].stays.shape[0]
    states, middle = torch.zeros(n_layers + 1, n), torch.zeros(n_layers, n)
    stays = torch.zeros(n_layers, n)
    heads: dict[int, Tensor] = {}
    mixer: dict[int, Tensor] = {}
    mlp: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    states[n_layers, position] = 1.0
    constant = 0.0
    for i in reversed(range(n_layers)):
        sums, into = found.layers[i], states[i + 1]
        if sums.mlp is not None:
            mlp[i] = sums.mlp.cpu() * into
        below = into
        if sums.after is not None:
            after[i] = sums.after.cpu() * into
            below = mlp[i] + after[i]
            middle[i] = below
        stays[i] = sums.stays.cpu() * below
        states[i] += stays[i]
        constant += float((sums.constant.cpu() * below).sum())
        if sums.parallel and i in mlp:
            states[i] += mlp[i]
        if sums.heads is not None:
            heads[i] = sums.heads.cpu() * below[:, None, None]
            states[i] += heads[i].sum((0, 2))
        if sums.mixer is not None:
            mixer[i] = sums.mixer.cpu() * below
    return Routes(states, middle, heads, mixer, mlp, stays, after, constant)
