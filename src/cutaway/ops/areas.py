"""Areas under faithfulness curves, as the mechanistic-interpretability benchmark MIB reports them."""

from __future__ import annotations

import numpy as np

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB measures circuits."""


def cpr(fractions: np.ndarray, faithfulness: np.ndarray) -> float:
    """Area under the curve: larger is better, and it may pass 1 where circuits do more than the model."""
    return float(np.trapezoid(faithfulness, fractions))


def cmd(fractions: np.ndarray, faithfulness: np.ndarray) -> float:
    """Area between the curve and 1: smaller is better, and 0 means that every circuit does what the model does.

    The distance from 1 is taken at the measured sizes and joined by straight lines, as MIB's own code does; where the
    curve crosses 1 between two of them that is more than the exact area.
    """
    return float(np.trapezoid(np.abs(1 - np.asarray(faithfulness)), fractions))
