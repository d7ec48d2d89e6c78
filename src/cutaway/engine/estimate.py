"""First-order and integrated-gradients estimates of what patching any activation would do, all at once.

Along the straight line from what enters the first layer of the run that receives to what enters it in the run that
gives, the gradient of the metric at every site is taken at one or several points. The estimate of a site is the change
of its activation from one run to the other, times the mean gradient.

The neurons of an expert act only where the run that receives routes a token to it: there, and nowhere else, patching
them does something; they become 0 where the run that gives routes elsewhere. So does the estimate. A router's weights
do route: experts that only the run that gives uses run too, so that their weights have a gradient.

Sources: Nanda (2023), attribution patching; Hanna, Pezzelle and Belinkov (2024), "Have faith in faithfulness", for the
integration along the inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention
from cutaway.core.metric import Metric
from cutaway.core.site import Items, Site
from cutaway.engine.exchanges import size_of
from cutaway.engine.gradients import Run, differentiable, observe
from cutaway.engine.patching import Exchange, part
from cutaway.engine.readout import each_of
from cutaway.engine.replay import BUDGET
from cutaway.engine.together import ROWS, run_together
from cutaway.models.handle import Model

START = Site("resid_pre", Items.of(0))
"""What enters the first layer: where the line between the two runs is drawn."""
STEP = 0.01
"""Part of a cell's change by which finite differences move; half of it says how far they can be trusted."""
ROUNDING = 64
"""Units in the last place that a metric's rounding may come to."""
ALIVE = 2
"""Tensors that a backward pass keeps per input and output of a weight."""


@dataclass(frozen=True)
class Estimate:
    """What one forward and backward pass per point say about every site.

    Attributes:
        terms: {whole site: [1, pos, ...]} change times mean gradient; sums of them estimate patching the sites summed.
        gives, gets: {whole site: [1, pos, ...]} activations of the run that gives and of the one that receives; of
            experts that a token is not routed to in the run that receives, both are 0.
        start: [1, pos, d_model] how far the two are apart where the line starts; None where it was not needed.
        base, given: the metric in the run that receives and in the one that gives.
        sure: the largest probability of a token where the metric reads, in either run.
        points: fractions of the way where gradients were taken.
        weights: {whole site of experts: [point, pos, expert]} how much each point counts in the mean, where not alike.
    """

    terms: dict[Site, Tensor]
    gives: dict[Site, Tensor]
    gets: dict[Site, Tensor]
    start: Tensor | None
    base: float
    given: float
    sure: float
    points: tuple[float, ...]
    weights: dict[Site, Tensor]

    @property
    def light(self) -> Estimate:
        """The same without activations; see ``seen_again``."""
        return replace(self, terms={}, gives={}, gets={}, start=None)

    @property
    def bytes(self) -> int:
        """Bytes of the activations that it holds."""
        start = {} if self.start is None else {START: self.start}
        return sum(map(size_of, (self.terms, self.gives, self.gets, start)))


def points(steps: int) -> tuple[float, ...]:
    """Where gradients are taken: at the run that receives, or in the middle of each of ``steps`` equal parts."""
    return (0.0,) if steps == 1 else tuple((i + 0.5) / steps for i in range(steps))


def estimate(model: Model, exchange: Exchange, sites: Sequence[Site], steps: int = 1) -> Estimate:
    """The estimates of all ``sites`` (whole tensors, one layer each) between the runs of an exchange."""
    return next(found for _, found in estimates(model, [exchange], sites, steps))


def estimates(
    model: Model, exchanges: Sequence[Exchange], sites: Sequence[Site], steps: int = 1, budget: int = BUDGET
) -> Iterator[tuple[int, Estimate]]:
    """(number, estimate) of every exchange, not in their order: those of one length run as rows of a batch.

    Args:
        budget: bytes that the graph of a backward pass may take; a single run is never split.
    """
    most = max(1, min(ROWS, budget // _bytes_per_position(model)))
    for numbers in _batches(exchanges, most):
        yield from zip(numbers, _estimated(model, [exchanges[i] for i in numbers], sites, steps, most), strict=True)


def _estimated(
    model: Model, exchanges: Sequence[Exchange], sites: Sequence[Site], steps: int, most: int
) -> Iterator[Estimate]:
    """The estimates of exchanges of one length, as rows of a batch of at most so many positions."""
    at, gates = points(steps), _gates(sites)
    start = [START] if steps > 1 else []
    metrics = [each.metric for each in exchanges]
    giver = _rows(model, [each.giver for each in exchanges])
    receiver = _rows(model, [each.receiver for each in exchanges])
    gives = observe(model, giver, [*sites, *start])
    routers = [s for s in sites if s.kind == "expert.gate"]
    gradients: dict[Site, Tensor] = {}
    if steps == 1 or gates:
        routes = [Add(s, _least(gives.values[s])) for s in routers]
        with differentiable(model, receiver, [*sites, *gates.values(), *start], routes) as gets:
            gradients = gets.gradients(metrics)
            base, sure = _read(gets, metrics)
    else:
        gets = observe(model, receiver, [*sites, *start])
        base, sure = _read(gets, metrics)
    change, weights = None, {}
    if steps > 1:
        change = gives.values[START] - gets.values[START]
        mean = _Mean(sites, {s: gets.values[gate].float() for s, gate in gates.items()}, gradients)
        moves = {START: change, **{s: gives.values[s] - gets.values[s] for s in routers}}
        _along(model, receiver, metrics, [*sites, *gates.values()], moves, at, most, mean)
        gradients, weights = {s: mean.of(s) for s in sites}, {s: mean.weights(s) for s in gates}
    given, other = _read(gives, metrics)
    taken = _taken(gives, gets, sites)
    at = (0.0, *at) if weights else at
    for b in range(len(exchanges)):
        gave, got = ({s: values[s][b : b + 1] for s in sites} for values in (taken, gets.values))
        yield Estimate(
            {s: (gave[s] - got[s]).float() * gradients[s][b : b + 1].float() for s in sites},
            gave,
            got,
            None if change is None else change[b : b + 1],
            base[b],
            given[b],
            max(sure[b], other[b]),
            at,
            {s: w[:, b] for s, w in weights.items()},
        )


@torch.no_grad()
def seen_again(model: Model, exchange: Exchange, sites: Sequence[Site], light: Estimate) -> Estimate:
    """An estimate that kept no activations, with those of both runs; its ``terms`` stay empty."""
    start = [START] if len(light.points) > 1 else []
    gives = observe(model, exchange.giver, [*sites, *start])
    gets = observe(model, exchange.receiver, [*sites, *_gates(sites).values(), *start])
    change = gives.values[START] - gets.values[START] if start else None
    own = {s: gets.values[s] for s in sites}
    return replace(light, gives=_taken(gives, gets, sites), gets=own, start=change)


def _gates(sites: Sequence[Site]) -> dict[Site, Site]:
    """The router's weights of every site of experts."""
    return {s: replace(s, kind="expert.gate") for s in sites if s.kind == "expert.act"}


def _taken(gives: Run, gets: Run, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """What each site becomes: what the run that gives has there, but for experts that the other is not routed to."""
    taken = {s: gives.values[s] for s in sites}
    for s, gate in _gates(sites).items():
        taken[s] = torch.where(gets.values[gate][..., None] != 0, taken[s], gets.values[s])
    return taken


def _bytes_per_position(model: Model) -> int:
    """Bytes that the graph of a pass takes per position, by the sizes of the layers' weights."""
    layers = [model.hf.get_submodule(layer.path) for layer in model.anatomy().stacks[""]]
    sides = sum(sum(w.shape[-2:]) for layer in layers for w in layer.parameters() if w.ndim > 1)
    return max(1, ALIVE * sides * model.dtype.itemsize)


def _batches(exchanges: Sequence[Exchange], most: int) -> Iterator[list[int]]:
    """Numbers of exchanges that run together: of one length, at most so many positions; images or padding alone."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, each in enumerate(exchanges):
        if any(run.extra or run.padded for run in (each.giver, each.receiver)):
            yield [i]
        else:
            alike[each.receiver.ids.shape[1]].append(i)
    for length, numbers in alike.items():
        size = max(1, most // length)
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _rows(model: Model, runs: Sequence[Inputs]) -> Inputs:
    """Runs of one length as rows of a batch."""
    return runs[0] if len(runs) == 1 else model.inputs(torch.cat([run.ids for run in runs]))


class _Mean:
    """Mean gradients over the points of the line, in every row.

    A gradient at an expert's neurons is brought from the router's weight at its point to the router's weight in the run
    that receives. Its mean is over the points that route there; over none of them, it is that of the run that receives.

    Args:
        routed: {site of experts: [row, pos, expert]} the router's weights in the run that receives.
        own: {site: [row, pos, ...]} gradients at that run; those of experts are needed.
    """

    def __init__(self, sites: Sequence[Site], routed: Mapping[Site, Tensor], own: Mapping[Site, Tensor]) -> None:
        self.sites, self.routed, self.own = sites, routed, own
        self.n, self._total, self._scales = 0, dict.fromkeys(sites, torch.zeros(())), dict[Site, Tensor]()

    def add(self, run: Run, gradients: Mapping[Site, Tensor], points: int) -> None:
        """Some more points, each of them all rows of a run."""
        for site in self.sites:
            g = gradients[site].float().unflatten(0, (points, -1))
            if site in self.routed:
                gate = run.values[replace(site, kind="expert.gate")].float().unflatten(0, (points, -1))
                scale = torch.where(gate != 0, self.routed[site] / gate, 0.0)
                g = g * scale[..., None]
                known = self._scales.get(site)
                self._scales[site] = scale if known is None else torch.cat([known, scale])
            self._total[site] = self._total[site].to(g.device) + g.sum(dim=0)
        self.n += points

    def of(self, site: Site) -> Tensor:
        """[row, pos, ...] the mean."""
        if site not in self.routed:
            return self._total[site] / self.n
        points = (self._scales[site] != 0).sum(0)[..., None]
        return torch.where(points > 0, self._total[site] / points.clamp_min(1), self.own[site].float())

    def weights(self, site: Site) -> Tensor:
        """[1 + point, row, pos, expert] how much the receiving run and each point count in the mean, 1 on average."""
        scales = self._scales[site]
        points = (scales != 0).sum(0, keepdim=True)
        return torch.cat([(points == 0).float(), scales]) * (1 + self.n) / points.clamp_min(1)


def _least(gate: Tensor) -> Tensor:
    """Where ``gate`` is not 0, a weight too small to change a number: the expert runs, so that it has a gradient."""
    return (gate != 0) * torch.finfo(gate.dtype).tiny


def _along(
    model: Model,
    receiver: Inputs,
    metrics: Sequence[Metric],
    want: Sequence[Site],
    moves: Mapping[Site, Tensor],
    at: Sequence[float],
    most: int,
    mean: _Mean,
) -> None:
    """Adds to ``mean`` the gradients at points of the line; several points of all rows are one batch.

    ``moves``: how far the runs are apart where the line starts, and in routers, whose experts of either run all run.
    """
    n, length = receiver.ids.shape
    size = 1 if receiver.extra else max(1, most // (n * length))
    for i in range(0, len(at), size):
        some = at[i : i + size]
        rows = receiver.take([b for _ in some for b in range(n)])
        do = [
            Add(site, torch.cat([p * change if site == START else _least(change) for p in some]))
            for site, change in moves.items()
        ]
        with differentiable(model, rows, want, do) as run:
            mean.add(run, run.gradients([*metrics] * len(some)), len(some))


@torch.no_grad()
def _read(run: Run, metrics: Sequence[Metric]) -> tuple[list[float], list[float]]:
    """([row] metric, [row] largest probability of a token where it reads) of one run."""
    logits = run.logits(metrics[0])
    return each_of(logits, metrics).tolist(), logits.float().softmax(-1).amax(dim=(1, 2)).tolist()


def measured(model: Model, exchange: Exchange, found: Estimate, cell: Site) -> tuple[float, float]:
    """(what the estimate of one cell should be, by finite differences; how far to trust that)."""
    whole = cell.whole()
    change = part(found.gives[whole], cell, exchange.giver) - part(found.gets[whole], cell, exchange.giver)
    weights = [torch.ones(())] * len(found.points)
    if whole in found.weights:
        weights = [
            part(w[None, ..., None].expand_as(found.gets[whole]), cell, exchange.giver) for w in found.weights[whole]
        ]
    runs: list[list[Intervention]] = []
    for p, weight in zip(found.points, weights, strict=True):
        line = [] if found.start is None else [Add(START, p * found.start)]
        move = change * weight.to(change)
        runs += [[*line, Add(cell, step * move)] for step in (STEP, -STEP, STEP / 2, -STEP / 2)]
    values = run_together(model, exchange.receiver, runs, exchange.metric).double().view(-1, 4)
    wide, narrow = (values[:, 0] - values[:, 1]) / (2 * STEP), (values[:, 2] - values[:, 3]) / STEP
    noise = ROUNDING * torch.finfo(model.dtype).eps * float(values.abs().max().clamp_min(1.0)) / STEP
    jump = 3 * float((wide - narrow).abs().mean())  # covers one jump in between, as where experts change
    return float(((4 * narrow - wide) / 3).mean()), jump + noise
