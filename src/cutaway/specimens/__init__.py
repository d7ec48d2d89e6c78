"""Small real models with known insides, shipped with the package."""

from __future__ import annotations

from .evaluate import evaluate
from .registry import Card, card, names, path

__all__ = ["Card", "card", "evaluate", "names", "path"]
