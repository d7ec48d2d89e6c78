"""Text and image worlds with known truth: typed, seeded generators."""

from __future__ import annotations

from .examples import Example, Pair, pair_up, select
from .games import Game, random_game
from .labels import Labels, Shot
from .recall import recall, recall_pairs
from .scenes import Scene, Scenes, Thing
from .suites import suite, suites
from .town import Person, Town

__all__ = [
    "Example",
    "Game",
    "Labels",
    "Pair",
    "Person",
    "Scene",
    "Scenes",
    "Shot",
    "Thing",
    "Town",
    "pair_up",
    "random_game",
    "recall",
    "recall_pairs",
    "select",
    "suite",
    "suites",
]
