"""Text and image worlds with known truth: typed, seeded generators."""

from __future__ import annotations

from .examples import Example, Pair, pair_up, select
from .labels import Labels, Shot
from .recall import recall, recall_pairs
from .town import Person, Town

__all__ = ["Example", "Labels", "Pair", "Person", "Shot", "Town", "pair_up", "recall", "recall_pairs", "select"]
