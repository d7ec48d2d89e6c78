"""Random components to compare named ones with, matched by layer and kind; and the proof that follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from cutaway.core.errors import ParameterError
from cutaway.core.inputs import Inputs
from cutaway.core.proof import Proof
from cutaway.ops.ablation import Ablation
from cutaway.ops.units import WHOLE, Family, Unit
from cutaway.ops.watched import WatchedModel

WORTH = 1e-3  # of the best score: what adds less is not among those that a proof takes away
UNASKED = "no proof was asked for"  # the note of a result without one
ROOM = 3  # components that there must be for each that is named
NAMED, LEAST = 10, 0.01  # most items that a proof of a grid names, and the part of the best score that each has


@dataclass(frozen=True)
class Pool:
    """All components of one family in a model.

    Attributes:
        family: kind, whether inside a head, whether by source position.
        shapes: per layer that has them: heads, neurons or experts; channels or neurons inside; source positions.
    """

    family: Family
    shapes: dict[int, tuple[int, int, int]]

    @staticmethod
    def of(model: WatchedModel, family: Family, n_positions: int) -> Pool:
        """The pool of a family in a prompt of so many positions."""
        kind, inside, by_source = family
        shapes = {}
        for i, plan in enumerate(model.layers):
            if plan.has(kind):
                first, second = 1, 1
                if kind == "attn.z":
                    first, second = plan.attention.heads, plan.attention.d_value if inside else 1
                elif kind == "mlp.act":
                    first = plan.d_mlp
                elif kind == "expert.act":
                    first, second = plan.n_experts, plan.d_expert
                shapes[i] = (first, second, n_positions if by_source else 1)
        return Pool(family, shapes)

    def __len__(self) -> int:
        return sum(a * b * c for a, b, c in self.shapes.values())

    def unit(self, layer: int, number: int) -> Unit:
        """The component of that number in a layer."""
        kind, inside, by_source = self.family
        _, second, sources = self.shapes[layer]
        rest, source = divmod(number, sources)
        index, inner = divmod(rest, second)
        return Unit(
            kind,
            layer,
            -1 if kind in WHOLE else index,
            inner if inside or kind == "expert.act" else -1,
            source if by_source else -1,
        )

    def draw(self, named: Sequence[Unit], avoid: set[Unit], generator: torch.Generator) -> list[Unit]:
        """As many others as are named, of the same layers where those have others left; none is among ``avoid``.

        Components at one position have others at that position.
        """
        drawn: list[Unit] = []
        for unit in named:
            drawn.append(self._one([unit.layer], avoid | set(drawn), generator))
        return [other._replace(at=unit.at) for other, unit in zip(drawn, named, strict=True)]

    def _one(self, layers: Sequence[int], avoid: set[Unit], generator: torch.Generator) -> Unit:
        sizes = {i: self.shapes[i][0] * self.shapes[i][1] * self.shapes[i][2] for i in layers}
        taken = sum(u.layer in sizes and u.family == self.family for u in avoid)
        if taken >= sum(sizes.values()):
            if len(layers) == len(self.shapes):
                found = f"the model has {len(self)} of its kind, of which {taken} are named or drawn"
                raise ParameterError("a random component beside those named", found, "name fewer")
            return self._one(list(self.shapes), avoid, generator)
        while True:
            layer = layers[int(torch.randint(len(layers), (), generator=generator))]
            unit = self.unit(layer, int(torch.randint(sizes[layer], (), generator=generator)))
            if unit not in avoid:
                return unit


class Draws:
    """Random counterparts of named components, in their order.

    ``distinct`` is how many of the random sets of the largest size differ, once ``sets`` has drawn them.
    """

    def __init__(self, model: WatchedModel, units: Sequence[Unit], n_positions: int, seed: int) -> None:
        self.units = list(dict.fromkeys(units))
        self.pools = {family: Pool.of(model, family, n_positions) for family in _families(units)}
        self.generator = torch.Generator().manual_seed(seed)
        self.distinct: int | None = None

    @property
    def matched(self) -> str:
        """By what they are matched, for a sentence."""
        return "kind" if any(family[0] in WHOLE for family in self.pools) else "layer and kind"

    @property
    def most(self) -> int:
        """Largest k for which every family has room for draws that differ."""
        for k in range(len(self.units), 0, -1):
            if all(ROOM * len(n) <= len(self.pools[f]) for f, n in _families(self.units[:k]).items()):
                return k
        return 0

    def draw(self, k: int) -> list[Unit]:
        """As many components as the first k, none of them among those."""
        named = self.units[:k]
        avoid = {unit._replace(at=-1) for unit in named}
        return [u for f, own in _families(named).items() for u in self.pools[f].draw(own, avoid, self.generator)]

    def sets(self, ks: Sequence[int], n_draws: int) -> list[list[Unit]]:
        """The first k of those named for every k, then as many random ones for every k, ``n_draws`` times."""
        drawn = [self.draw(k) for _ in range(n_draws) for k in ks]
        self.distinct = different(drawn[len(ks) - 1 :: len(ks)])
        return [self.units[:k] for k in ks] + drawn


def different(sets: Iterable[Iterable[Hashable]]) -> int:
    """How many sets differ; one that was drawn twice is evidence once."""
    return len({frozenset(some) for some in sets})


def _families(units: Sequence[Unit]) -> dict[Family, list[Unit]]:
    """The units by what they are matched by, in their order."""
    found: dict[Family, list[Unit]] = defaultdict(list)
    for unit in units:
        found[unit.family].append(unit)
    return dict(found)


def sizes(most: int) -> list[int]:
    """1, 3, 10, 30, ... up to ``most``, which is always among them."""
    steps = (a * 10**b for b in range(8) for a in (1, 3))
    return sorted({k for k in steps if k < most} | {most})


def prove(ablation: Ablation, draws: Draws, ks: Sequence[int], n_draws: int, ablated: str) -> Proof:
    """The drop in the target's score without the first k components, against random ones."""
    sets = draws.sets(ks, n_draws)
    base = float(ablation.base().score[0])
    drop = base - ablation(sets).score.double()
    random = drop[len(ks) :].view(n_draws, len(ks))
    return proof_of(drop[: len(ks)], random, ks, ablated, draws.matched, ablation.measures, draws.distinct)


def worthwhile(units: Sequence[Unit], scores: Sequence[float]) -> list[Unit]:
    """The components that add something to speak of, in their order."""
    best = max(scores, default=0.0)
    return [unit for unit, score in zip(units, scores, strict=True) if score > max(0.0, WORTH * best)]


def prove_best(
    model: WatchedModel,
    inputs: Inputs,
    ids: Sequence[int],
    units: Sequence[Unit],
    scores: Sequence[float],
    n_draws: int,
    seed: int,
    what: str,
    rival: int | None = None,
) -> tuple[Proof | None, list[str]]:
    """The proof of a ranking: its best components zeroed against random ones; or a note that says why there is none.

    Those that score less than a thousandth of the best are not among the components that are taken away.
    """
    if n_draws == 0:
        return None, [UNASKED]
    drawer = Draws(model, worthwhile(units, scores), inputs.ids.shape[1], seed)
    if drawer.most == 0:
        return None, ["no proof: nothing adds to the answer, or there are too few others to compare with"]
    ablation = Ablation(model, inputs, ids, rival=rival)
    return prove(ablation, drawer, sizes(drawer.most), n_draws, f"zeroing the top {what}"), []


def proof_of(
    effect: torch.Tensor,
    random: torch.Tensor,
    ks: Sequence[int],
    ablated: str,
    matched: str,
    measures: tuple[str, str] = ("log p(target)", "nats"),
    distinct: int | None = None,
) -> Proof:
    """The proof of drops in what ``measures`` names: [k] without the first k, [draw, k] without random ones."""
    return Proof(
        ablated=ablated,
        ks=tuple(ks),
        effect=effect.numpy(),
        random=random.numpy(),
        metric=measures[0],
        unit=measures[1],
        matched=matched,
        distinct=distinct,
    )


def others(named: Sequence[int], groups: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many items as are named, none of them among those, of the same groups where those have others left.

    Items are numbers into ``groups``; there must be at least twice as many as are named.
    """
    free: dict[int, list[int]] = defaultdict(list)
    for item in sorted(set(range(len(groups))) - set(named)):
        free[groups[item]].append(item)
    drawn: list[int] = []
    for item in named:
        alike = free[groups[item]] or [each for group in free.values() for each in group]
        drawn.append(alike[int(torch.randint(len(alike), (), generator=generator))])
        free[groups[drawn[-1]]].remove(drawn[-1])
    return drawn


def prove_sets(
    effect: Callable[[list[list[int]]], torch.Tensor],
    scores: torch.Tensor,
    groups: Sequence[int],
    n_draws: int,
    seed: int,
    **said: str,
) -> Proof | None:
    """The effect of the items that score highest, together, against random others of their groups.

    Args:
        effect: [set] the effect of each set of items, larger for stronger. scores: [item]; NaN for what is no item.
        groups: [item] what random items are matched by. said: the words of the proof.

    Returns:
        None where no item scores above 0, or there are too few others.
    """
    there = [i for i, score in enumerate(scores.tolist()) if score == score]
    top = sorted(there, key=lambda i: -float(scores[i]))[: min(NAMED, len(there) // ROOM)]
    best = float(scores[top[0]]) if top else 0.0
    named = [i for i in top if float(scores[i]) > max(0.0, LEAST * best)]
    if not named or n_draws == 0:
        return None
    where = {item: n for n, item in enumerate(there)}
    own = [groups[i] for i in there]
    generator = torch.Generator().manual_seed(seed)
    ks = sizes(len(named))
    random = [
        [there[n] for n in others([where[i] for i in named[:k]], own, generator)] for _ in range(n_draws) for k in ks
    ]
    found = effect([named[:k] for k in ks] + random).double()
    n = len(ks)
    return Proof(
        ks=tuple(ks),
        effect=found[:n].numpy(),
        random=found[n:].view(n_draws, n).numpy(),
        distinct=different(random[n - 1 :: n]),
        **said,
    )
