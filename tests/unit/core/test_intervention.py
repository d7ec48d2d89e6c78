"""Interventions as plain functions of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutaway.core.errors import InterventionError
from cutaway.core.intervention import (
    Add,
    Apply,
    Intervention,
    Mean,
    Project,
    Scale,
    Set,
    Where,
    Zero,
    parse_intervention,
)
from cutaway.core.site import KINDS, Site

SITE = Site.parse("L0.attn.z[0]@-1")
X = torch.arange(24.0).view(2, 3, 1, 4).sin()


def where(kind: str = "attn.z", real: Tensor | None = None, chunk: int | None = None) -> Where:
    return Where(Site.parse(f"L0.{kind}"), KINDS[kind].axes, real, chunk)


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        (Zero(SITE), X * 0),
        (Set(SITE, 2.0), X * 0 + 2),
        (Set(SITE, torch.arange(4.0)), torch.arange(4.0).expand_as(X)),
        (Add(SITE, torch.ones(4)), X + 1),
        (Scale(SITE, -0.5), X * -0.5),
        (Mean(SITE), X.mean((0, 1), keepdim=True).expand_as(X)),
        (Mean(SITE, torch.ones(4)), torch.ones_like(X)),
        (Apply(SITE, lambda x, w: x.flip(-1)), X.flip(-1)),
    ],
)
def test_each_gives_what_it_says_and_leaves_its_input_alone(do: Intervention, expected: Tensor) -> None:
    before = X.clone()
    found = do(X, where())
    assert torch.allclose(found, expected)
    assert torch.equal(X, before)
    assert found.data_ptr() != X.data_ptr() or isinstance(do, Apply)
    assert do.site is SITE


def test_projections_split_a_vector_into_two_parts() -> None:
    rows = torch.tensor([[1.0, 1, 0, 0], [0, 2, 0, 1]])
    out, kept = Project(SITE, rows)(X, where()), Project(SITE, rows, keep=True)(X, where())
    assert torch.allclose(out + kept, X, atol=1e-6)
    assert (out @ rows.T).abs().max() < 1e-6
    assert torch.allclose(Project(SITE, rows[0])(X, where()), X - (X @ rows[0])[..., None] * rows[0] / 2, atol=1e-6)


def test_means_leave_padding_out() -> None:
    real = torch.tensor([[True, True, False], [True, True, True]]).view(2, 3, 1, 1)
    mean = torch.cat([X[0, :2], X[1]]).mean(0)
    assert torch.allclose(Mean(SITE)(X, where(real=real)), mean.expand_as(X))


def test_values_are_cut_to_the_chunk_that_passes_by() -> None:
    whole = torch.randn(2, 9, 1, 4)
    assert torch.equal(Set(SITE, whole)(X, where(chunk=3)), whole[:, 3:6])
    assert torch.equal(Add(SITE, torch.ones(4))(X, where(chunk=3)), X + 1)
    pattern, x = torch.randn(1, 2, 9, 9), torch.zeros(1, 2, 3, 3)
    assert torch.equal(Set(SITE, pattern)(x, where("attn.pattern", chunk=6)), pattern[..., 6:, 6:])


def test_infinite_values_are_refused_unless_they_were_there() -> None:
    x = X.clone()
    x[0, 0] = torch.inf
    assert torch.equal(Scale(SITE, 1.0)(x, where()), x)
    with pytest.raises(InterventionError, match="20 of 24 values are NaN or infinite"):
        Set(SITE, float("nan"))(x, where())


def test_a_base_without_a_change_says_so() -> None:
    with pytest.raises(TypeError, match="defines no change"):
        Intervention(SITE)(X, where())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("zero L3.attn.z[5]", Zero),
        ("mean L0.mlp.out", Mean),
        ("scale L2.mlp.act[7]@-1 0.5", Scale),
        ("add embed -2", Add),
        ("set L1.resid_post 0", Set),
    ],
)
def test_text_forms_read_and_write(text: str, kind: type[Intervention]) -> None:
    found = parse_intervention(text)
    assert type(found) is kind
    assert str(found) == text
