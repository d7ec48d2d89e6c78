"""Games of known interactions: players are present or absent, and the value is a sum of ANDs and ORs of them.

>>> game = Game(players=3, ands={(0, 1): 2.0}, ors={(1, 2): -1.0})
>>> game.value(np.array([True, True, False]))
1.0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import numpy as np

Players = tuple[int, ...]


@dataclass(frozen=True)
class Game:
    """A function of which players are present.

    Attributes:
        players: how many.
        ands: players -> what is added when all of them are present.
        ors: players -> what is added when any of them is present.
        constant: what is there without anybody.
    """

    players: int
    ands: Mapping[Players, float] = field(default_factory=dict)
    ors: Mapping[Players, float] = field(default_factory=dict)
    constant: float = 0.0

    def value(self, present: np.ndarray) -> np.ndarray:
        """The value for masks of shape (..., player); returns (...), float64."""
        present = np.asarray(present, dtype=bool)
        total = np.full(present.shape[:-1], self.constant, dtype=np.float64)
        for members, weight in self.ands.items():
            total = total + weight * present[..., list(members)].all(-1)
        for members, weight in self.ors.items():
            total = total + weight * present[..., list(members)].any(-1)
        return total

    def masks(self) -> np.ndarray:
        """Every coalition: (2 ** players, player), bool; bit i of the row's number is player i."""
        return (np.arange(2**self.players)[:, None] >> np.arange(self.players)) % 2 == 1

    def in_ands(self) -> dict[Players, float]:
        """The one way to write the game with ANDs alone (Harsanyi dividends), terms of weight 0 left out.

        An OR of S is, over every part L of S that is not empty, (-1) ** (len(L) + 1) times the AND of L.
        """
        found: dict[Players, float] = dict(self.ands)
        for members, weight in self.ors.items():
            for bits in range(1, 2 ** len(members)):
                part = tuple(m for i, m in enumerate(members) if bits >> i & 1)
                found[part] = found.get(part, 0.0) + weight * (-1) ** (len(part) + 1)
        return {part: weight for part, weight in sorted(found.items()) if abs(weight) > 1e-12}


def random_game(
    players: int = 8,
    *,
    ands: int = 7,
    ors: int = 7,
    singles: bool = False,
    orders: tuple[int, int] = (2, 5),
    seed: int = 0,
) -> Game:
    """A game with ``ands`` AND terms and ``ors`` OR terms of random players and weights of 0.5 to 2, either sign.

    Args:
        singles: also give every player an effect of their own; then order-2 terms cannot be told apart for certain.
        orders: fewest and most players of a term.
    """
    random = Random(f"game/{seed}/{players}/{ands}/{ors}/{singles}/{orders}")

    def terms(count: int, taken: set[Players]) -> dict[Players, float]:
        found: dict[Players, float] = {}
        while len(found) < count:
            members = tuple(sorted(random.sample(range(players), random.randint(*orders))))
            if members not in taken:
                taken.add(members)
                found[members] = random.choice((-1, 1)) * round(random.uniform(0.5, 2.0), 2)
        return found

    taken: set[Players] = set()
    conjunctions = terms(ands, taken)
    if singles:
        conjunctions |= {(p,): round(random.uniform(-1.0, 1.0), 2) for p in range(players)}
    return Game(players, conjunctions, terms(ors, taken), constant=round(random.uniform(-1.0, 1.0), 2))
