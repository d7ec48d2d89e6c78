"""How far changes reach, and which axis of a layer's argument counts positions."""

import pytest
import torch

from cutaway.engine.rows import CannotReplayError, Reach, position_axis, take_rows


def test_causal_prompts_reach_from_the_change_on() -> None:
    reach = Reach.of(4, [torch.ones(4, 4, dtype=torch.bool).tril()])
    assert reach.first == (0, 1, 2, 3)
    assert reach.last == (0, 1, 2, 3)


def test_a_block_that_sees_itself_is_reached_whole() -> None:
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    sees[1:4, 1:4] = True
    reach = Reach.of(6, [sees])
    assert reach.first == (0, 1, 1, 1, 4, 5)
    assert reach.last == (0, 3, 3, 3, 4, 5)


def test_reach_grows_over_layers() -> None:
    """2 sees 3 in one layer and 1 sees 2 in another: a change at 3 reaches 1."""
    first, second = (torch.ones(4, 4, dtype=torch.bool).tril() for _ in range(2))
    first[2, 3] = second[1, 2] = True
    reach = Reach.of(4, [first, second])
    assert reach.first == (0, 1, 1, 1)
    assert reach.last == (0, 3, 3, 3)


def test_no_mask_reaches_everything() -> None:
    reach = Reach.of(3, [None])
    assert reach.first == (0, 0, 0)
    assert reach.last == (2, 2, 2)


@pytest.mark.parametrize(
    ("shape", "length", "axis"),
    [
        ((1, 5), 5, 1),
        ((1, 5, 8), 5, 1),
        ((1, 5, 5), 5, 1),
        ((3, 1, 3, 8), 3, 2),
        ((5, 8), 5, 0),
        ((5,), 5, 0),
        ((4, 8), 5, None),
        ((1, 1, 8), 1, 1),
    ],
)
def test_position_axis(shape: tuple[int, ...], length: int, axis: int | None) -> None:
    assert position_axis(torch.Size(shape), length, "x") == axis


def test_a_length_elsewhere_is_refused() -> None:
    with pytest.raises(CannotReplayError, match=r"'bias' of shape \[2, 7\]"):
        position_axis(torch.Size((2, 7)), 7, "bias")


def test_rows_are_taken_inside_tuples_and_dicts_and_masks_stay() -> None:
    cos, mask = torch.arange(4.0).view(1, 4, 1), torch.zeros(1, 1, 4, 4)
    at = torch.tensor([3, 3, 1])
    taken = take_rows({"rope": (cos, cos + 1), "attention_mask": mask, "use_cache": False}, at, 4)
    assert taken["rope"][1].flatten().tolist() == [4, 4, 2]
    assert taken["attention_mask"] is mask
    assert taken["use_cache"] is False


def test_objects_are_refused() -> None:
    with pytest.raises(CannotReplayError, match="'state' is a object"):
        take_rows({"state": object()}, torch.tensor([0]), 4)
