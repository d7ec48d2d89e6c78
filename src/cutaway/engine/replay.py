"""Run many small interventions on one prompt, recomputing only what each can change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cutaway.core.errors import InputError, SiteSyntaxError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention
from cutaway.core.metric import Metric
from cutaway.core.progress import track
from cutaway.engine.base import Base, record, why_not
from cutaway.engine.plan import Sizes, plan_walks
from cutaway.engine.readout import Readout
from cutaway.engine.reduce import SUPPORTED, Entry, Reducer, entry, tolerance, wanted
from cutaway.engine.rows import CannotReplayError
from cutaway.engine.walk import Walk
from cutaway.models.handle import Model

BUDGET = 2**30
"""Bytes that the rows of one walk may take, when nothing else is said."""

SHARE_OFF = 0.05
"""Largest error of a check, as a fraction of what its noise changes: a structural mistake is as large as the effect."""

T = TypeVar("T")
_checked: WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Replayed:
    """What a sweep gave.

    Attributes:
        values: [run] the metric of each run. base: the metric of the run without interventions.
        how: "replay", or "plain: " and the reason.
        peak_estimate: bytes that the sweep needs at most beside the model.
    """

    values: Tensor
    base: Tensor
    how: str
    peak_estimate: int


def replay(
    model: Model,
    inputs: Any,
    runs: Sequence[Intervention],
    metric: Metric | str,
    *,
    budget: int = BUDGET,
    plain: bool | None = None,
    progress: bool = True,
) -> Replayed:
    """The metric after each of many interventions on one prompt.

    Each run is one intervention at one layer. Layers and positions that a run cannot change are not computed again:
    runs join a growing batch of rows at the layer and position where they start. What cannot be replayed exactly takes
    the plain path, one whole forward pass per run, and ``how`` says why.

    Args:
        inputs: a prompt, ids or Inputs, of one row. Positions of sites count in ``metric.prepare(inputs)``.
        runs: interventions; each site names one layer.
        budget: bytes that the packed rows may take; the sweep is split into as many walks as that needs.
        plain: True takes the plain path, False refuses it, None chooses.
        progress: show a bar where a person watches.

    Raises:
        InputError: several rows. SiteError, InterventionError: a run's place or value is wrong.
        UnsupportedError: ``plain=False`` and the sweep cannot be replayed.
    """
    scored = model.metric(metric)
    batch = scored.prepare(model.inputs(inputs))
    if len(batch) != 1:
        raise InputError(f"a sweep over {len(batch)} rows", "it runs on one prompt", "sweep the rows one by one")
    items = [_concrete(model, item, batch) for item in runs]
    reason = "asked for" if plain else ""
    if not plain:
        try:
            return _replayed(_prepare(model, batch, items, scored, budget), len(items), progress)
        except CannotReplayError as error:
            reason = str(error)
        except UnsupportedError as error:
            reason = error.found
        if plain is False:
            raise UnsupportedError(f"replay {len(items)} runs of {model.name}", reason, "leave plain=False out")
    return _plain(model, batch, items, scored, reason, progress)


def plan_memory(
    model: Model, inputs: Any, runs: Sequence[Intervention], metric: Metric | str, *, budget: int = BUDGET
) -> int:
    """Bytes that ``replay`` with the same arguments needs at most beside the model; it runs the base run to tell."""
    scored = model.metric(metric)
    batch = scored.prepare(model.inputs(inputs))
    try:
        return _prepare(model, batch, [_concrete(model, item, batch) for item in runs], scored, budget).peak
    except (CannotReplayError, UnsupportedError):
        return _plain(model, batch, (), scored, "", False).peak_estimate


def _concrete(model: Model, item: Intervention, inputs: Inputs) -> Intervention:
    sites = model.expand(item.site, inputs)
    if len(sites) != 1:
        raise SiteSyntaxError(f"run '{item}'", f"it names {len(sites)} layers", "make one run per layer")
    return item if sites[0] == item.at else replace(item, at=sites[0])


def _plain(
    model: Model, inputs: Inputs, items: Sequence[Intervention], metric: Metric, reason: str, progress: bool
) -> Replayed:
    def logits(do: Sequence[Intervention]) -> Tensor:
        found = model.trace(inputs, do=do).logits
        if found is None:
            raise UnsupportedError(f"run {model.name}", "it returned no logits", "")
        return found

    base = logits(())
    values = [metric(logits([item]), inputs)[0] for item in _bar(items, len(items), "runs", progress)]
    size = 2 * base.numel() * base.element_size()
    return Replayed(
        torch.stack(values) if values else base.new_empty(0), metric(base, inputs)[0], f"plain: {reason}", size
    )


@dataclass(frozen=True)
class _Sweep:
    """A sweep that can be replayed: the base run, the walks, and what they need."""

    base: Base
    walk: Walk
    readout: Readout
    walks: list[list[Entry]]
    peak: int


def _prepare(model: Model, inputs: Inputs, items: Sequence[Intervention], metric: Metric, budget: int) -> _Sweep:
    reason = why_not(model, inputs)
    odd = next((item.site for item in items if item.site.kind not in SUPPORTED or item.site.scope), None)
    if reason or odd is not None:
        raise CannotReplayError(reason or f"'{odd}' acts on more than the residual stream of its own layer")
    base = record(model, inputs, wanted(model, [item.site for item in items]))
    reads = metric.reads(inputs)[0]
    entries = [
        entry(model, base.reach, inputs.select(item.site.positions, f"run '{item}'")[0], i, item)
        for i, item in enumerate(items)
    ]
    walk = Walk(base, Reducer(base), reads)
    live = [e for e in entries if e.first < walk.end]
    for e in entries:
        if e.first >= walk.end:
            walk.reducer.delta(e)  # nothing reads it, but a wrong value is still an error
    _check(model, base, walk, live, reads)
    readout = Readout(model, metric, len(reads), budget)
    walks, most = plan_walks(live, Sizes.of(model, walk.end), budget)
    return _Sweep(base, walk, readout, walks, base.bytes + most + readout.bytes(max(map(len, walks), default=0)))


def _replayed(sweep: _Sweep, n: int, progress: bool) -> Replayed:
    base = sweep.readout(sweep.base.layers[-1].post[sweep.walk.reads][None])[0]
    values = base.expand(n).clone()

    def steps() -> Iterator[None]:
        for some in sweep.walks:
            runs, rows = yield from sweep.walk.steps(some)
            if runs:
                values[runs] = sweep.readout(rows).to(values.dtype)

    for _ in _bar(steps(), len(sweep.walks) * len(sweep.base.layers), f"replay ({sweep.peak >> 20} MiB)", progress):
        pass
    return Replayed(values, base, "replay", sweep.peak)


def _bar(items: Iterable[T], total: int, what: str, progress: bool) -> Iterable[T]:
    return track(items, what, total=total) if progress else items


def _check(model: Model, base: Base, walk: Walk, entries: Sequence[Entry], reads: Sequence[int]) -> None:
    """At the first sweep of a kind: replay two cells with noise in them, together, and compare with plain runs."""
    if not entries:
        return
    key = (frozenset(e.site.kind for e in entries), bool(base.inputs.extra), base.inputs.padded, model.dtype)
    known = _checked.setdefault(model.hf, {})
    if key not in known:
        known[key] = _compare(model, base, walk, entries, reads)
    if known[key]:
        raise CannotReplayError(known[key])


def _compare(model: Model, base: Base, walk: Walk, entries: Sequence[Entry], reads: Sequence[int]) -> str:
    ordered = sorted(entries, key=lambda e: (e.layer, e.first))
    generator = torch.Generator().manual_seed(0)
    probes = []
    for run, e in enumerate((ordered[0], ordered[len(ordered) // 2])):
        part = model.trace(base.inputs, want=e.site)[e.site]
        size = float(part.float().square().mean().sqrt()) or 1.0
        noise = torch.randn(part.shape, generator=generator).to(part) * size
        probes.append(replace(e, run=run, intervention=Add(e.site, noise)))
    try:
        runs, rows = walk(probes)
        found = model.unembed(rows)
    except Exception as problem:  # noqa: BLE001  whatever packed rows make a layer raise is a reason not to pack them
        return f"its layers do not take packed rows: {type(problem).__name__}: {' '.join(str(problem).split())}"
    at = list(reads)
    plain = model(base.inputs)[0, at]
    for run, logits in zip(runs, found, strict=True):
        exact = model.trace(base.inputs, do=probes[run].intervention).logits
        if exact is None:
            return "the model returned no logits"
        exact = exact[0, at]
        error, size = float((logits - exact).abs().max()), float(exact.abs().max())
        effect = float((exact - plain).abs().max())
        rounding = 8 * torch.finfo(model.dtype).eps * size
        if not error <= tolerance(model.dtype) * size or error > SHARE_OFF * effect + rounding:
            return f"replaying '{probes[run].site}' gave logits off by {error:.2g} where they change by {effect:.2g}"
    return ""
