"""How many walks a sweep takes within a budget of bytes, and what it needs at most."""

from __future__ import annotations

from collections.abc import Sequence

from cutaway.engine.reduce import Entry
from cutaway.models.handle import Model

ENOUGH_ROWS = 4096
"""Rows beyond which a matrix product gets no faster, so a walk holds no more even where the budget would."""


def bytes_per_row(model: Model) -> int:
    """Bytes that one packed row takes inside a layer: residual streams, attention's inputs and outputs, neurons."""
    return max(
        (8 * layer.d_model + 3 * layer.d_mlp + (_heads(layer) * 3)) * model.dtype.itemsize for layer in model.layers
    )


def bytes_per_run(model: Model, keys: int, queries: int) -> int:
    """Bytes that the attention of one run takes: its keys and values, repeated for grouped heads, and its scores."""
    most = 0
    for layer in model.layers:
        if layer.attention is not None:
            heads = layer.attention.heads
            width = layer.attention.d_head + layer.attention.d_value
            most = max(most, 2 * keys * heads * width + 2 * heads * queries * keys)
    return most * model.dtype.itemsize


def bytes_of_base(model: Model, length: int) -> int:
    """Bytes of what the base run keeps."""
    per_position = sum(6 * layer.d_model + layer.d_mlp + _heads(layer) for layer in model.layers)
    return per_position * length * model.dtype.itemsize


def chunks(model: Model, length: int, end: int, entries: Sequence[Entry], budget: int) -> list[list[Entry]]:
    """The entries of each walk, runs of near starts together."""
    per_row = bytes_per_row(model)
    found: list[list[Entry]] = []
    rows = attention = group = 0
    start = -1
    for e in sorted(entries, key=lambda e: (e.first, e.layer)):
        m = end - e.first
        group = group + 1 if e.first == start else 1
        start = e.first
        attention = max(attention, group * bytes_per_run(model, end, m))
        if found and rows + m <= ENOUGH_ROWS and (rows + m) * per_row + attention <= budget:
            found[-1].append(e)
            rows += m
        else:
            found.append([e])
            rows, group = m, 1
            attention = bytes_per_run(model, end, m)
    return found


def estimate(model: Model, length: int, end: int, entries: Sequence[Entry], reads: int, budget: int) -> int:
    """Bytes that the sweep needs at most beside the model."""
    walks = chunks(model, length, end, entries, budget)
    per_row = bytes_per_row(model)
    most = 0
    for some in walks:
        rows = sum(end - e.first for e in some)
        same = max(sum(e.first == f.first for e in some) * bytes_per_run(model, end, end - f.first) for f in some)
        most = max(most, rows * per_row + same)
    return bytes_of_base(model, length) + most


def _heads(layer: object) -> int:
    attention = getattr(layer, "attention", None)
    return 0 if attention is None else attention.heads * (attention.d_head + attention.d_value)
