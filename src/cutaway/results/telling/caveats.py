"""What to keep in mind about an explanation: where its numbers mislead, seen from the numbers themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from cutaway.ops.stats import rank_correlation
from cutaway.ops.units import Unit
from cutaway.results.imagemap import ImageMap
from cutaway.results.ranking import Ranking
from cutaway.results.telling.words import NOUNS, listed, percent, token

if TYPE_CHECKING:
    from cutaway.results.explanation import Explanation

SATURATED = 0.95
SINK_SHARE = 0.3
IMAGE_SHARE = 0.2
LITTLE = 0.1  # a drop that hardly changes a probability
AGREES, FEWEST = 0.3, 4
STAND_IN = 5.0  # times what all lose one by one: so much more do they lose together when they stand in for each other
DROP = "drop without it"
"""The column of a ranking that says what is lost without one component alone."""


def caveats(told: Explanation) -> tuple[str, ...]:
    """The caveats that apply, in sentences."""
    makers = (_unproved, _another, _image, _saturated, _little, _sinks, _static, _checks)
    return tuple(sentence for make in makers for sentence in make(told))


def _unproved(told: Explanation) -> Iterator[str]:
    if not told.proofs:
        yield "No part has a causal proof: what follows is where the numbers are, not what the answer depends on."


def _another(told: Explanation) -> Iterator[str]:
    if told.rank:
        yield (
            f"{token(told.target)} is not what the model says ({token(told.answers[0])}): the parts tell what raises "
            "it, not why it lost."
        )


def _image(told: Explanation) -> Iterator[str]:
    """An answer that the image has little part in."""
    patches = told.parts.get("image_patches")
    if not isinstance(patches, ImageMap):
        return
    share = patches.figures.get("image share", 1.0)
    if share < IMAGE_SHARE:
        yield (
            f"Likely a hallucination: the image's share of what positions bring for and against the answer is "
            f"{share:.2f}; the rest comes from the words of the question (an absence, too, is shown by no patch)."
        )


def _saturated(told: Explanation) -> Iterator[str]:
    chance = math.exp(told.log_prob)
    if chance > SATURATED and not told.versus and len(told.answers) > 1:
        rival = told.answers[1] if told.answers[0] == told.target else told.answers[0]
        yield (
            f"The probability is saturated ({percent(chance)}): late layers hardly can add to it. The logit difference "
            f"shows them: --versus {rival!r}."
        )


def _little(told: Explanation) -> Iterator[str]:
    """Proofs that hold and show next to nothing."""
    small = [name for name, proof in told.proofs.items() if proof.holds and proof.effect[-1] < LITTLE]
    if small:
        most = max(float(told.proofs[name].effect[-1]) for name in small)
        yield (
            f"More than random, yet next to nothing (at most {most:.2g} {told.proofs[small[0]].unit}) is lost without "
            f"the {listed([NOUNS.get(name, name) for name in small])} named; others make up for them."
        )


def _sinks(told: Explanation) -> Iterator[str]:
    """Heads that read the first position park their attention there when they have nothing to do."""
    places = told.parts.get("head_positions")
    if not isinstance(places, Ranking) or len(told.tokens) < 2:
        return
    scores = np.maximum(np.nan_to_num(places.scores), 0)
    first = np.array([Unit.parse(item).source == 0 for item in places.items], dtype=bool)
    share = float(scores[first].sum() / scores.sum()) if scores.sum() > 0 else 0.0
    if share > SINK_SHARE:
        yield (
            f"{share:.0%} of what the named heads bring is read from the first position {token(told.tokens[0])}: an "
            "attention sink, whose value is much the same in every prompt."
        )


def _static(told: Explanation) -> Iterator[str]:
    """Where what components add and what is lost without them do not go together."""
    for name, part in told.parts.items():
        if not isinstance(part, Ranking) or DROP not in part.columns or part.proof is None:
            continue
        noun = name.replace("_", " ")
        drop = np.asarray(part.columns[DROP], dtype=np.float64)
        good = np.isfinite(drop)
        together = float(part.proof.effect[-1])
        largest = float(drop[good].max(initial=0.0))
        if good.sum() > 1 and together > STAND_IN * np.abs(drop[good]).sum():
            yield (
                f"The {noun} stand in for one another: without all {part.proof.ks[-1]} the answer loses {together:.3g} "
                f"{part.proof.unit}, without any one of them at most {largest:.2g}."
            )
            continue
        agree = rank_correlation(torch.tensor(part.scores[good]), torch.tensor(drop[good]))
        if good.sum() >= FEWEST and agree < AGREES:
            yield (
                f"What the {noun} add and what is lost without each of them do not go together (rank correlation "
                f"{agree:.2f}): the drop, which is measured, counts."
            )


def _checks(told: Explanation) -> Iterator[str]:
    for name, part in told.parts.items():
        if part.check is not None and not part.check.holds:
            yield f"The own check of the part {name.replace('_', ' ')} fails: {part.check}."
