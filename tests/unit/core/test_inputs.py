"""Inputs: positions count real tokens, rows come apart and grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cutaway.core.errors import InputError, MismatchError, SiteRangeError
from cutaway.core.inputs import Inputs, PatchGrid, require_same_length
from cutaway.core.site import Items


def batch(side: str = "left", **extra: Any) -> Inputs:
    """Rows of 4 and 2 tokens, padded on a side."""
    pad = [[0, 0, 1, 1]] if side == "left" else [[1, 1, 0, 0]]
    mask = torch.tensor([[1, 1, 1, 1], *pad])
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, 9, 9]]) * mask
    tokens = tuple(tuple(f"#{i}" for i in row) for row in ids.tolist())
    kinds = (("special", "image", "image", "text"), tuple("text" if m else "pad" for m in mask[1].tolist()))
    return Inputs(ids, mask, tokens, kinds, extra)


@pytest.mark.parametrize(("side", "real"), [("left", [2, 3]), ("right", [0, 1])])
def test_positions_are_of_real_tokens(side: str, real: list[int]) -> None:
    given = batch(side)
    assert (len(given), given.lengths, given.padded) == (2, [4, 2], True)
    assert given.real == [[0, 1, 2, 3], real]
    assert given.last == [3, real[-1]]
    assert given.select(Items.of([0, -1])) == [[0, 3], [real[0], real[-1]]]
    assert given.select(None) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    with pytest.raises(SiteRangeError, match="position 2 is not there: the valid positions are 0-1"):
        given.select(Items.of(2))


def test_roles_select_where_rows_have_equally_many() -> None:
    with pytest.raises(MismatchError, match=r"rows have \[2, 0\] image positions"):
        batch().select("image")
    with pytest.raises(MismatchError, match=r"rows have \[4, 2\] all positions"):
        batch().select("all")
    assert batch().row(0).select("image") == [[1, 2]]
    assert batch().row(1).select("all") == [[0, 1]]
    with pytest.raises(SiteRangeError, match="no image position"):
        batch().row(1).select("image")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_has_no_padding(side: str) -> None:
    given = batch(side, position_ids=torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]))
    row = given.row(1)
    assert row.ids.tolist() == [[9, 9]]
    assert (row.padded, row.tokens, row.roles) == (False, (("#9", "#9"),), (("text", "text"),))
    assert row.extra["position_ids"].shape == (1, 2)
    with pytest.raises(InputError, match="cannot be split by row"):
        batch(side, pixel_values=torch.zeros(2, 3, 4, 4)).row(0)


def test_images_repeat_with_their_row() -> None:
    row = batch().row(0)
    positions = torch.arange(12).view(3, 1, 4)  # along three axes, as Qwen-VL counts them
    extra = {"pixel_values": torch.rand(2, 3, 8, 8), "position_ids": positions, "sizes": [(8, 8)], "fast": True}
    grids = tuple(PatchGrid(0, (1 + i,), torch.zeros(1, 4), (1, 1), image=i) for i in range(2))
    given = Inputs(row.ids, row.mask, row.tokens, row.roles, extra, grids, ("a", "b")).repeat(3)
    assert torch.equal(given.extra["pixel_values"], torch.cat([extra["pixel_values"]] * 3))
    assert torch.equal(given.extra["position_ids"], positions.expand(3, 3, 4))
    assert (given.extra["sizes"], given.extra["fast"], given.images) == ([(8, 8)] * 3, True, ("a", "b") * 3)
    assert [(grid.row, grid.image) for grid in given.grids] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]


def test_a_row_repeats_and_grows() -> None:
    row = batch().row(0)
    assert row.repeat(3).ids.tolist() == [[5, 6, 7, 8]] * 3
    longer = row.extend([11, 12])
    assert longer.ids.tolist() == [[5, 6, 7, 8, 11, 12]]
    assert (longer.tokens[0][-2:], longer.roles[0][-1]) == (("#11", "#12"), "text")
    with pytest.raises(InputError, match="repeat 2 times"):
        batch().repeat(2)


def test_what_is_appended_to_padded_rows_goes_on_counting() -> None:
    given = batch("left", position_ids=torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]))
    longer = given.extend([11, 12])
    assert longer.extra["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]
    assert longer.mask.tolist()[1] == [0, 0, 1, 1, 1, 1]
    assert given.ids.shape == (2, 4)
    with pytest.raises(InputError, match="padded on the right"):
        batch("right").extend([11])
    with pytest.raises(InputError, match="mm_token_type_ids per position"):
        batch("left", mm_token_type_ids=torch.zeros(2, 4)).extend([11])


def test_digests_follow_content() -> None:
    assert batch().digest == batch().digest != batch("right").digest
    assert batch(pixel_values=torch.zeros(2)).digest != batch(pixel_values=torch.ones(2)).digest
    assert batch(pixel_values=torch.zeros(2)).has_images
    assert not batch(position_ids=torch.zeros(2, 4, dtype=torch.long)).has_images


@pytest.mark.parametrize(
    ("ids", "mask", "found"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 1]), "both are \\[batch, pos\\]"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), r"ids \[1, 2\] and mask \[1, 1\]"),
        (torch.tensor([[1], [2]]), torch.tensor([[1], [0]]), "a row has no real token"),
    ],
)
def test_ids_and_mask_must_line_up(ids: torch.Tensor, mask: torch.Tensor, found: str) -> None:
    with pytest.raises(InputError, match=found):
        Inputs(ids, mask, (), ())


def test_rows_are_taken_in_any_order_and_number_with_their_padding() -> None:
    given = batch(position_ids=torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]))
    taken = given.take([1, 0, 1])
    assert taken.ids.tolist() == [given.ids[i].tolist() for i in (1, 0, 1)]
    assert taken.lengths == [2, 4, 2]
    assert taken.tokens == (given.tokens[1], given.tokens[0], given.tokens[1])
    assert taken.extra["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 1]]
    pixels = batch(pixel_values=torch.zeros(2, 3, 4, 4, 4))
    assert pixels.take([0, 1]) is pixels
    with pytest.raises(InputError, match="cannot be split by row"):
        batch(pixel_values=torch.zeros(3, 4)).take([1])


def test_grids_move_with_their_row() -> None:
    grid = PatchGrid(0, (1, 2), torch.zeros(2, 4), (1, 2))
    mask = torch.tensor([[0, 1, 1, 1]])
    given = Inputs(mask, mask, (("a",) * 4,), (("pad", "image", "image", "text"),), {}, (grid,))
    assert given.row(0).grids[0].positions == (0, 1)


def test_prompts_of_different_length_are_told_apart_by_their_tokens() -> None:
    require_same_length(batch("left"), batch("right"))
    with pytest.raises(MismatchError, match=r"row 0 has 4 and 2 tokens, first different at position 0: \['#5', '#6'"):
        require_same_length(batch().row(0), batch().row(1))
    with pytest.raises(MismatchError, match="2 and 1 rows"):
        require_same_length(batch(), batch().row(0))
