"""Text and image worlds with known truth: typed, seeded generators."""

from __future__ import annotations

from .examples import Example, Pair, pair_up, select
from .town import Person, Town

__all__ = ["Example", "Pair", "Person", "Town", "pair_up", "select"]
