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
from cutaway.core.site import Site
from cutaway.engine.base import Base, record, why_not
from cutaway.engine.plan import Sizes, plan_walks
from cutaway.engine.readout import Readout
from cutaway.engine.reduce import EXPERTS, SUPPORTED, Entry, Reducer, entry, scripted, tolerance, wanted
from cutaway.engine.rows import CannotReplayError
from cutaway.engine.walk import Walk
from cutaway.models.handle import Model

BUDGET = 2**30
"""Bytes that the rows of one walk may take, when nothing else is said."""

SHARE_OFF = 0.05
"""Largest error of a check, as a fraction of what its noise changes: a structural mistake is as large as the effect."""

Run = Intervention | Sequence[Intervention]
"""What one run does: one intervention, or several."""
Items = tuple[Intervention, ...]
T = TypeVar("T")
_checked: WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Replayed:
    """What a sweep gave.

    Attributes:
        values: [run] the metric of each run. base: [] that of the run without interventions. Both on the CPU.
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
    runs: Sequence[Run],
    metric: Metric | str,
    *,
    budget: int = BUDGET,
    plain: bool | None = None,
    progress: bool = True,
    base: Base | None = None,
) -> Replayed:
    """The metric after each of many interventions on one prompt.

    Each run is one intervention at one layer, or a list of them at any places, of which each sees what those before it
    in the forward pass (in the list, where they share a place) have changed. Layers and positions that a run cannot
    change are not computed again: runs join a growing batch of rows at the layer and position where they start. What
    cannot be replayed exactly takes the plain path, one whole forward pass per run, and ``how`` says why.

    Args:
        inputs: a prompt, ids or Inputs, of one row. Positions of sites count in ``metric.prepare(inputs)``.
        runs: interventions; each site names one layer. A run that is a list may name several layers with a site.
        budget: bytes that the packed rows may take; the sweep is split into as many walks as that needs.
        plain: True takes the plain path, False refuses it, None chooses.
        progress: show a bar where a person watches.
        base: a base run of these inputs that was recorded before; taken where it holds what the runs need.

    Raises:
        InputError: several rows, or an empty run. SiteError, InterventionError: a run's place or value is wrong.
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
            return _replayed(_prepare(model, batch, items, scored, budget, base), len(items), progress)
        except CannotReplayError as error:
            reason = str(error)
        except UnsupportedError as error:
            reason = error.found
        if plain is False:
            raise UnsupportedError(f"replay {len(items)} runs of {model.name}", reason, "leave plain=False out")
    return _plain(model, batch, items, scored, reason, progress)


def plan_memory(model: Model, inputs: Any, runs: Sequence[Run], metric: Metric | str, *, budget: int = BUDGET) -> int:
    """Bytes that ``replay`` with the same arguments needs at most beside the model; it runs the base run to tell."""
    scored = model.metric(metric)
    batch = scored.prepare(model.inputs(inputs))
    try:
        return _prepare(model, batch, [_concrete(model, item, batch) for item in runs], scored, budget).peak
    except (CannotReplayError, UnsupportedError):
        return _plain(model, batch, (), scored, "", False).peak_estimate


def _concrete(model: Model, run: Run, inputs: Inputs) -> Items:
    if isinstance(run, Intervention):
        sites = model.expand(run.site, inputs)
        if len(sites) != 1:
            raise SiteSyntaxError(f"run '{run}'", f"it names {len(sites)} layers", "make one run per layer, or a list")
        return (_at(run, sites[0]),)
    items = tuple(_at(item, site) for item in run for site in model.expand(item.site, inputs))
    if not items:
        raise InputError("a run", "it has no intervention", "give at least one; the run without any is in 'base'")
    return items


def _at(item: Intervention, site: Site) -> Intervention:
    return item if site == item.at else replace(item, at=site)


def _plain(
    model: Model, inputs: Inputs, runs: Sequence[Items], metric: Metric, reason: str, progress: bool
) -> Replayed:
    def logits(do: Sequence[Intervention]) -> Tensor:
        found = model.trace(inputs, do=do).logits
        if found is None:
            raise UnsupportedError(f"run {model.name}", "it returned no logits", "")
        return found

    base = logits(())
    values = [metric(logits(items), inputs)[0] for items in _bar(runs, len(runs), "runs", progress)]
    size = 2 * base.numel() * base.element_size()
    found = torch.stack(values) if values else base.new_empty(0)
    return Replayed(found.cpu(), metric(base, inputs)[0].cpu(), f"plain: {reason}", size)


@dataclass(frozen=True)
class _Sweep:
    """A sweep that can be replayed: the base run, the walks and their runs, and what they need."""

    base: Base
    walks: list[tuple[Walk, list[Entry]]]
    readout: Readout
    reads: list[int]
    peak: int


def _prepare(
    model: Model, inputs: Inputs, runs: Sequence[Items], metric: Metric, budget: int, known: Base | None = None
) -> _Sweep:
    reason = why_not(model, inputs)
    sites = [item.site for items in runs for item in items]
    odd = next((site for site in sites if site.kind not in SUPPORTED or site.scope), None)
    if reason or odd is not None:
        raise CannotReplayError(reason or f"'{odd}' acts on more than the residual stream of its own layer")
    alone = {i: one[0] for i, one in enumerate(runs) if len(one) == 1 and one[0].site.kind not in EXPERTS}
    needed = wanted(model, [item.site for item in alone.values()])
    holds = known is not None and known.values.keys() >= set(needed) and known.inputs.digest == inputs.digest
    base = known if known is not None and holds else record(model, inputs, needed)
    reads = metric.reads(inputs)[0]
    several = [scripted(base, i, items) for i, items in enumerate(runs) if i not in alone]
    single = [
        entry(model, base.reach, inputs.select(item.site.positions, f"run '{item}'")[0], i, item)
        for i, item in alone.items()
    ]
    named = max((p for e in several for line in e.lines for p in line.positions), default=-1)
    walks, most, reducer = [], 0, Reducer(base)
    for entries, end in ((single, 0), (several, named + 1)):
        walk = Walk(base, reducer, reads, end)
        live = [e for e in entries if e.first < walk.end]
        for e in entries:
            if e.first >= walk.end:
                reducer.delta(e)  # nothing reads it, but a wrong value is still an error
        _check(model, base, walk, live, reads)
        planned, bytes_ = plan_walks(live, Sizes.of(model, walk.end), budget)
        walks += [(walk, some) for some in planned]
        most = max(most, bytes_)
    readout = Readout(model, metric, len(reads), budget)
    largest = max((len(some) for _, some in walks), default=0)
    return _Sweep(base, walks, readout, reads, base.bytes + most + readout.bytes(largest))


def _replayed(sweep: _Sweep, n: int, progress: bool) -> Replayed:
    base = sweep.readout(sweep.base.layers[-1].post[sweep.reads][None])[0]
    values = base.expand(n).clone()

    def steps() -> Iterator[None]:
        for walk, some in sweep.walks:
            runs, rows = yield from walk.steps(some)
            if runs:
                values[runs] = sweep.readout(rows).to(values.dtype)

    for _ in _bar(steps(), len(sweep.walks) * len(sweep.base.layers), f"replay ({sweep.peak >> 20} MiB)", progress):
        pass
    return Replayed(values.cpu(), base.cpu(), "replay", sweep.peak)


def _bar(items: Iterable[T], total: int, what: str, progress: bool) -> Iterable[T]:
    return track(items, what, total=total) if progress else items


def _check(model: Model, base: Base, walk: Walk, entries: Sequence[Entry], reads: Sequence[int]) -> None:
    """At the first sweep of a kind: replay two cells with noise in them, together, and compare with plain runs."""
    if not entries:
        return
    kinds = frozenset((item.site.kind, bool(e.lines)) for e in entries for item in _items(e))
    key = (kinds, bool(base.inputs.extra), base.inputs.padded, model.dtype)
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
        noise = [_noise(model, base.inputs, item.site, generator) for item in _items(e)]
        lines = tuple(replace(line, intervention=add) for line, add in zip(e.lines, noise, strict=False))
        probes.append(replace(e, run=run, intervention=noise[0], lines=lines))
    twins = [replace(e, run=e.run + len(probes)) for e in probes]  # so that each is packed with another
    try:
        runs, rows = walk([*probes, *twins])
        found = model.unembed(rows)
    except Exception as problem:  # noqa: BLE001  whatever packed rows make a layer raise is a reason not to pack them
        return f"its layers do not take packed rows: {type(problem).__name__}: {' '.join(str(problem).split())}"
    at = list(reads)
    plain = model(base.inputs)[0, at]
    for e in probes:
        exact = model.trace(base.inputs, do=_items(e)).logits
        if exact is None:
            return "the model returned no logits"
        exact = exact[0, at]
        own = [logits for run, logits in zip(runs, found, strict=True) if run % len(probes) == e.run]
        error = max((float((logits - exact).abs().max()) for logits in own), default=0.0)
        size = float(exact.abs().max())
        effect = float((exact - plain).abs().max())
        rounding = 8 * torch.finfo(model.dtype).eps * size
        if not error <= tolerance(model.dtype) * size or error > SHARE_OFF * effect + rounding:
            return f"replaying '{e.site}' gave logits off by {error:.2g} where they change by {effect:.2g}"
    return ""


def _items(e: Entry) -> Items:
    return tuple(line.intervention for line in e.lines) or (e.intervention,)


def _noise(model: Model, inputs: Inputs, site: Site, generator: torch.Generator) -> Intervention:
    part = model.trace(inputs, want=site)[site]
    size = float(part.float().square().mean().sqrt()) or 1.0
    return Add(site, torch.randn(part.shape, generator=generator).to(part) * size)
