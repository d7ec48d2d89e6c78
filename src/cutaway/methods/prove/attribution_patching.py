"""Attribution patching: what patching every activation would do, estimated from gradients, the strongest recomputed."""

from __future__ import annotations

from typing import Annotated

import annotated_types
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Layers, MetricLike, Positions, Prompt
from cutaway.core.proof import Check, Proof
from cutaway.engine.estimate import Estimate, estimate, measured
from cutaway.engine.patching import By, Cells, Direction, Exchange, Kind
from cutaway.engine.replay import BUDGET, replay
from cutaway.engine.together import run_together
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_sets
from cutaway.ops.stats import rank_correlation
from cutaway.results.grid import Grid

SATURATED = 0.99
"""A probability from which on log-probabilities and probabilities hardly move, whatever is patched."""
POOR = 0.5
"""Rank correlation with what was measured below which a warning says so."""


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
    clean: Prompt,
    corrupt: Prompt,
    metric: MetricLike | None = None,
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

    Sources: Nanda (2023), "Attribution patching: activation patching at industrial scale"; for several steps Hanna,
    Pezzelle and Belinkov (2024), "Have faith in faithfulness".

    Args:
        clean: text or ids of the prompt whose answer is right.
        corrupt: text or ids of equal token length.
        metric: what is measured; by default the logit difference between the answers of the two prompts.
        kind: the kind of site that is patched.
        by: one cell per position, or per head, expert or block of neurons (at all ``positions``).
        layers: the layers to patch; all that have the kind when it is not given.
        positions: the positions to patch.
        blocks: into how many blocks neurons are divided; as many as there are neurons costs no more.
        steps: gradients at the receiving run (1), or averaged over so many points between the two runs (5 to 10).
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        verify: how many of the strongest cells are patched for real and compared.
        clean_image: image of the clean prompt.
        corrupt_image: image of the corrupt prompt; the clean one when it is not given.
        draws: random sets of the proof, at least 5; 0 leaves it out.
        seed: of the draws.
        budget: bytes that the replayed rows may take.

    Returns:
        estimated recovery, or change of the metric in its unit, [layer, position | head | expert | block].

    Raises:
        MismatchError: prompts of different token length, naming the tokens. ParameterError: ``by`` does not fit the
        kind, the metric has no gradient, or both runs give the same value. TokenError: a token that is none.
    """
    exchange = Exchange.of(model, clean, corrupt, metric, direction, (clean_image, corrupt_image))
    cells = Cells.of(model, kind, by, layers, positions, blocks, exchange.prompt)
    found = estimate(model, exchange, cells.sites, steps)
    between = found.given - found.base
    if normalise and abs(between) < 1e-6:
        said, hint = f"both runs give {found.base:.6g}", "choose prompts that differ in it, or normalise=False"
        raise ParameterError(f"metric '{exchange.metric}'", said, hint)
    values = cells.sums(found.terms)
    strongest = values.flatten().abs().argsort(descending=True, stable=True)
    first = float(values.flatten()[strongest[0]])
    exact, trust = measured(model, exchange, found, cells.flat[int(strongest[0])])
    unit = exchange.metric.unit
    notes = [
        f"{exchange.metric}: {found.base:.6g} in the run that receives, {found.given:.6g} in the run that gives "
        f"({unit})",
        *_verified(model, exchange, cells, found, values.flatten(), strongest[:verify], budget),
    ]
    if found.sure > SATURATED:
        notes.append(
            f"a token has probability {found.sure:.4f} where the metric reads: probabilities saturate there, and "
            "gradients of them vanish; a logit difference does not"
        )
    proof = _proof(model, exchange, cells, found, values.flatten() * (1 if between >= 0 else -1), draws, seed)
    return Grid(
        title=f"{kind} patched {direction} in {model.name}, estimated in {steps} step{'s'[: steps > 1]}",
        values=values / between if normalise else values,
        axes=("layer", cells.axis),
        measure="estimated recovery" if normalise else f"estimated change of {exchange.metric}",
        unit="1 = the run that gives" if normalise else unit,
        labels={"layer": cells.layers, cells.axis: cells.labels},
        check=Check(
            name="the strongest estimate is what finite differences give, within their own error",
            value=max(0.0, abs(first - exact) - trust),
            tolerance=0.0,
            sentence=f"{first:.6g} against {exact:.6g}, which is known to {trust:.2g}",
        ),
        proof=proof,
        notes=tuple(notes if proof is not None or draws == 0 else [*notes, "no proof: no cell promises anything"]),
    )


def _verified(
    model: Model, exchange: Exchange, cells: Cells, found: Estimate, values: Tensor, top: Tensor, budget: int
) -> list[str]:
    """What patching the strongest cells for real says about their estimates."""
    if not len(top):
        return ["no estimate was verified"]
    named = [cells.flat[int(i)] for i in top]
    sweep = cells.patches(found.gives, exchange.giver, named)
    replayed = replay(model, exchange.prompt, sweep, exchange.metric, budget=budget)
    exact = (replayed.values - replayed.base).double().cpu()
    error, agree = (values[top] - exact).abs(), rank_correlation(values[top], exact)
    worst = int(error.argmax())
    said = (
        f"the {len(top)} strongest patched for real ({replayed.how}): rank correlation {agree:.2f}, largest error "
        f"{float(error[worst]):.3g} {exchange.metric.unit}, at {named[worst]}: "
        f"{float(values[top][worst]):.3g} estimated, {float(exact[worst]):.3g} measured"
    )
    poor = len(top) > 1 and agree < POOR
    return [said, "the estimates do not rank as the measurements do: use 'patch' here"] if poor else [said]


def _proof(
    model: Model, exchange: Exchange, cells: Cells, found: Estimate, promised: Tensor, draws: int, seed: int
) -> Proof | None:
    sign = 1 if found.given >= found.base else -1

    def effect(sets: list[list[int]]) -> Tensor:
        runs = [cells.patches(found.gives, exchange.giver, [cells.flat[i] for i in some]) for some in sets]
        return sign * (run_together(model, exchange.receiver, runs, exchange.metric, "proof") - found.base)

    return prove_sets(
        effect,
        promised,
        [cell.layer for cell in cells.flat],
        draws,
        seed,
        ablated="patching the cells that promise most",
        metric=str(exchange.metric),
        unit=exchange.metric.unit,
        matched="layer and kind",
    )
