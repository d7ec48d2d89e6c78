"""From scores of image positions to a grid over the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.core.inputs import PatchGrid


def over_pixels(grids: Sequence[PatchGrid], size: tuple[int, int], scores: Tensor) -> tuple[Tensor, Tensor]:
    """([..., row, column] scores, [row, column, 4] boxes in pixels) of one image's grids.

    One grid is taken as it is. Where the model sees an image several times (tiles, and the whole of it once more) the
    grids are laid over each other: on an even grid about as fine as the finest of them, the score of each patch is
    spread evenly over its box. Sums stay what they are, but for patches that lie in the padding around the image and
    have no pixels. NaN where no patch is.

    Args:
        size: width and height of the image. scores: [..., pos] of every position of the prompt.
    """
    if len(grids) == 1:
        (grid,) = grids
        rows, columns = grid.shape
        return scores[..., list(grid.positions)].unflatten(-1, (rows, columns)), grid.boxes.view(rows, columns, 4)
    width, height = size
    boxes = torch.cat([grid.boxes for grid in grids]).double()
    positions = [p for grid in grids for p in grid.positions]
    wide, tall = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    columns, rows = (max(1, round(n / _finest(side))) for n, side in ((width, wide), (height, tall)))
    x, y = torch.linspace(0, width, columns + 1).double(), torch.linspace(0, height, rows + 1).double()
    area = _overlap(y, boxes[:, 1], boxes[:, 3])[:, None] * _overlap(x, boxes[:, 0], boxes[:, 2])[None]
    share = area / (wide * tall).clamp_min(torch.finfo(torch.float64).tiny)
    spread = (scores[..., positions].double() @ share.flatten(0, 1).T).unflatten(-1, (rows, columns))
    spread[..., ~(area > 0).any(-1)] = float("nan")
    left, top = torch.meshgrid(x[:-1], y[:-1], indexing="xy")
    right, bottom = torch.meshgrid(x[1:], y[1:], indexing="xy")
    return spread.float(), torch.stack([left, top, right, bottom], dim=-1).float()


def _finest(sides: Tensor) -> float:
    """The smallest side that whole patches have; slivers at an edge of the image do not count."""
    whole = sides[sides > 0]
    return float(whole[whole > whole.median() / 2].min()) if len(whole) else 1.0


def _overlap(edges: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[cell, patch] length that cells between edges share with patches from ``low`` to ``high``."""
    return (torch.minimum(edges[1:, None], high) - torch.maximum(edges[:-1, None], low)).clamp_min(0)
