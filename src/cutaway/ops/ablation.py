"""Take components away and see what the answer loses.

Many sets of components are taken away in one forward pass: the prompt is repeated along the batch axis, and each row
has its own mask. Nothing is copied and no weight is touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Where
from cutaway.core.progress import track
from cutaway.core.site import Items
from cutaway.ops.units import WHOLE, Unit
from cutaway.ops.watched import WatchedModel, rounding

How = Literal["zero", "mean", "resample"]
Reach = Literal["all", "last"]
ROWS = {"cpu": 1024}  # positions in one batch of rows beyond which a pass gets no faster per row
MANY = 8192  # the same on other devices

Set = Sequence[Unit]


class Effect(NamedTuple):
    """What is left of the target after each set was taken away, each [set].

    ``logp`` is its log-probability in nats, summed over teacher-forced tokens; ``rank`` counts from 0 at the first;
    ``score`` is logp, less that of the rival where there is one.
    """

    logp: Tensor
    prob: Tensor
    rank: Tensor
    score: Tensor


def site_of(unit: Unit) -> str:
    """The whole tensor that a component is part of."""
    return f"L{unit.layer}.{unit.kind}"


class Ablation:
    """Takes sets of components away from one prompt's run.

    Args:
        ids: the target's tokens, read at the last positions of ``inputs`` (teacher-forced ones are appended already).
        how: what a component's activation becomes: 0, its mean over the reference runs, or what it was at a position
            of a reference run drawn at random.
        reach: at all positions, as if its weights were taken out, or at the positions that are read alone.
        reference: runs for mean and resample; the prompt itself when none is given.
        rival: a token that the first one is measured against.

    What a head brings from one position is taken away where it is read, as the plain run had it.
    """

    def __init__(
        self,
        model: WatchedModel,
        inputs: Inputs,
        ids: Sequence[int],
        how: How = "zero",
        reach: Reach = "all",
        reference: Sequence[Inputs] = (),
        seed: int = 0,
        rival: int | None = None,
    ) -> None:
        self.model, self.inputs, self.ids, self.how, self.reach = model, inputs, list(ids), how, reach
        self.rival = rival
        self.reads = inputs.real[0][-len(self.ids) :]
        self.reference = list(reference) or [inputs]
        self.generator = torch.Generator().manual_seed(seed)
        self._base: Effect | None = None
        self._values: dict[str, Tensor] = {}
        self._brought: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, sets: Sequence[Set]) -> Effect:
        """What is left of the target without each set."""
        self._prepare({unit for some in sets for unit in some})
        return self._batched(sets, ())

    def keeping(self, sets: Sequence[Set], layers: Sequence[Unit]) -> Effect:
        """What is left when each set alone stays of every tensor that one of ``layers`` names (see ``site_of``)."""
        self._prepare(set(layers))
        return self._batched(sets, tuple(dict.fromkeys(map(site_of, layers))))

    def _batched(self, sets: Sequence[Set], all_but: Sequence[str]) -> Effect:
        size = self._at_once
        starts = range(0, len(sets), size)
        found = [self._rows(sets[i : i + size], all_but) for i in track(starts, "ablations", total=len(starts))]
        return Effect(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def base(self) -> Effect:
        """The run as it is."""
        if self._base is None:
            self._base = self._rows([()])
        return self._base

    @cached_property
    def _at_once(self) -> int:
        """How many rows one pass takes: a single one where the model does not take these inputs repeated."""
        rows = max(1, ROWS.get(self.model.device.type, MANY) // self.inputs.ids.shape[1])
        if rows == 1 or not self.inputs.extra:
            return rows
        base = self.base().logp
        try:
            found = self._rows([(), ()]).logp
        except Exception:  # noqa: BLE001  whatever repeated images make a model raise is a reason not to repeat them
            return 1
        near = rounding(self.model.dtype) * max(1.0, float(base.abs()))
        return rows if bool(((found - base).abs() <= near).all()) else 1

    def _rows(self, sets: Sequence[Set], all_but: Sequence[str] = ()) -> Effect:
        by_site: dict[str, list[tuple[int, Unit]]] = defaultdict(list, {site: [] for site in all_but})
        for row, some in enumerate(sets):
            for unit in some:
                by_site[site_of(unit)].append((row, unit))
        do = [self._masked(site, entries, len(sets), bool(all_but)) for site, entries in by_site.items()]
        rows = self.inputs if len(sets) == 1 else self.inputs.repeat(len(sets))
        last = f"L{self.model.n_layers - 1}.resid_post@{Items.of(range(-len(self.ids), 0))}"
        states = self.model.trace(rows, want=last, do=do, stop=True)[last]
        return self._effect(self.model.unembed(states).float())

    def _effect(self, logits: Tensor) -> Effect:
        at = torch.tensor(self.ids, device=logits.device)[:, None]
        own = logits.gather(-1, at.expand(len(logits), -1, 1))
        logp = (own[..., 0] - logits.logsumexp(-1)).sum(-1)
        rank = (logits[:, 0] > own[:, 0]).sum(-1)
        score = logp if self.rival is None else own[:, 0, 0] - logits[:, 0, self.rival]
        return Effect(logp.cpu(), logp.exp().cpu(), rank.float().cpu(), score.cpu())

    @property
    def measures(self) -> tuple[str, str]:
        """What ``score`` is, and its unit."""
        return ("log p(target)", "nats") if self.rival is None else ("the logit difference", "logits")

    def _masked(self, site: str, entries: Sequence[tuple[int, Unit]], rows: int, keep: bool) -> Apply:
        whole = [(row, unit) for row, unit in entries if unit.source < 0 and unit.at < 0]

        def change(x: Tensor, where: Where) -> Tensor:
            new = x
            if whole or keep:
                mask = torch.full((rows, *_inner(site, x)), keep, dtype=torch.bool)
                for row, unit in whole:
                    mask[(row, *_at(unit))] = not keep
                named = mask[:, None].to(x.device)
                if self.reach == "last":
                    at = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
                    at[list(self.reads)] = True
                    named = named & at.view(1, -1, *[1] * (x.ndim - 2))
                new = torch.where(named, self._value(site, x), x)
            if len(whole) < len(entries):
                new = new.clone()
                for row, unit in entries:
                    if unit.source >= 0:
                        self._without(new, row, unit)
                    elif unit.at >= 0:
                        here = (row, unit.at, *_at(unit))
                        new[here] = self._value(site, x).expand_as(x)[here]
            return new

        return Apply(site, change)

    def _value(self, site: str, x: Tensor) -> Tensor:
        """What activations become, broadcasting to ``x`` [row, pos, ...]."""
        if self.how == "zero":
            return torch.zeros((), device=x.device, dtype=x.dtype)
        seen = self._values[site].to(x)
        if self.how == "mean":
            return seen.mean(dim=0)
        drawn = torch.randint(len(seen), (x.shape[0],), generator=self.generator)
        return seen[drawn][:, None]

    def _without(self, z: Tensor, row: int, unit: Unit) -> None:
        pattern, v = self._brought[unit.layer]
        head = unit.number * v.shape[1] // pattern.shape[0]
        for r, position in enumerate(self.reads):
            brought = pattern[unit.number, r, unit.source] * v[unit.source, head]
            channel = slice(None) if unit.inner < 0 else unit.inner
            z[row, position, unit.number, channel] -= brought[channel]

    def _prepare(self, units: set[Unit]) -> None:
        """The activations that mean, resample and source positions need, one pass each."""
        layers = sorted({u.layer for u in units if u.source >= 0} - self._brought.keys())
        if layers:
            at = f"@{Items.of(range(-len(self.ids), 0))}"
            trace = self.model.trace(
                self.inputs, want=[f"L{i}.{k}" for i in layers for k in (f"attn.pattern{at}", "attn.v")]
            )
            for i in layers:
                self._brought[i] = trace[f"L{i}.attn.pattern{at}"][0], trace[f"L{i}.attn.v"][0]
        sites = sorted({site_of(u) for u in units if u.source < 0} - self._values.keys())
        if self.how != "zero" and sites:
            traces = [self.model.trace(inputs, want=sites) for inputs in self.reference]
            for site in sites:
                real = [t[site][b, row] for t in traces for b, row in enumerate(t.inputs.real)]
                self._values[site] = torch.cat(real)


def _at(unit: Unit) -> tuple[int, ...]:
    """Where a component lies in the axes of its tensor behind row and position."""
    return tuple(i for i in (unit.number, unit.inner) if i >= 0)


def _inner(site: str, x: Tensor) -> tuple[int, ...]:
    """Sizes of the axes behind row and position that hold components; 1 for the stream's own axis."""
    return (1,) if site.endswith(WHOLE) else tuple(x.shape[2:])
