"""Walk the layers once with many runs packed into one matrix of rows.

Rows are positions of runs. Before layer l the runs that start there join. The layer itself is called on all rows at
once, since everything in it but attention treats each row alone; its attention is answered run by run, on the run's own
later keys and the base run's earlier ones. Where there are many rows a layer takes them some runs at a time, so that
what it makes of them stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.engine.base import Attended, Base, LayerCall
from cutaway.engine.products import fast_activations, fast_products
from cutaway.engine.reduce import Entry, Reducer
from cutaway.engine.rows import position_axis
from cutaway.engine.script import Line, Script
from cutaway.engine.share import attend_shared, can_share, worth_sharing
from cutaway.models.interface import ATTENTION

ROWS_AT_ONCE = 512
"""Rows that go through a layer together: matrix products are at full speed from about 200 on."""


@dataclass
class Group:
    """Runs that start at the same position: [run, pos, d_model] their rows from ``first`` on."""

    first: int
    runs: list[int] = field(default_factory=list)
    rows: Tensor | None = None

    def parts(self) -> Iterator[Group]:
        """Groups of some of the runs each, of no more than ``ROWS_AT_ONCE`` rows where a run has fewer."""
        if self.rows is None:
            return
        step = max(1, ROWS_AT_ONCE // max(1, self.rows.shape[1]))
        for start in range(0, len(self.runs), step):
            yield Group(self.first, self.runs[start : start + step], self.rows[start : start + step])

    def join(self, runs: Sequence[int], rows: Tensor) -> None:
        """More runs of the same start."""
        self.runs.extend(runs)
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])


class Walk:
    """Walks through the layers, each for some of the runs.

    Args:
        reads: positions that the metric reads. end: positions before it are walked too, read or not.
    """

    def __init__(self, base: Base, reducer: Reducer, reads: Sequence[int], end: int = 0) -> None:
        self.base, self.reducer, self.reads = base, reducer, list(reads)
        self.end = max(end, max(base.reach.last[p] for p in reads) + 1)
        self._sharing: dict[int, bool] = {}
        self._lines: dict[int, tuple[Line, ...]] = {}

    def __call__(self, entries: Sequence[Entry]) -> tuple[list[int], Tensor]:
        """What ``steps`` returns."""
        steps = self.steps(entries)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                found: tuple[list[int], Tensor] = done.value
                return found

    @torch.no_grad()
    def steps(self, entries: Sequence[Entry]) -> Generator[None, None, tuple[list[int], Tensor]]:
        """(runs, [run, read, d_model]) the last residual stream of each run at the positions that are read.

        Yields once per layer of the model. Runs that write what the base run has there are left out.
        """
        layers = self.base.layers
        self._lines = {e.run: e.lines for e in entries if e.lines}
        groups = {e.first: Group(e.first) for e in sorted(entries, key=lambda e: e.first)}
        for i in range(len(layers)):
            self._step(i, groups, [e for e in entries if e.layer == i])
            yield
        after = {first: Group(first) for first in groups}
        self._join(after, [e for e in entries if e.layer == len(layers)], layers[-1].post)
        for g in after.values():
            if g.rows is not None:
                groups[g.first].join(g.runs, self._read(g))
        return self._finish([g for g in groups.values() if g.rows is not None])

    def _step(self, i: int, groups: dict[int, Group], entries: Sequence[Entry]) -> None:
        """Layer ``i``, at which ``entries`` join."""
        call = self.base.layers[i]
        mids = {first: Group(first) for first in groups}
        self._join(groups, [e for e in entries if not e.mid], call.pre)
        self._join(mids, [e for e in entries if e.mid], call.pre)
        live, late = ([g for g in some.values() if g.rows is not None] for some in (groups, mids))
        if not live and not late:
            return
        model = self.base.model
        with fast_products(model.device, model.dtype):
            self._through(i, live, False)
            self._through(i, late, True)
        for g in late:
            if g.rows is not None:
                groups[g.first].join(g.runs, g.rows)
        gap = self.base.gap(i)
        if gap is not None:
            for g in groups.values():
                g.rows = None if g.rows is None else g.rows + gap[g.first : self.end]

    def _through(self, i: int, groups: Sequence[Group], mid: bool) -> None:
        """Take the rows of all groups through layer ``i`` (its later part where ``mid``).

        Of the last layer only the rows that are read come out; no others go into it beyond their keys and values,
        unless a run acts there.
        """
        call, last = self.base.layers[i], i == len(self.base.layers) - 1
        made: dict[int, list[Tensor]] = {g.first: [] for g in groups}
        for some in _portions(groups):
            script = None if mid else self._script(i, some)
            early = last and script is None
            keys = self._keys(call, some) if early and not mid else None
            if early:
                self._reduce(some)
            self._layer(call, [] if mid else some, some if mid else [], early, keys, script)
            if last and not early:
                self._reduce(some)
            for part in some:
                if part.rows is not None:
                    made[part.first].append(part.rows)
        for g in groups:
            g.rows = made[g.first][0] if len(made[g.first]) == 1 else torch.cat(made[g.first])

    def _reduce(self, groups: Sequence[Group]) -> None:
        """The rows of these groups become those that are read."""
        for g in groups:
            g.rows = self._read(g)

    def _script(self, i: int, groups: Sequence[Group]) -> Script | None:
        """What runs of these groups, packed in this order, do inside layer ``i``; None when nothing."""
        due, start = [], 0
        for g in groups:
            for run in g.runs:
                here = [line for line in self._lines.get(run, ()) if line.site.layer == i]
                due += [(line, [start + p - g.first for p in line.positions]) for line in here]
                start += self.end - g.first
        return Script(self.base.model, due, start) if due else None

    def _join(self, groups: dict[int, Group], entries: Sequence[Entry], stream: Tensor) -> None:
        by_first: dict[int, list[tuple[int, Tensor]]] = {}
        for e in entries:
            if e.lines:
                by_first.setdefault(e.first, []).append((e.run, stream[e.first : self.end]))
                continue
            at, change = self.reducer.delta(e)
            keep = (at >= e.first) & (at < self.end)
            if bool(change[keep].any()):  # else the run is the base run
                at = at[keep]
                rows = stream[e.first : self.end].clone()
                rows[at - e.first] = (stream[at].to(change.dtype) + change[keep]).to(rows.dtype)
                by_first.setdefault(e.first, []).append((e.run, rows))
        for first, here in by_first.items():
            groups[first].join([run for run, _ in here], torch.stack([rows for _, rows in here]))

    def _positions(self, g: Group, reading: bool) -> Tensor:
        device = self.base.layers[0].pre.device
        if reading:
            return torch.tensor([p for p in self.reads if p >= g.first], device=device, dtype=torch.long)
        return torch.arange(g.first, self.end, device=device)

    def _read(self, g: Group) -> Tensor:
        if g.rows is None:
            raise RuntimeError("a group without rows is not read")
        return g.rows[:, self._positions(g, True) - g.first]

    def _pack(self, groups: Sequence[Group], reading: bool) -> tuple[Tensor, Tensor]:
        rows = [g.rows.flatten(0, 1) for g in groups if g.rows is not None]
        at = [self._positions(g, reading).repeat(len(g.runs)) for g in groups]
        d = self.base.layers[0].pre
        return (torch.cat(rows), torch.cat(at)) if rows else (d[:0], torch.empty(0, dtype=torch.long, device=d.device))

    def _keys(self, call: LayerCall, live: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Keys and values of every live row: all that the last layer needs of the rows that are not read."""
        _, k, v = call.until_attention(*self._pack(live, False))
        return k, v

    def _layer(
        self,
        call: LayerCall,
        live: Sequence[Group],
        late: Sequence[Group],
        reading: bool,
        keys: tuple[Tensor, Tensor] | None,
        script: Script | None,
    ) -> None:
        """Run one layer on the rows of all groups; those of ``late`` take the base run's attention."""
        seen = call.seen
        x, at = self._pack(live, reading)
        x_late, at_late = self._pack(late, reading)
        frozen = seen.out[0, at_late] if seen.out is not None and len(at_late) else None

        def answer(
            native: Any, own: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *a: Any, **kw: Any
        ) -> Any:
            k, v = (k, v) if keys is None else keys
            if script is not None:
                q, k, v = (script.heads_first(f"attn.{name}", x) for name, x in (("q", q), ("k", k), ("v", v)))
            z = self._attend(seen, live, reading, q, k, v)
            z = z if script is None else script("attn.z", z)
            return (z.transpose(1, 2) if seen.heads_first else z), None

        with (
            ATTENTION.watch({id(seen.module): answer}),
            freezing(seen.module, len(at), frozen),
            nullcontext() if script is None else script.around_layer(),
            fast_activations(call.module),
        ):
            out = call.run(torch.cat([x, x_late]), torch.cat([at, at_late]))
        start = 0
        for g in (*live, *late):
            if g.rows is not None:
                n = g.rows.shape[0] * g.rows.shape[1]
                g.rows = out[start : start + n].view(g.rows.shape)
                start += n

    def _attend(self, seen: Attended, live: Sequence[Group], reading: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, rows, head, d_value] attention of the packed rows, group by group."""
        parts, q_start, k_start = [], 0, 0
        for g in live:
            n, m = len(g.runs), self.end - g.first
            at = self._positions(g, reading)
            queries = _split(q[:, :, q_start : q_start + n * len(at)], n)
            own_k, own_v = (_split(x[:, :, k_start : k_start + n * m], n) for x in (k, v))
            if worth_sharing(g.first, len(at)) and self._shares(seen):
                parts.append(attend_shared(seen, queries, own_k, own_v, g.first, at).flatten(0, 1))
            else:
                keys = torch.cat([seen.k[:, :, : g.first].expand(n, -1, -1, -1), own_k], dim=2)
                values = torch.cat([seen.v[:, :, : g.first].expand(n, -1, -1, -1), own_v], dim=2)
                parts.append(seen(queries, keys, values, at).flatten(0, 1))
            q_start, k_start = q_start + n * len(at), k_start + n * m
        return torch.cat(parts)[None] if parts else seen.z[:, :1]  # some row has to pass: see freezing

    def _shares(self, seen: Attended) -> bool:
        if id(seen) not in self._sharing:
            self._sharing[id(seen)] = can_share(seen)
        return self._sharing[id(seen)]

    def _finish(self, groups: Sequence[Group]) -> tuple[list[int], Tensor]:
        post = self.base.layers[-1].post[self.reads]
        runs = [run for g in groups for run in g.runs]
        out = post.expand(len(runs), -1, -1).clone()
        start = 0
        for g in groups:
            if g.rows is not None and g.rows.shape[1]:
                out[start : start + len(g.runs), -g.rows.shape[1] :] = g.rows
            start += len(g.runs)
        return runs, out


def _portions(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Parts of the groups that go through a layer together."""
    some: list[Group] = []
    rows = 0
    for part in (part for g in groups for part in g.parts()):
        own = 0 if part.rows is None else part.rows.shape[0] * part.rows.shape[1]
        if some and rows + own > ROWS_AT_ONCE:
            yield some
            some, rows = [], 0
        some.append(part)
        rows += own
    if some:
        yield some


def _split(x: Tensor, n: int) -> Tensor:
    """[run, head, pos, d] of packed [1, head, run * pos, d]."""
    return x[0].unflatten(1, (n, -1)).transpose(0, 1)


@contextmanager
def freezing(module: nn.Module, live: int, frozen: Tensor | None) -> Iterator[None]:
    """While open, the module runs on the first ``live`` rows only, and gives ``frozen`` for the others.

    Without live rows it runs on one, whose result is dropped: views with a free size do not take empty tensors.
    """
    if frozen is None:
        yield
        return
    total = live + frozen.shape[0]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            axis = position_axis(value.shape, total, "of attention")
            return value if axis is None else value.narrow(axis, 0, max(live, 1))
        if isinstance(value, tuple | list):
            return type(value)([cut(v) for v in value])
        return value

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cut(args), {k: v if "mask" in k else cut(v) for k, v in kwargs.items()}

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        x = out if isinstance(out, Tensor) else out[0]
        full = torch.cat([x[:, :live], frozen[None].to(x.dtype)], dim=1)
        return full if isinstance(out, Tensor) else type(out)([full, *out[1:]])

    first = module.register_forward_pre_hook(before, with_kwargs=True)
    second = module.register_forward_hook(after)
    try:
        yield
    finally:
        first.remove()
        second.remove()
