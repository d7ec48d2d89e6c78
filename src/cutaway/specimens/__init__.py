"""Small real models with known insides, shipped with the package."""

from __future__ import annotations

from .exam import evaluate
from .example import example
from .registry import Card, card, names, path
from .series import Series
from .series import train as train_series

__all__ = ["Card", "Series", "card", "evaluate", "example", "names", "path", "train_series"]
