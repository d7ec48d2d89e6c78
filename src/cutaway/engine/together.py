"""Runs of several interventions each, on one prompt: rows of a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.core.errors import SiteMissingError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Intervention, Where
from cutaway.core.metric import Metric
from cutaway.core.progress import track
from cutaway.core.site import KINDS, Items, Site
from cutaway.engine.readout import Readout
from cutaway.models.handle import Model
from cutaway.models.region import Region, Window

ROWS = 2048
"""Positions in one batch beyond which a pass gets no faster per row."""
BUDGET = 2**28
"""Bytes for scoring rows."""


def run_together(
    model: Model, inputs: Inputs, runs: Sequence[Sequence[Intervention]], metric: Metric, what: str = "runs"
) -> Tensor:
    """[run] the metric after the interventions of each run, all at once; float32 on the CPU.

    Each run is a row of a batch, and only the positions that the metric reads are unembedded. Prompts with images run
    one by one. ``inputs`` are prepared; the sites of the interventions name one layer each. Interventions of a run at
    one place are done in their order.
    """
    anatomy = model.anatomy(inputs)
    if inputs.extra or "readout" in anatomy.refused or not anatomy.tail:
        return torch.stack([_alone(model, inputs, run, metric) for run in track(runs, what, total=len(runs))])
    reads = metric.reads(inputs)[0]
    readout = Readout(model, metric, len(reads), BUDGET)
    real = inputs.real[0]
    end = Site("resid_post", Items.of(model.n_layers - 1), positions=Items.of([real.index(p) for p in reads]))
    size = max(1, ROWS // inputs.ids.shape[1])
    found = []
    for start in track(range(0, len(runs), size), what, total=-(-len(runs) // size)):
        some = runs[start : start + size]
        rows = inputs if len(some) == 1 else inputs.repeat(len(some))
        states = model.trace(rows, want=end, do=as_rows(model, inputs, some), stop=True)[end]
        found.append(readout(states).float().cpu())
    return torch.cat(found) if found else torch.empty(0)


def as_rows(model: Model, inputs: Inputs, runs: Sequence[Sequence[Intervention]]) -> list[Apply]:
    """Interventions on the prompt repeated once per run, that do to each row what its run says."""
    places: dict[Site, list[tuple[int, Site, Intervention]]] = defaultdict(list)
    for row, run in enumerate(runs):
        for item in run:
            for site in model.expand(item.at, inputs):
                places[site.whole()].append((row, site, item))
    window = Window(inputs, inputs.real)
    return [_at_place(place, items, window) for place, items in places.items()]


def _at_place(place: Site, items: Sequence[tuple[int, Site, Intervention]], window: Window) -> Apply:
    def change(x: Tensor, where: Where) -> Tensor:
        new = x.clone()
        for row, site, item in items:
            one = new[row : row + 1]
            region = Region(site, one.shape, window)
            new[row : row + 1] = region.put(one, item(region.get(one), Where(site, KINDS[site.kind].axes)))
        return new

    return Apply(place, change)


def _alone(model: Model, inputs: Inputs, run: Sequence[Intervention], metric: Metric) -> Tensor:
    logits = model.trace(inputs, do=list(run)).logits
    if logits is None:
        raise SiteMissingError("logits", "the run stopped before them", "run it to the end")
    return metric(logits, inputs)[0].float().cpu()
