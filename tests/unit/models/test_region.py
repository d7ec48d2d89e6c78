"""Regions and windows: which entries a site names, while a prompt runs and while it grows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutaway.core.errors import InputError, SiteRangeError
from cutaway.core.site import Site
from cutaway.models.region import Region, Window, joined, window_of_call
from tests.architectures import ROWS, model

X = torch.arange(3 * 9 * 4 * 2.0).view(3, 9, 4, 2)


def window(side: str = "right") -> Window:
    batch = model("grouped-query").inputs(list(ROWS), padding_side=side)
    return Window(batch, batch.real)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "text", ["L0.attn.z", "L0.attn.z[2]", "L0.attn.z[0+3]@-1", "L0.attn.z@0-2", "L0.attn.z[1-2]@3+1"]
)
def test_what_is_put_is_what_is_got_and_nothing_else_changes(side: str, text: str) -> None:
    region = Region(Site.parse(text), X.shape, window(side))
    part = region.get(X)
    new = region.put(X, -part - 1)
    assert torch.equal(region.get(new), -part - 1)
    assert int((new != X).sum()) == part.numel()
    assert torch.equal(region.put(new, part), X)


def test_rows_pick_their_own_positions() -> None:
    found = Region(Site.parse("L0.attn.z[1]@-1"), X.shape, window("right")).get(X)
    assert torch.equal(found[:, 0, 0], torch.stack([X[0, 6, 1], X[1, 3, 1], X[2, 8, 1]]))


def test_real_tokens_are_marked_where_there_is_padding() -> None:
    real = Region(Site.parse("L0.attn.z"), X.shape, window("left")).real
    assert real is not None
    assert real.shape == (3, 9, 1, 1)
    assert real.sum(1).flatten().tolist() == [7, 4, 9]
    assert Region(Site.parse("L0.attn.z@0"), X.shape, window("left")).real is None
    assert Region(Site.parse("L0.attn.z"), X[:, :4].shape, Window(None, [[0, 1, 2, 3]] * 3)).real is None


def mask(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L0.resid_post@-1", [[0], [0]]),
        ("L0.resid_post@2", [[], [0]]),
        ("L0.resid_post@1", [[0], []]),
        ("L0.resid_post@9", [[], []]),
    ],
)
def test_while_growing_positions_are_counted_over_the_whole_row(text: str, expected: list[list[int]]) -> None:
    call = {"input_ids": torch.zeros(2, 1), "attention_mask": mask([0, 1, 1], [1, 1, 1])}
    now = window_of_call(call)
    assert (now.start, now.batch, now.real) == (2, 2, [[1, 2], [0, 1, 2]])
    assert now.local(Site.parse(text), now.start, 1) == expected


def test_rows_that_have_a_position_in_part_are_refused() -> None:
    now = window_of_call({"input_ids": torch.zeros(2, 1), "attention_mask": mask([0, 1, 1], [1, 1, 1])})
    with pytest.raises(SiteRangeError, match=r"its rows have \[0, 1\] such positions in this call"):
        Region(Site.parse("L0.resid_post@2"), (2, 1, 4), now, now.start)
    assert Region(Site.parse("L0.resid_post@5"), (2, 1, 4), now, now.start).empty


def test_calls_without_ids_or_with_other_masks() -> None:
    assert window_of_call({}).real == []
    assert window_of_call({"inputs_embeds": torch.zeros(2, 3, 4)}).real == [[0, 1, 2]] * 2
    with pytest.raises(InputError, match="its attention mask is 4-dimensional"):
        window_of_call({"input_ids": torch.zeros(1, 2), "attention_mask": torch.zeros(1, 1, 2, 2)})


def test_chunks_are_joined_along_positions_or_the_diagonal() -> None:
    z, pattern, scores = (Site.parse(f"vision/L0.attn.{k}") for k in ("z", "pattern", "scores"))
    assert joined(z, None, X) is X
    assert joined(z, X, X).shape == (3, 18, 4, 2)
    one = torch.ones(1, 2, 3, 3)
    assert torch.equal(joined(pattern, one, one)[0, 0], torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)))
    assert joined(scores, one, one)[0, 0, 0, 3] == -torch.inf
    assert joined(scores, one, one, 0.0)[0, 0, 0, 3] == 0
