"""First-order and integrated-gradients estimates of what patching any activation would do, all at once.

Along the straight line from what enters the first layer of the run that receives to what enters it in the run that
gives, the gradient of the metric at every site is taken at one or several points. The estimate of a site is the change
of its activation from one run to the other, times the mean gradient.

Sources: Nanda (2023), attribution patching; Hanna, Pezzelle and Belinkov (2024), "Have faith in faithfulness", for the
integration along the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        gives, gets: {whole site: [1, pos, ...]} activations of the run that gives and of the one that receives.
        start: [1, pos, d_model] how far the two are apart where the line starts; None where it was not needed.
        base, given: the metric in the run that receives and in the one that gives.
        sure: the largest probability of a token where the metric reads, in either run.
        points: fractions of the way where gradients were taken.
    """

    terms: dict[Site, Tensor]
    gives: dict[Site, Tensor]
    gets: dict[Site, Tensor]
    start: Tensor | None
    base: float
    given: float
    sure: float
    points: tuple[float, ...]


def points(steps: int) -> tuple[float, ...]:
    """Where gradients are taken: at the run that receives, or in the middle of each of ``steps`` equal parts."""
    return (0.0,) if steps == 1 else tuple((i + 0.5) / steps for i in range(steps))


def estimate(model: Model, exchange: Exchange, sites: Sequence[Site], steps: int = 1) -> Estimate:
    """The estimates of all ``sites`` (whole tensors, one layer each) between the runs of an exchange."""
    at = points(steps)
    wanted = list(sites) if steps == 1 else [*sites, START]
    gives = observe(model, exchange.giver, wanted)
    if steps == 1:
        with differentiable(model, exchange.receiver, sites) as gets:
            gradients = gets.gradients(exchange.metric)
            base, sure = _read(gets, exchange)
    else:
        gets = observe(model, exchange.receiver, wanted)
        base, sure = _read(gets, exchange)
        gradients = _integrated(model, exchange, sites, gives.values[START] - gets.values[START], at)
    given, other = _read(gives, exchange)
    terms = {s: (gives.values[s] - gets.values[s]).float() * gradients[s].float() for s in sites}
    start = None if steps == 1 else gives.values[START] - gets.values[START]
    return Estimate(terms, gives.values, gets.values, start, base, given, max(sure, other), at)


def _integrated(
    model: Model, exchange: Exchange, sites: Sequence[Site], change: Tensor, at: Sequence[float]
) -> dict[Site, Tensor]:
    """{site: [1, pos, ...]} the mean gradient over points of the line; several points are rows of one batch."""
    inputs = exchange.receiver
    size = 1 if inputs.extra else max(1, ROWS // inputs.ids.shape[1])
    total: dict[Site, Tensor] = {}
    for i in range(0, len(at), size):
        some = at[i : i + size]
        rows = inputs if len(some) == 1 else inputs.repeat(len(some))
        moved = torch.stack([p * change[0] for p in some])
        with differentiable(model, rows, sites, Add(START, moved)) as run:
            for site, g in run.gradients(exchange.metric).items():
                total[site] = total.get(site, 0) + g.float().sum(dim=0, keepdim=True) / len(at)
    return total


@torch.no_grad()
def _read(run: Run, exchange: Exchange) -> tuple[float, float]:
    """(metric, largest probability of a token where it reads) of one run."""
    logits = run.logits(exchange.metric)
    return float(exchange.metric.of(logits)[0]), float(logits.float().softmax(-1).max())


def measured(model: Model, exchange: Exchange, found: Estimate, cell: Site) -> tuple[float, float]:
    """(what the estimate of one cell should be, by finite differences; how far to trust that)."""
    change = part(found.gives[cell.whole()], cell, exchange.giver) - part(
        found.gets[cell.whole()], cell, exchange.giver
    )
    runs: list[list[Intervention]] = []
    for p in found.points:
        line = [] if found.start is None else [Add(START, p * found.start)]
        runs += [[*line, Add(cell, step * change)] for step in (STEP, -STEP, STEP / 2, -STEP / 2)]
    values = run_together(model, exchange.receiver, runs, exchange.metric).double().view(-1, 4)
    wide, narrow = (values[:, 0] - values[:, 1]) / (2 * STEP), (values[:, 2] - values[:, 3]) / STEP
    noise = ROUNDING * torch.finfo(model.dtype).eps * float(values.abs().max().clamp_min(1.0)) / STEP
    jump = 3 * float((wide - narrow).abs().mean())  # covers one jump in between, as where experts change
    return float(((4 * narrow - wide) / 3).mean()), jump + noise
