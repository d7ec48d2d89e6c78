"""Which part of a tensor a site names, and how it is read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import InputError, SiteMissingError, SiteRangeError
from cutaway.core.inputs import Inputs
from cutaway.core.site import KINDS, Items, Site

Selector = slice | list[int] | Tensor
POSITIONS = ("pos", "query_pos", "key_pos")


def _compact(values: Sequence[int]) -> slice | list[int]:
    """A slice where the values are consecutive."""
    consecutive = len(values) > 0 and list(values) == list(range(values[0], values[0] + len(values)))
    return slice(values[0], values[0] + len(values)) if consecutive else list(values)


@dataclass
class Window:
    """Which tokens the current forward call sees.

    Attributes:
        inputs: the tokens of the whole row so far, cached ones included; None when only a mask is known.
        real: padded indices of the real tokens so far, per row.
        start: padded index of the first token of this call (the length of the KV cache).
        growing: more tokens may follow (generation): positions not there yet are no error.
    """

    inputs: Inputs | None
    real: list[list[int]]
    start: int = 0
    growing: bool = False
    _cache: dict[tuple[Items | str, int, int, str], list[list[int]] | None] = field(default_factory=dict)
    _lenient: Window | None = None

    def lenient(self) -> Window:
        """This window for sites whose positions need not be there yet."""
        if self._lenient is None:
            self._lenient = self if self.growing else replace(self, growing=True, _cache={}, _lenient=None)
        return self._lenient

    def real_here(self, start: int, length: int) -> Tensor | None:
        """[batch, length] whether each of the padded positions from ``start`` on is a real token; None when all are."""
        rows = [set(row) for row in self.real]
        real = torch.tensor([[p in row for p in range(start, start + length)] for row in rows], dtype=torch.bool)
        return None if not rows or bool(real.all()) else real

    @property
    def batch(self) -> int:
        """Rows of this call."""
        return len(self.real)

    def local(self, site: Site, start: int, length: int) -> list[list[int]] | None:
        """Indices into an axis that holds padded positions ``start .. start+length-1``, per row; None for all of it."""
        if site.positions is None or (site.positions == "all" and not self.inputs):
            return None
        key = (site.positions, start, length, site.scope)
        if key not in self._cache:
            self._cache[key] = [
                [p - start for p in row if start <= p < start + length] for row in self._absolute(site, length)
            ]
        return self._cache[key]

    def _absolute(self, site: Site, length: int) -> list[list[int]]:
        if site.scope:
            if isinstance(site.positions, str) or site.positions is None:
                raise SiteMissingError(
                    f"site '{site}'", "the vision tower has no token roles", "name positions by number"
                )
            return [site.positions.resolve(length, "position", f"site '{site}'")] * self.batch
        if self.inputs is not None and not self.growing:
            return self.inputs.select(site.positions, f"site '{site}'")
        if isinstance(site.positions, str):
            found = "roles are not known while generating"
            raise SiteMissingError(f"site '{site}' in doing()", found, "name positions by number")
        rows = []
        for row in self.real:
            here = [(a + len(row) if a < 0 else a, b + len(row) if b < 0 else b) for a, b in site.positions or ()]
            rows.append([row[i] for a, b in here for i in range(max(a, 0), min(b, len(row) - 1) + 1)])
        return rows


def window_of_call(call: Mapping[str, Any]) -> Window:
    """What one forward call sees, from its arguments by name: its tokens, its mask and what its cache holds.

    Raises InputError when the padding cannot be told from the mask.
    """
    seen = next((call[n] for n in ("input_ids", "inputs_embeds") if isinstance(call.get(n), Tensor)), None)
    if seen is None:
        return Window(None, [], growing=True)
    rows, length = seen.shape[:2]
    cache = call.get("past_key_values")
    start = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
    mask = call.get("attention_mask")
    if mask is None:
        return Window(None, [list(range(start + length))] * rows, start=start, growing=True)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"{mask.ndim}-dimensional" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise InputError(
            "interventions around this call", f"its attention mask is {kind}", "give one [batch, pos] mask"
        )
    real = [row.nonzero().flatten().tolist() for row in mask.cpu()]
    return Window(None, real, start=mask.shape[1] - length, growing=True)


class Region:
    """The part of a canonical tensor that a concrete site names."""

    def __init__(self, site: Site, shape: Sequence[int], window: Window, start: int = 0) -> None:
        axes = KINDS[site.kind].axes
        selectors: list[Selector] = [slice(None)] * len(axes)
        self.empty = False
        self.rows: Tensor | None = None
        self.pos_axis = next((i for i, a in enumerate(axes) if a in POSITIONS), None)
        if site.index is not None:
            axis = axes.index(KINDS[site.kind].index_axis or "")
            selectors[axis] = _compact(site.index.resolve(shape[axis], axes[axis], f"site '{site}'"))
        if site.inner is not None:
            selectors[-1] = _compact(site.inner.resolve(shape[-1], "neuron", f"site '{site}'"))
        if self.pos_axis is not None:
            local = window.local(site, start, shape[self.pos_axis])
            if local is not None:
                self.empty = not any(local)
                if not self.empty and len({len(row) for row in local}) > 1:
                    found = f"its rows have {[len(row) for row in local]} such positions in this call"
                    raise SiteRangeError(f"site '{site}'", found, "name positions that all rows have")
                if local and all(row == local[0] for row in local):
                    selectors[self.pos_axis] = _compact(local[0])
                elif not self.empty:
                    self.rows = torch.tensor(local)
        self.selectors = selectors
        self.whole = (
            self.rows is None
            and all(s == slice(None) for s in selectors if isinstance(s, slice))
            and all(isinstance(s, slice) for s in selectors)
        )
        self._simple = self.rows is None and sum(not isinstance(s, slice) for s in selectors) <= 1
        self._shape = tuple(shape)
        self._site, self._window, self._start = site, window, start

    @property
    def real(self) -> Tensor | None:
        """Which entries of the named part stand for real tokens, broadcastable to it; None when all do."""
        if self.pos_axis is None or self._site.positions is not None or self._site.scope:
            return None
        real = self._window.real_here(self._start, self._shape[self.pos_axis])
        if real is None:
            return None
        shape = [1] * len(self._shape)
        shape[0], shape[self.pos_axis] = real.shape
        return real.view(shape)

    def _index(self, device: torch.device) -> tuple[Selector, ...]:
        if self._simple:
            return tuple(self.selectors)
        index: list[Selector] = []
        for axis, selector in enumerate(self.selectors):
            values = torch.arange(self._shape[axis])[selector]
            index.append(values.view([-1 if i == axis else 1 for i in range(len(self._shape))]).to(device))
        if self.rows is not None and self.pos_axis is not None:
            shape = [1] * len(self._shape)
            shape[0], shape[self.pos_axis] = self.rows.shape
            index[self.pos_axis] = self.rows.view(shape).to(device)
        return tuple(index)

    def get(self, x: Tensor) -> Tensor:
        """The named part, all axes kept; a view where it can be one."""
        return x if self.whole else x[self._index(x.device)]

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """A copy of ``x`` with the named part replaced."""
        if self.whole:
            return part
        new = x.clone()
        self.write(new, part)
        return new

    def write(self, x: Tensor, part: Tensor) -> None:
        """Replace the named part of ``x`` itself."""
        x[self._index(x.device)] = part


def joined(site: Site, earlier: Tensor | None, part: Tensor, unseen: float = -torch.inf) -> Tensor:
    """What the chunks of one attention saw so far: positions one after the other, patterns along the diagonal.

    ``unseen`` stands between chunks in scores; a pattern is 0 there.
    """
    if earlier is None:
        return part
    if site.kind not in ("attn.scores", "attn.pattern"):
        return torch.cat([earlier, part], dim=1)
    q, k = earlier.shape[-2:]
    fill = unseen if site.kind == "attn.scores" else 0.0
    whole = earlier.new_full((*earlier.shape[:2], q + part.shape[-2], k + part.shape[-1]), fill)
    whole[..., :q, :k], whole[..., q:, k:] = earlier, part
    return whole
