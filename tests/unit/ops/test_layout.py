"""Scores over pixels: one grid as it is, several laid over each other without changing sums."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.inputs import PatchGrid
from cutaway.ops.layout import over_pixels


def grid(first: int, rows: int, columns: int, window: tuple[float, float, float, float]) -> PatchGrid:
    left, top, right, bottom = window
    x, y = torch.linspace(left, right, columns + 1), torch.linspace(top, bottom, rows + 1)
    boxes = [torch.stack([x[c], y[r], x[c + 1], y[r + 1]]) for r in range(rows) for c in range(columns)]
    positions = tuple(range(first, first + rows * columns))
    return PatchGrid(row=0, positions=positions, boxes=torch.stack(boxes), shape=(rows, columns))


def test_one_grid_is_taken_as_it_is() -> None:
    scores = torch.randn(2, 20)
    one = grid(3, 2, 3, (4, 0, 34, 20))
    values, boxes = over_pixels([one], (40, 20), scores)
    assert values.equal(scores[:, 3:9].view(2, 2, 3))
    assert boxes[1, 2].tolist() == [24, 10, 34, 20]


def test_tiles_and_the_whole_image_lie_over_each_other_and_keep_their_sum() -> None:
    tiles = [grid(4 * i, 2, 2, (20 * (i % 2), 10 * (i // 2), 20 * (i % 2) + 20, 10 * (i // 2) + 10)) for i in range(4)]
    whole = grid(16, 2, 2, (0, 0, 40, 20))
    scores = torch.randn(20)
    values, boxes = over_pixels([*tiles, whole], (40, 20), scores)
    assert values.shape == (4, 4)
    assert float(values.sum()) == pytest.approx(float(scores.sum()), abs=1e-5)
    assert boxes[1, 2].tolist() == [20, 5, 30, 10]
    # Row 1, column 2: the lower left patch of the second tile, and a quarter of the whole image's second patch.
    assert float(values[1, 2]) == pytest.approx(float(scores[6] + scores[17] / 4), abs=1e-6)


def test_a_patch_in_the_padding_has_no_pixels_and_a_cell_without_a_patch_no_number() -> None:
    beside = grid(0, 1, 2, (0, 0, 20, 10))
    flat = PatchGrid(0, (2, 3), torch.tensor([[0.0, 0, 10, 10], [0, 10, 10, 10]]), (2, 1))
    values, _ = over_pixels([beside, flat], (20, 20), torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert values.nan_to_num(nan=-1).tolist() == [[5, 2], [-1, -1]]
