"""Small statistics of scores."""

from __future__ import annotations

import torch
from torch import Tensor

POOR = 0.5
"""Part of the largest effect by which estimates may miss what was measured before they are called poor."""
FAINT = 0.01
"""Part of what two runs differ by, below which an effect is as good as none."""


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two rows of numbers; equal numbers share their ranks, 0 where one row is constant."""
    ranks = torch.stack([_ranks(a.double().flatten()), _ranks(b.double().flatten())])
    around = ranks - ranks.mean(dim=1, keepdim=True)
    size = around.norm(dim=1).prod()
    return float(around[0] @ around[1] / size) if float(size) > 0 else 0.0


def missed(estimates: Tensor, exact: Tensor, between: float) -> float:
    """The largest error of estimates, as a part of the largest effect, estimated or measured.

    An effect is counted as ``FAINT`` of the difference ``between`` the two runs at least, so that rounding is no error.
    """
    size = float(torch.stack([estimates, exact]).abs().max())
    return float((estimates - exact).abs().max()) / (max(size, FAINT * abs(between)) or 1.0)


def _ranks(x: Tensor) -> Tensor:
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[which]


def bootstrap_means(values: Tensor, samples: int, seed: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """([m] lower, [m] upper) ends of the interval of each column's mean, from samples of the rows of [n, m] values."""
    n = values.shape[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (samples, n), generator=generator)
    weights = torch.zeros(samples, n, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones(samples, n, dtype=torch.float64))
    means = weights @ values.double() / n
    ends = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), dim=0)
    return ends[0], ends[1]


def mean_error(values: Tensor, per: Tensor | None = None) -> Tensor:
    """[...] standard error of the mean over the first axis of [n, ...] values; n is at least 2.

    With ``per`` [n]: of that mean divided by the mean of ``per``, whose own spread counts (the ratio is linearised).
    """
    n, values = values.shape[0], values.double()
    if per is None:
        return values.std(dim=0) / n**0.5
    per = per.double().view(-1, *[1] * (values.ndim - 1))
    unit = per.mean()
    left = values - values.mean(dim=0) / unit * per
    return left.std(dim=0) / unit.abs() / n**0.5
