"""Which positions stand in a relation to which, and how much attention heads pay along it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.ops.watched import WatchedModel

KEPT = 2**22  # numbers of one head's patterns, over all layers, that are kept at a time


Relation = Tensor
"""Pairs of positions, [row, query, key] float: 1 where the key stands in the relation to the query, -1 against it."""


def relations(inputs: Inputs) -> list[Relation]:
    """The token before; earlier positions of the same token; the positions behind those. Images' places have none."""
    ids, real = inputs.ids.cpu(), inputs.mask.cpu().bool()
    n = ids.shape[1]
    told = torch.tensor([[role not in ("image", "pad") for role in row] for row in inputs.roles])
    both = real[:, :, None] & real[:, None, :] & told[:, :, None] & told[:, None, :]
    at = torch.arange(n)
    earlier = at[:, None] > at[None]
    before = both & (at[:, None] - 1 == at[None])
    same = both & earlier & (ids[:, :, None] == ids[:, None, :])
    behind = torch.zeros_like(same)
    behind[:, :, 1:] = same[:, :, :-1]
    return [x.float() for x in (before, same, behind & both & earlier)]


def label_signs(inputs: Inputs, answers: Sequence[int], labels: Sequence[int]) -> Tensor:
    """[row, query, key] from each row's last position: 1 at earlier positions of its answer, -1 at other labels."""
    signs = torch.zeros(*inputs.ids.shape, inputs.ids.shape[1])
    for b, (last, answer) in enumerate(zip(inputs.last, answers, strict=True)):
        for s in inputs.real[b][:-1]:
            token = int(inputs.ids[b, s])
            if token == answer:
                signs[b, last, s] = 1.0
            elif token in labels:
                signs[b, last, s] = -1.0
    return signs


def attention_on(
    model: WatchedModel, inputs: Inputs, layers: Sequence[int], asked: Sequence[Relation]
) -> dict[int, Tensor]:
    """[relation, head] by layer: attention along each relation, summed over keys, mean over the queries that have any.

    NaN where no query has.

    Raises:
        UnsupportedError: a layer attends over something else than the positions of the prompt.
    """
    n = inputs.ids.shape[1]
    size = len(inputs) if inputs.has_images else max(1, KEPT // (n * n * max(1, len(layers))))
    sums: dict[int, Tensor] = {}
    pairs = torch.stack(list(asked))
    counts = _queries(pairs)
    for rows in torch.arange(len(inputs)).split(size):
        part = inputs.take(rows.tolist())
        trace = model.trace(part, want=[f"L{i}.attn.pattern" for i in layers], stop=True)
        for i in layers:
            pattern = trace[f"L{i}.attn.pattern"].float()
            if pattern.shape[-2:] != (n, n):
                found_there = f"it is {pattern.shape[-2]} queries by {pattern.shape[-1]} keys for {n} positions"
                raise UnsupportedError(f"attention of layer {i} of {model.name}", found_there, "")
            found = torch.einsum("bhqk,rbqk->rh", pattern, pairs[:, rows].to(pattern.device)).cpu()
            sums[i] = sums[i] + found if i in sums else found
    return {i: total / counts[:, None] for i, total in sums.items()}


def attention_by_chance(inputs: Inputs, asked: Sequence[Relation]) -> list[float]:
    """What a head gets along each relation that looks at all positions up to its own alike."""
    pairs, real = torch.stack(list(asked)), inputs.mask.cpu().float()
    seen = torch.tril(real[:, :, None] * real[:, None, :])
    evenly = seen / seen.sum(-1, keepdim=True).clamp_min(1)
    found: list[float] = ((pairs * evenly).sum((1, 2, 3)) / _queries(pairs)).tolist()
    return found


def _queries(pairs: Tensor) -> Tensor:
    """[relation] how many queries have any key; NaN for none."""
    counts = (pairs != 0).any(-1).sum((1, 2))
    return torch.where(counts > 0, counts, float("nan"))
