"""The largest of many scores, exactly, when computing one is dear and an upper bound is cheap.

Sort by the bound, evaluate in blocks from the top, stop when no bound that is left can reach the k-th best score. The
set is then certified: it is the one that evaluating all would give (up to ties).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
SPARE = 4  # evaluated with the first k: cheaper than a further block, where the bound is tight
ROUNDING = 1e-5  # relative to the scores' size: what bound and score may differ by in float32


@dataclass(frozen=True)
class TopK:
    """The k largest scores.

    Attributes:
        index: [k] which they are, best first. score: [k] float32.
        evaluated: how many scores were computed. total: how many there are.
    """

    index: Tensor
    score: Tensor
    evaluated: int
    total: int


def certified_topk(
    bound: Tensor, exact: Callable[[Tensor], Tensor], k: int, block: int = BLOCK, rounding: float = ROUNDING
) -> TopK:
    """The k largest of n scores, of which ``bound`` [n] is an upper bound and ``exact(index)`` gives those named.

    Args:
        bound: infinite where nothing better is known.
        exact: [m] scores of the items at the index tensor [m].
        k: how many; all when there are fewer.
        block: how many are evaluated at a time, after the first k and a few more.
        rounding: slack given to the bounds, as a share of the largest score or bound met.
    """
    n = bound.numel()
    k = min(k, n)
    order = torch.argsort(bound, descending=True, stable=True)
    ranked = bound[order]
    score = torch.empty(0, device=bound.device)
    done = 0
    size = k + min(SPARE, k)
    while size:
        part = order[done : done + size]
        score = torch.cat([score, exact(part).float()])
        done += len(part)
        size = min(block, _unsettled(score, ranked[done:], k, rounding))
    best = torch.topk(score, k)
    return TopK(order[best.indices], best.values, done, n)


def _unsettled(score: Tensor, bounds: Tensor, k: int, rounding: float) -> int:
    """How many of the bounds that are left reach the k-th best score."""
    worst = score.topk(k).values[-1]
    return int((bounds + rounding * worst.abs().clamp_min(1.0) > worst).sum())
