"""Rank correlation against cases worked out by hand."""

import pytest
import torch

from cutaway.ops.stats import mean_error, missed, rank_correlation


def test_order_alone_counts():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a.exp()) == pytest.approx(-1.0)
    assert rank_correlation(a, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_equal_numbers_share_their_ranks():
    a, b = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, b) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(a, torch.ones(4)) == 0.0


def test_what_estimates_miss_is_a_part_of_the_largest_effect():
    estimates, exact = torch.tensor([1.0, -3.0]), torch.tensor([2.0, -4.0])
    assert missed(estimates, exact, 0.0) == missed(exact, estimates, 5.0) == 0.25
    assert missed(estimates, exact, -1000.0) == pytest.approx(0.1)  # of a hundredth of what the runs differ by
    assert missed(torch.zeros(2), torch.zeros(2), 0.0) == 0.0


def test_the_error_of_a_mean_and_of_a_ratio_of_means_is_what_resampling_gives():
    generator = torch.Generator().manual_seed(0)
    per = 3 + torch.randn(400, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    values = torch.tensor([0.5, -2.0]) * per[:, None] + torch.tensor([0.1, 1.0]) * noise
    drawn = torch.randint(400, (4000, 400), generator=generator)
    means, units = values[drawn].mean(1), per[drawn].mean(1)
    torch.testing.assert_close(mean_error(values), means.std(0), rtol=0.05, atol=0)
    torch.testing.assert_close(mean_error(values, per), (means / units[:, None]).std(0), rtol=0.05, atol=0)
    assert float(mean_error(values, per)[0]) < float(mean_error(values / per.mean())[0]) / 4  # they vary together
    assert float(mean_error(2 * per[:, None], per)) == pytest.approx(0, abs=1e-12)
