"""What answers keep when the first components of a ranking are taken away, or are all that is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.ops.ablation import Ablation
from cutaway.ops.units import Unit
from cutaway.ops.watched import WatchedModel


class MaskKeep(NamedTuple):
    """Means over prompts; at place i with the first i + 1 components of each ranking.

    Attributes:
        masked: [ranking, size] the answer's probability without them. kept: with them alone of what is compared.
        drop: [ranking, size] what its log-probability falls by without them.
        right_masked, right_kept: [ranking, size] share of prompts whose answer is still the first.
    """

    masked: Tensor
    kept: Tensor
    drop: Tensor
    right_masked: Tensor
    right_kept: Tensor


def mask_and_keep(
    model: WatchedModel,
    rows: Sequence[Inputs],
    answers: Sequence[int],
    rankings: Sequence[Sequence[Unit]],
    pool: Sequence[Unit],
    at: Sequence[int] = (),
) -> MaskKeep:
    """Zero the first components of equally long rankings, and all others of the tensors that ``pool`` names.

    Args:
        pool: one component of every layer and kind that is compared.
        at: sizes of the sets; every size up to all when none are named.
    """
    ks = list(at) or list(range(1, len(rankings[0]) + 1))
    sets = [ranking[:k] for ranking in rankings for k in ks]
    total = torch.zeros(5, len(sets), dtype=torch.float64)
    for row, answer in zip(rows, answers, strict=True):
        ablation = Ablation(model, row, [answer])
        base, masked, kept = ablation.base(), ablation(sets), ablation.keeping(sets, pool)
        total += torch.stack(
            [masked.prob, kept.prob, base.logp - masked.logp, (masked.rank == 0).float(), (kept.rank == 0).float()]
        ).double()
    return MaskKeep(*(total / len(rows)).view(5, len(rankings), len(ks)))
