"""Heads that read labels in context: who they are, what their two towers do, and what corrects their biases.

A head's *value-output* tower says what a label position would write, ``W_O W_V n(x_p)``; its *query-key* tower how much
of it the question takes, ``alpha_p``. Both are read from one run per prompt.

Source: Yu and Ananiadou (2024), "How do large language models learn in-context? Query and key matrices of in-context
heads are two towers for metric learning".
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.intervention import Add, Intervention, Set
from cutaway.ops.importance import Baselines, Goal
from cutaway.ops.labelled import Labelled
from cutaway.ops.parts import Parts, take_apart
from cutaway.ops.readout import Head
from cutaway.ops.units import Unit
from cutaway.ops.watched import WatchedModel

LEAST = 1e-12  # attention below it is none


@dataclass(frozen=True)
class Reading:
    """What every head of some layers does in one prompt.

    Attributes:
        gain: [layer, head] log p(right label | x + head) - log p(right label | x), x the state before the layer.
        attention: [layer, head, label position] from the last position.
        writes: [layer, head, label position] logit of the label there less the other one's, per unit of attention.
        error: of the sums that all of it comes from.
    """

    gain: Tensor
    attention: Tensor
    writes: Tensor
    error: float


def read(model: WatchedModel, head: Head, prompt: Labelled, layers: Sequence[int]) -> Reading:
    """The reading of one prompt."""
    parts = take_apart(model, prompt.inputs, 1, "head-position")
    readout = head.frozen(parts.final, parts.logits)
    bases = Baselines(Goal.of(readout, [prompt.gold]), torch.stack([parts.layers[i].x for i in layers]))
    own = readout.only(prompt.labels)
    other = readout.only([prompt.other(label) for label in prompt.labels])
    gains, attention, writes = [], [], []
    for n, i in enumerate(layers):
        vectors, alpha = _brought(parts, i)
        gains.append(bases.added(torch.full((vectors.shape[1],), n), vectors.sum(0)))
        at = vectors[list(prompt.places)]
        moved = (own.project(at) - other.project(at))[:, :, 0].diagonal(dim1=0, dim2=2)  # [head, label position]
        alpha = alpha[:, list(prompt.places)]
        attention.append(alpha)
        writes.append(torch.where(alpha > LEAST, moved / alpha.clamp_min(LEAST), 0.0))
    error = max(parts.identity_error, *(group.writer.error for group in parts.groups))
    gained, attended, written = (torch.stack(x).cpu() for x in (gains, attention, writes))
    return Reading(gained, attended, written, error)


def _brought(parts: Parts, layer: int) -> tuple[Tensor, Tensor]:
    """([source, head, 1, d] what each head brings from each position, [head, source] its attention there)."""
    group = next((g for g in parts.groups if g.layer == layer), None)
    if group is None:
        raise UnsupportedError(f"what heads of layer {layer} bring", parts.missing.get(layer, "it has none"), "")
    vectors = group.vectors(torch.arange(len(group), device=group.rows.device))
    if parts.trace is None:
        raise UnsupportedError(f"layer {layer}", "its run was not kept", "")
    alpha = next(x for site, x in parts.trace.items() if site.kind == "attn.pattern" and site.layer == layer)
    return vectors.unflatten(0, (-1, group.per_source)), alpha[0, :, 0].float()


def shortcut(model: WatchedModel, prompt: Labelled, heads: Sequence[Unit], weight: dict[int, float]) -> Add:
    """What the heads brought from the labels, once more: ``weight[label]`` times, added to the last residual stream."""
    parts = take_apart(model, prompt.inputs, 1, "head-position")
    total = torch.zeros_like(parts.final[0])
    for layer in sorted({unit.layer for unit in heads}):
        vectors, _ = _brought(parts, layer)
        for unit in heads:
            if unit.layer == layer:
                for place, label in zip(prompt.places, prompt.labels, strict=True):
                    total += weight.get(label, 0.0) * vectors[place, unit.number, 0]
    return Add(f"L{model.n_layers - 1}.resid_post@-1", total)


def offsets(prompt: Labelled, heads: Sequence[Unit], weight: dict[int, float]) -> list[Intervention]:
    """``weight[label]`` added to the heads' attention scores at that label's positions, for the last position."""
    added = torch.zeros(prompt.inputs.ids.shape[1])
    for place, label in zip(prompt.places, prompt.labels, strict=True):
        added[place] = weight.get(label, 0.0)
    return [Add(f"L{unit.layer}.attn.scores[{unit.number}]@-1", added) for unit in heads]


def without_positions(model: WatchedModel, prompt: Labelled, heads: Sequence[Unit]) -> list[Intervention]:
    """The heads' attention from the last position as if every token stood there: their own queries and keys, made at
    one and the same position, from the states that the layers read.

    Rotary queries and keys are then un-rotated against each other; a learned position is the last one's everywhere.
    Traces of positions that earlier layers wrote into the states stay.

    Raises:
        UnsupportedError: the model takes no ``position_ids``, or does not heed them.
    """
    forward = inspect.signature(model.hf.forward).parameters
    asked = f"attention of {model.name} without positions"
    if "position_ids" not in forward:
        raise UnsupportedError(asked, "its forward takes no position_ids", "leave out the mitigation")
    layers = sorted({unit.layer for unit in heads})
    n = prompt.inputs.ids.shape[1]
    still = replace(prompt.inputs, extra={**prompt.inputs.extra, "position_ids": torch.full((1, n), n - 1)})
    run = model.trace(prompt.inputs, want=["L0.resid_pre", *(f"L{i}.resid_pre" for i in layers)], stop=True)
    moved = model.trace(still, want="L0.resid_pre", stop=True)["L0.resid_pre"] - run["L0.resid_pre"]
    do = [Set(f"L{i}.resid_pre", run[f"L{i}.resid_pre"] + moved) for i in layers]
    want = [f"L{unit.layer}.attn.pattern[{unit.number}]@-1" for unit in heads]
    found = model.trace(still, want=want, do=do, stop=True)
    if not bool(moved.any()):
        plain = model.trace(prompt.inputs, want=want, stop=True)
        if all(bool(torch.equal(found[site], plain[site])) for site in want):
            raise UnsupportedError(asked, "its position_ids change nothing in these heads", "leave out the mitigation")
    return [Set(site, found[site]) for site in want]


def recency_slope(attention: Tensor, places: Tensor) -> float:
    """Nats of attention per position: log attention [order, shot] on the places [order, shot] where each shot stood.

    What belongs to a shot, whose label it may be, and to an order, its normalisation, is taken out of both first.
    """
    y, x = (_two_way(v.double()) for v in (attention.clamp_min(LEAST).log(), places))
    size = (x * x).sum()
    return float((x * y).sum() / size) if float(size) > 0 else 0.0


def _two_way(v: Tensor) -> Tensor:
    return v - v.mean(0, keepdim=True) - v.mean(1, keepdim=True) + v.mean()
