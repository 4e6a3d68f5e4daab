"""Bootstrap intervals against the normal theory, and win rates by hand."""

import pytest
import torch
from scipy.stats import binomtest

from src.stats import mean_of, win_rate


def test_the_interval_of_many_normal_numbers_is_the_normal_one() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double() * 3 + 5
    mean = mean_of(values)
    half = 1.96 * values.std().item() / 2000**0.5
    assert mean.value == pytest.approx(values.mean().item())
    ends = [mean.high - mean.value, mean.value - mean.low]
    assert ends == pytest.approx([half, half], rel=0.1)
    drawn = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    means = [mean_of(row, resamples=500) for row in drawn]
    assert 0.89 < sum(one.low <= 0 <= one.high for one in means) / 300 < 0.98
    for few in (2, 3, 5, 10):  # percentiles alone hold 50, 73, 87 and 89 % of these
        means = [mean_of(row[:few], resamples=500) for row in drawn]
        assert 0.9 < sum(one.low <= 0 <= one.high for one in means) / 300 <= 1


def test_equal_numbers_have_no_spread_and_a_tie_is_half_a_win() -> None:
    for count in (1, 5):
        mean = mean_of(torch.full((count,), 2.5))
        assert (mean.value, mean.low, mean.high) == (2.5, 2.5, 2.5)
    assert win_rate(torch.tensor([1.0, 0.5, 0.0, -2.0])).value == 0.625
    for won, n in ((12, 12), (0, 7), (30, 50)):
        rate = win_rate(torch.tensor([1.0] * won + [-1.0] * (n - won)))
        ends = binomtest(won, n).proportion_ci(method="wilson")
        assert (rate.low, rate.high) == pytest.approx((ends.low, ends.high), abs=1e-6)
