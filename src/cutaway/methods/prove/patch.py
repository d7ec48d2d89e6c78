"""Activation patching: which activations carry the difference between two prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.params import Count, Image, Layers, MetricLike, Positions, Prompts, Target
from cutaway.core.progress import track
from cutaway.core.proof import Check
from cutaway.core.site import Site
from cutaway.engine.exchanges import Kept, called, exchanges, size_of
from cutaway.engine.patching import By, Cells, Direction, Exchange, Kind
from cutaway.engine.replay import BUDGET, replay
from cutaway.models.handle import Model
from cutaway.ops.means import Ends, means_of, over
from cutaway.results.grid import Grid


@method(
    cites="zhang2024patching",
    example={"clean": "#5 #9 #6 #7", "corrupt": "#5 #4 #6 #7", "metric": "logit_diff: #11, #22"},
)
def patch(
    model: Model,
    clean: Prompts,
    corrupt: Prompts,
    metric: MetricLike | None = None,
    answers: list[Target] | None = None,
    rivals: list[Target] | None = None,
    kind: Kind = "resid_pre",
    by: By = "position",
    layers: Layers | None = None,
    positions: Positions = "all",
    blocks: Count = 16,
    direction: Direction = "clean->corrupt",
    normalise: bool = True,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    budget: Count = BUDGET,
) -> Grid:
    """The metric after putting one activation of one run into the other, for every layer and position, head or block.

    With ``clean->corrupt`` the corrupt prompt runs and receives clean activations: what restores the answer? With
    ``corrupt->clean`` the clean prompt runs and is damaged. Normalised, 0 is the run that receives and 1 the run that
    gives. Runs are replayed: what an intervention cannot change is not computed again. The check recomputes the
    strongest cell in a whole forward pass.

    Of several pairs of prompts come means over pairs with their standard errors. Normalised, that is the mean change
    divided by the mean difference of the runs, so that pairs whose runs hardly differ do not count for more.

    Source: Zhang and Nanda (2024), "Towards best practices of activation patching in language models".

    Args:
        clean: prompts whose answer is right, one or several.
        corrupt: as many prompts, each of the token length of its clean one.
        metric: what is measured, e.g. ``logit_diff: #11, #22``; by default the logit difference between the answers
            of each pair's two prompts.
        answers: instead of a metric: each pair's own answer, whose log-probability is measured.
        rivals: each pair's own rival, whose logit is then taken off that of the answer.
        kind: the kind of site that is patched.
        by: one cell per position, or per head, expert or block of neurons (at all ``positions``). Positions need as
            many in every pair: where lengths differ, count them from the end (``-3--1``).
        layers: the layers to patch; all that have the kind when it is not given.
        positions: the positions to patch.
        blocks: into how many blocks neurons are divided.
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        clean_image: image of the clean prompts.
        corrupt_image: image of the corrupt prompts; the clean one when it is not given.
        budget: bytes that the replayed rows may take, and what is kept of all pairs.

    Returns:
        normalised recovery, or the metric in its unit, [layer, position | head | expert | block]; the mean of pairs.

    Raises:
        MismatchError: prompts of different token length, naming the row and the tokens; unequal numbers of prompts; or
        pairs that do not have as many positions. ParameterError: ``by`` does not fit the kind, or both runs give the
        same value.
    """
    pairs = exchanges(model, clean, corrupt, metric, answers, rivals, direction, (clean_image, corrupt_image))
    cells = Cells.over(model, kind, by, layers, positions, blocks, [pair.prompt for pair in pairs])
    sources = Kept(lambda i: dict(model.trace(pairs[i].giver, want=cells[i].sites, stop=True)), size_of, budget)
    swept, given = [], []
    for i, pair in enumerate(track(pairs, "pairs", total=len(pairs))):
        source = model.trace(pair.giver, want=cells[i].sites)
        sources.put(i, dict(source))
        given.append(pair.scored(source.logits, pair.giver))
        patches = cells[i].patches(source, pair.giver)
        swept.append(replay(model, pair.prompt, patches, pair.metric, budget=budget))
    values = torch.stack([each.values.float() for each in swept])
    unit, measure = pairs[0].metric.unit, called(pair.metric for pair in pairs)
    ends = Ends.of([(float(each.base), end) for each, end in zip(swept, given, strict=True)], measure, unit)
    changes = torch.stack([row - base for row, base in zip(values, ends.base, strict=True)])
    strongest = int(changes.mean(0).abs().argmax())
    check = _check(model, pairs, cells, sources, values[:, strongest], strongest, ends)
    if normalise:
        ends.require_difference()
    grid, error = ends.shares(changes) if normalise else over(values)
    shape = (len(cells[0].rows), -1)
    return Grid(
        title=f"{kind} patched {direction} in {model.name}{means_of(len(pairs))}",
        values=grid.reshape(shape),
        standard_error=None if error is None else error.reshape(shape),
        axes=("layer", cells[0].axis),
        measure="normalised recovery" if normalise else measure,
        unit="1 = the run that gives" if normalise else unit,
        center=0.0 if normalise else ends.means[0],
        labels={"layer": cells[0].layers, cells[0].axis: cells[0].labels},
        check=check,
        notes=(*ends.notes(), f"how: {' or '.join(dict.fromkeys(each.how for each in swept))}"),
    )


def _check(
    model: Model,
    pairs: Sequence[Exchange],
    cells: Sequence[Cells],
    sources: Kept[dict[Site, Tensor]],
    found: Tensor,
    strongest: int,
    ends: Ends,
) -> Check:
    """The strongest cell of every pair again, in a whole forward pass; the pair where it is furthest off counts."""
    errors = []
    for i, pair in enumerate(pairs):
        do = cells[i].patches(sources[i], pair.giver, [cells[i].flat[strongest]])
        exact = pair.scored(model.trace(pair.receiver, do=do).logits, pair.receiver)
        errors.append(abs(exact - float(found[i])))
    return Check(
        name="the strongest cell, in a whole forward pass",
        value=max(errors),
        tolerance=1e-4 * max(1.0, float(ends.differences.abs().max())),
    )
