"""Attribution patching: what patching every activation would do, estimated from gradients, the strongest recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import annotated_types
import torch
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Layers, MetricLike, Positions, Prompts, Target
from cutaway.core.progress import track
from cutaway.core.proof import Check, Proof
from cutaway.engine.estimate import Estimate, estimates, measured, seen_again
from cutaway.engine.exchanges import Kept, called, exchanges
from cutaway.engine.patching import By, Cells, Direction, Exchange, Kind
from cutaway.engine.replay import BUDGET, replay
from cutaway.engine.together import run_together
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_sets
from cutaway.ops.means import Ends, means_of, over
from cutaway.ops.stats import FAINT, POOR, missed, rank_correlation
from cutaway.results.grid import Grid

SATURATED = 0.99
"""A probability from which on log-probabilities and probabilities hardly move, whatever is patched."""


@method(
    cites=("nanda2023attribution", "hanna2024faith"),
    example={
        "clean": "#5 #9 #6 #7",
        "corrupt": "#5 #4 #6 #7",
        "metric": "logit_diff: #11, #22",
        "kind": "attn.z",
        "by": "head",
        "steps": "2",
    },
)
def attribution_patching(
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
    steps: Count = 1,
    direction: Direction = "clean->corrupt",
    normalise: bool = True,
    verify: Annotated[int, annotated_types.Ge(0)] = 10,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    draws: DrawCount = Proof.MIN_DRAWS,
    seed: int = 0,
    budget: Count = BUDGET,
) -> Grid:
    """What ``patch`` would find in every cell, estimated from one forward and one backward pass per step for all cells.

    The estimate of a cell is the change of its activation from the run that receives to the run that gives, times the
    gradient of the metric there. The strongest cells are then patched for real. Weights take no part in the backward
    pass, and only the positions that the metric reads are unembedded. The check compares the strongest estimate with
    finite differences; the proof patches the cells that promise most, together, against random ones.

    Of several pairs of prompts come means over pairs with their standard errors; pairs of one length are rows of a
    batch. Normalised, that is the mean change divided by the mean difference of the runs, so that pairs whose runs
    hardly differ do not count for more.

    Sources: Nanda (2023), "Attribution patching: activation patching at industrial scale"; for several steps Hanna,
    Pezzelle and Belinkov (2024), "Have faith in faithfulness".

    Args:
        clean: prompts whose answer is right, one or several.
        corrupt: as many prompts, each of the token length of its clean one.
        metric: what is measured; by default the logit difference between the answers of each pair's two prompts.
        answers: instead of a metric: each pair's own answer, whose log-probability is measured.
        rivals: each pair's own rival, whose logit is then taken off that of the answer.
        kind: the kind of site that is patched.
        by: one cell per position, or per head, expert or block of neurons (at all ``positions``). Positions need as
            many in every pair: where lengths differ, count them from the end (``-3--1``).
        layers: the layers to patch; all that have the kind when it is not given.
        positions: the positions to patch.
        blocks: into how many blocks neurons are divided; as many as there are neurons costs no more.
        steps: gradients at the receiving run (1), or averaged over so many points between the two runs (5 to 10).
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        verify: how many of the strongest cells are patched for real and compared.
        clean_image: image of the clean prompts.
        corrupt_image: image of the corrupt prompts; the clean one when it is not given.
        draws: random sets of the proof, at least 5; 0 leaves it out.
        seed: of the draws.
        budget: bytes that the replayed rows may take, a backward pass, and what is kept of all pairs.

    Returns:
        estimated recovery, or change of the metric in its unit, [layer, position | head | expert | block]; the mean of
        several pairs.

    Raises:
        MismatchError: prompts of different token length, naming the row and the tokens; unequal numbers of prompts; or
        pairs that do not have as many positions. ParameterError: ``by`` does not fit the kind, the metric has no
        gradient, or both runs give the same value. TokenError: a token that is none.
    """
    pairs = exchanges(model, clean, corrupt, metric, answers, rivals, direction, (clean_image, corrupt_image))
    cells = Cells.over(model, kind, by, layers, positions, blocks, [pair.prompt for pair in pairs])
    swept = _Swept(model, pairs, cells, steps, budget)
    both, unit = swept.ends, pairs[0].metric.unit
    if normalise:
        both.require_difference()
    mean = swept.values.mean(0)
    strongest = mean.abs().argsort(descending=True, stable=True)
    first, (exact, trust) = float(mean[strongest[0]]), swept.measured(int(strongest[0]))
    notes = [*both.notes(), *_verified(swept, mean, strongest[:verify], budget, unit)]
    if swept.sure > SATURATED:
        notes.append(
            f"a token has probability {swept.sure:.4f} where the metric reads: probabilities saturate there, and "
            "gradients of them vanish; a logit difference does not"
        )
    proof = prove_sets(
        lambda sets: both.sign * swept.patched(sets),
        mean * both.sign,
        [cell.layer for cell in cells[0].flat],
        draws,
        seed,
        ablated="patching the cells that promise most",
        metric=both.metric,
        unit=unit,
        matched="layer and kind",
    )
    grid, error = both.shares(swept.values) if normalise else over(swept.values)
    shape = (len(cells[0].rows), -1)
    estimated = f"estimated in {steps} step{'s'[: steps > 1]}"
    return Grid(
        title=f"{kind} patched {direction} in {model.name}, {estimated}{means_of(len(pairs))}",
        values=grid.view(shape),
        standard_error=None if error is None else error.view(shape),
        axes=("layer", cells[0].axis),
        measure="estimated recovery" if normalise else f"estimated change of {both.metric}",
        unit="1 = the run that gives" if normalise else unit,
        labels={"layer": cells[0].layers, cells[0].axis: cells[0].labels},
        check=Check(
            name="the strongest estimate is what finite differences give, within their own error",
            value=max(0.0, abs(first - exact) - trust),
            tolerance=0.0,
            sentence=f"{first:.6g} against {exact:.6g}, which is known to {trust:.2g}",
        ),
        proof=proof,
        notes=tuple(notes if proof is not None or draws == 0 else [*notes, "no proof: no cell promises anything"]),
    )


class _Swept:
    """The estimates of several pairs, and what patching really does in them.

    Attributes:
        values: [pair, cell] estimated change of the metric, float64.
        ends: the metric at both ends of every pair.
        sure: the largest probability of a token where the metric reads.
    """

    def __init__(
        self, model: Model, pairs: Sequence[Exchange], cells: Sequence[Cells], steps: int, budget: int
    ) -> None:
        self.model, self.pairs, self.cells = model, pairs, cells
        light: dict[int, Estimate] = {}
        self._seen = Kept(
            lambda i: seen_again(model, pairs[i], cells[i].sites, light[i]), lambda one: one.bytes, budget
        )
        rows: dict[int, Tensor] = {}
        ends: dict[int, tuple[float, float]] = {}
        self.sure = 0.0
        found = estimates(model, pairs, cells[0].sites, steps, budget)
        for i, one in track(found, "pairs", total=len(pairs)):
            rows[i], ends[i] = cells[i].sums(one.terms).flatten(), (one.base, one.given)
            self.sure = max(self.sure, one.sure)
            light[i] = one.light
            self._seen.put(i, replace(one, terms={}))
        numbers = range(len(pairs))
        self.values = torch.stack([rows[i] for i in numbers])
        self.ends = Ends.of([ends[i] for i in numbers], called(p.metric for p in pairs), pairs[0].metric.unit)

    def measured(self, cell: int) -> tuple[float, float]:
        """(what a cell's mean estimate should be, by finite differences; how far to trust that)."""
        found = [
            measured(self.model, pair, self._seen[i], self.cells[i].flat[cell]) for i, pair in enumerate(self.pairs)
        ]
        exact, trust = (sum(column) / len(found) for column in zip(*found, strict=True))
        return exact, trust

    def exact(self, cells: Tensor, budget: int) -> tuple[Tensor, str]:
        """([cell] mean change of the metric when each of these cells alone is patched, how they ran)."""
        found = []
        for i, pair in enumerate(self.pairs):
            some = [self.cells[i].flat[cell] for cell in cells.tolist()]
            sweep = self.cells[i].patches(self._seen[i].gives, pair.giver, some)
            found.append(replay(self.model, pair.prompt, sweep, pair.metric, budget=budget))
        changes = torch.stack([(one.values - one.base).double() for one in found])
        return changes.mean(0), " or ".join(dict.fromkeys(one.how for one in found))

    def patched(self, sets: Sequence[Sequence[int]]) -> Tensor:
        """[set] the mean change of the metric when all cells of a set are patched together."""
        changes = []
        for i, pair in enumerate(self.pairs):
            gives, own = self._seen[i].gives, self.cells[i]
            runs = [own.patches(gives, pair.giver, [own.flat[cell] for cell in some]) for some in sets]
            found = run_together(self.model, pair.receiver, runs, pair.metric, "proof")
            changes.append(found - self.ends.base[i])
        return torch.stack(changes).mean(0)


def _verified(swept: _Swept, values: Tensor, top: Tensor, budget: int, unit: str) -> list[str]:
    """What patching the strongest cells for real says about their estimates."""
    if not len(top):
        return ["no estimate was verified"]
    exact, how = swept.exact(top, budget)
    error, agree = (values[top] - exact).abs(), rank_correlation(values[top], exact)
    strongest, between = float(values[top].abs().max()), abs(swept.ends.between)
    part = missed(values[top], exact, between)
    worst = int(error.argmax())
    named = swept.cells[0].flat[int(top[worst])]
    said = (
        f"the {len(top)} strongest patched for real ({how}): rank correlation {agree:.2f}, largest error "
        f"{float(error[worst]):.3g} {unit}, at {named}: "
        f"{float(values[top][worst]):.3g} estimated, {float(exact[worst]):.3g} measured"
    )
    notes = [said]
    if part > POOR:
        notes.append(f"that is {part:.0%} of the largest effect: use 'patch' here")
    if strongest < FAINT * between:
        notes.append(
            f"no cell is estimated at more than {strongest:.2g} {unit}, and the runs differ by {between:.3g}: "
            "gradients may have vanished, which only 'patch' can tell"
        )
    return notes
