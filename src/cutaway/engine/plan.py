"""How many walks a sweep takes within a budget of bytes, and what it needs at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutaway.engine.reduce import Entry
from cutaway.engine.share import worth_sharing
from cutaway.engine.walk import ROWS_AT_ONCE
from cutaway.models.handle import Model
from cutaway.models.plan import Layer

HELD = 4
"""Residual streams of a run alive between layers, at most: before and after a layer, and what joins."""
STREAMS, NEURONS, HEADS = 10, 5, 6
"""Tensors alive at once per row of a layer, at most: residual streams, MLP activations, q k v and z."""
COPIES, SCORES = 4, 4
"""The same per key of a run (repeated for grouped heads, padded by kernels), and per query and key."""
WIDE = 4
"""Bytes of a score: softmax runs in float32."""


@dataclass(frozen=True)
class Sizes:
    """Bytes that packed rows take in the widest layer.

    Attributes:
        row: of one row in a layer. held: of one between layers. key: of one key and value of one run.
        heads: query heads.
        end: positions that matter to what is read; a run that starts at p has ``end - p`` rows.
    """

    row: int
    held: int
    key: int
    heads: int
    end: int

    @staticmethod
    def of(model: Model, end: int) -> Sizes:
        """The sizes of a model's rows on prompts of ``end`` positions."""
        size = model.dtype.itemsize
        row = max(
            STREAMS * a.d_model + NEURONS * max(a.d_mlp, a.n_experts * a.d_expert) + HEADS * _width(a)
            for a in model.layers
        )
        heads = max(a.attention.heads if a.attention else 0 for a in model.layers)
        held = HELD * max(a.d_model for a in model.layers)
        return Sizes(row * size, held * size, COPIES * max(map(_width, model.layers)) * size, heads, end)

    def attention(self, first: int) -> int:
        """Bytes that attending takes for one run that starts at ``first``."""
        queries = self.end - first
        keys = queries if worth_sharing(first, queries) else self.end
        return keys * self.key + SCORES * self.heads * queries * self.end * WIDE


def plan_walks(entries: Sequence[Entry], sizes: Sizes, budget: int) -> tuple[list[list[Entry]], int]:
    """(the entries of each walk, bytes of the largest): runs of near starts together, as many as the budget holds.

    Where not even one run fits it walks alone, and the bytes say so.
    """
    walks: list[list[Entry]] = []
    rows = same = attention = longest = peak = 0
    for e in sorted(entries, key=lambda e: (e.first, e.layer)):
        own = sizes.end - e.first
        same = same + 1 if walks and walks[-1][-1].first == e.first else 1
        together = min(same, max(1, ROWS_AT_ONCE // own))
        attention = max(attention, together * sizes.attention(e.first))
        rows, longest = rows + own, max(longest, own)
        if not walks or _bytes(rows, longest, sizes) + attention > budget:
            walks.append([])
            rows, longest, same, attention = own, own, 1, sizes.attention(e.first)
        walks[-1].append(e)
        peak = max(peak, _bytes(rows, longest, sizes) + attention)
    return walks, peak


def _bytes(rows: int, longest: int, sizes: Sizes) -> int:
    """Bytes of so many rows between layers, and of those of them that are in a layer, where a run is as a whole."""
    return rows * sizes.held + min(rows, max(ROWS_AT_ONCE, longest)) * sizes.row


def _width(layer: Layer) -> int:
    a = layer.attention
    return 0 if a is None else a.heads * (a.d_head + a.d_value)
