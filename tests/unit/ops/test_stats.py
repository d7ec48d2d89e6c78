"""Rank correlation against cases worked out by hand."""

import pytest
import torch

from cutaway.ops.stats import rank_correlation


def test_order_alone_counts():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a.exp()) == pytest.approx(-1.0)
    assert rank_correlation(a, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_equal_numbers_share_their_ranks():
    a, b = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, b) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(a, torch.ones(4)) == 0.0
