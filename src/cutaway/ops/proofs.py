"""Proofs of several sets of components at once: all sets, and all random ones, are rows of the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cutaway.core.proof import Proof
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import Draws, proof_of
from cutaway.ops.units import Unit

JOINT = "joint"  # the name of the proof of several sets together


@dataclass(frozen=True)
class Proved:
    """What taking sets of components away did.

    Attributes:
        proofs: by name. unproved: why there is none, by name.
        alone: the drop without each single component that was asked for.
    """

    proofs: dict[str, Proof] = field(default_factory=dict)
    unproved: dict[str, str] = field(default_factory=dict)
    alone: dict[Unit, float] = field(default_factory=dict)


def prove_together(
    ablation: Ablation,
    named: Mapping[str, Sequence[Unit]],
    joint: Sequence[str],
    alone: Sequence[Unit],
    n_draws: int,
    seed: int,
    words: Mapping[str, str],
) -> Proved:
    """The proof of every set in ``named``, of those in ``joint`` together, and the drop without each of ``alone``.

    A set is made smaller until there is room for random ones of its kind; one that is empty then has no proof.
    ``words`` says how the sets are called in a sentence.
    """
    found = Proved()
    drawers: dict[str, Draws] = {}
    for name, units in named.items():
        drawer = _roomy(ablation, units, seed)
        if drawer.units:
            drawers[name] = drawer
        else:
            why = "there are too few others to compare with" if units else "nothing that it names adds to the answer"
            found.unproved[name] = why
    both = [unit for name in joint if name in drawers for unit in drawers[name].units]
    if both:
        drawers[JOINT] = _roomy(ablation, both, seed)
    sets: list[Sequence[Unit]] = [[unit] for unit in alone]
    for drawer in drawers.values():
        sets += drawer.sets([len(drawer.units)], n_draws)
    if not sets:
        return found
    drop = float(ablation.base().score[0]) - ablation(sets).score.double()
    found.alone.update(zip(alone, drop[: len(alone)].tolist(), strict=True))
    at = len(alone)
    for name, drawer in drawers.items():
        effect, random = drop[at : at + 1], drop[at + 1 : at + 1 + n_draws, None]
        parts = [each for each in joint if each in drawers] if name == JOINT else [name]
        what = f"zeroing the top {' and '.join(words.get(each, each) for each in parts)}"
        found.proofs[name] = proof_of(
            effect, random, [len(drawer.units)], what, drawer.matched, ablation.measures, drawer.distinct
        )
        at += 1 + n_draws
    return found


def _roomy(ablation: Ablation, units: Sequence[Unit], seed: int) -> Draws:
    """The draws of as many units as there is room for; none where there is none."""
    drawer = Draws(ablation.model, units, ablation.inputs.ids.shape[1], seed)
    drawer.units = drawer.units[: drawer.most]
    return drawer
