"""Small statistics of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two rows of numbers; equal numbers share their ranks, 0 where one row is constant."""
    ranks = torch.stack([_ranks(a.double().flatten()), _ranks(b.double().flatten())])
    around = ranks - ranks.mean(dim=1, keepdim=True)
    size = around.norm(dim=1).prod()
    return float(around[0] @ around[1] / size) if float(size) > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[which]
