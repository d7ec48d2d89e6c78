"""First-order and integrated-gradients estimates of what patching any activation would do, all at once.

Along the straight line from what enters the first layer of the run that receives to what enters it in the run that
gives, the gradient of the metric at every site is taken at one or several points. The estimate of a site is the change
of its activation from one run to the other, times the mean gradient.

Sources: Nanda (2023), attribution patching; Hanna, Pezzelle and Belinkov (2024), "Have faith in faithfulness", for the
integration along the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutaway.core.intervention import Add, Intervention
from cutaway.core.site import Items, Site
from cutaway.engine.gradients import Run, differentiable, observe
from cutaway.engine.patching import Exchange, part
from cutaway.engine.together import ROWS, run_together
from cutaway.models.handle import Model

START = Site("resid_pre", Items.of(0))
"""What enters the first layer: where the line between the two runs is drawn."""
STEP = 0.01
"""Part of a cell's change by which finite differences move; half of it says how far they can be trusted."""
ROUNDING = 64
"""Units in the last place that a metric's rounding may come to."""


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


def points(steps: int) -> tuple[float, ...]:
    """Where gradients are taken: at the run that receives, or in the middle of each of ``steps`` equal parts."""
    return (0.0,) if steps == 1 else tuple((i + 0.5) / steps for i in range(steps))


def estimate(model: Model, exchange: Exchange, sites: Sequence[Site], steps: int = 1) -> Estimate:
    """The estimates of all ``sites`` (whole tensors, one layer each) between the runs of an exchange."""
    at = points(steps)
    gates = {s: replace(s, kind="expert.gate") for s in sites if s.kind == "expert.act"}
    start = [START] if steps > 1 else []
    gives = observe(model, exchange.giver, [*sites, *start])
    gradients: dict[Site, Tensor] = {}
    if steps == 1 or gates:
        with differentiable(model, exchange.receiver, [*sites, *gates.values(), *start]) as gets:
            gradients = gets.gradients(exchange.metric)
            base, sure = _read(gets, exchange)
    else:
        gets = observe(model, exchange.receiver, [*sites, *start])
        base, sure = _read(gets, exchange)
    change, weights = None, {}
    if steps > 1:
        change = gives.values[START] - gets.values[START]
        mean = _Mean(sites, {s: gets.values[gate].float() for s, gate in gates.items()}, gradients)
        _along(model, exchange, [*sites, *gates.values()], change, at, mean)
        gradients, weights = {s: mean.of(s) for s in sites}, {s: mean.weights(s) for s in gates}
    given, other = _read(gives, exchange)
    taken = {s: gives.values[s] for s in sites}
    for s, gate in gates.items():
        taken[s] = torch.where(gets.values[gate][..., None] != 0, taken[s], gets.values[s])
    terms = {s: (taken[s] - gets.values[s]).float() * gradients[s].float() for s in sites}
    at = (0.0, *at) if weights else at
    return Estimate(terms, taken, gets.values, change, base, given, max(sure, other), at, weights)


class _Mean:
    """Mean gradients over the points of the line.

    A gradient at an expert's neurons is brought from the router's weight at its point to the router's weight in the run
    that receives. Its mean is over the points that route there; over none of them, it is that of the run that receives.

    Args:
        routed: {site of experts: [1, pos, expert]} the router's weights in the run that receives.
        own: {site: [1, pos, ...]} gradients at that run; those of experts are needed.
    """

    def __init__(self, sites: Sequence[Site], routed: Mapping[Site, Tensor], own: Mapping[Site, Tensor]) -> None:
        self.sites, self.routed, self.own = sites, routed, own
        self.n, self._total, self._scales = 0, dict.fromkeys(sites, torch.zeros(())), dict[Site, Tensor]()

    def add(self, run: Run, gradients: Mapping[Site, Tensor]) -> None:
        """Some more points: rows of a run."""
        for site in self.sites:
            g = gradients[site].float()
            if site in self.routed:
                gate = run.values[replace(site, kind="expert.gate")].float()
                scale = torch.where(gate != 0, self.routed[site] / gate, 0.0)
                g = g * scale[..., None]
                known = self._scales.get(site)
                self._scales[site] = scale if known is None else torch.cat([known, scale])
            self._total[site] = self._total[site].to(g.device) + g.sum(dim=0, keepdim=True)
        self.n += len(run.inputs)

    def of(self, site: Site) -> Tensor:
        """[1, pos, ...] the mean."""
        if site not in self.routed:
            return self._total[site] / self.n
        points = (self._scales[site] != 0).sum(0, keepdim=True)[..., None]
        return torch.where(points > 0, self._total[site] / points.clamp_min(1), self.own[site].float())

    def weights(self, site: Site) -> Tensor:
        """[1 + point, pos, expert] how much the run that receives and each point count in the mean, 1 on average."""
        scales = self._scales[site]
        points = (scales != 0).sum(0, keepdim=True)
        return torch.cat([(points == 0).float(), scales]) * (1 + self.n) / points.clamp_min(1)


def _along(
    model: Model, exchange: Exchange, want: Sequence[Site], change: Tensor, at: Sequence[float], mean: _Mean
) -> None:
    """Adds to ``mean`` the gradients at points of the line; several points are rows of one batch."""
    inputs = exchange.receiver
    size = 1 if inputs.extra else max(1, ROWS // inputs.ids.shape[1])
    for i in range(0, len(at), size):
        some = at[i : i + size]
        rows = inputs if len(some) == 1 else inputs.repeat(len(some))
        moved = torch.stack([p * change[0] for p in some])
        with differentiable(model, rows, want, Add(START, moved)) as run:
            mean.add(run, run.gradients(exchange.metric))


@torch.no_grad()
def _read(run: Run, exchange: Exchange) -> tuple[float, float]:
    """(metric, largest probability of a token where it reads) of one run."""
    logits = run.logits(exchange.metric)
    return float(exchange.metric.of(logits)[0]), float(logits.float().softmax(-1).max())


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
