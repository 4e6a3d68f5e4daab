"""Bootstrap intervals against the normal theory, and win rates by hand."""

import pytest
import torch

from src.stats import mean_of, win_rate


def test_the_interval_of_many_normal_numbers_is_the_normal_one() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double() * 3 + 5
    found = mean_of(values)
    assert found.value == pytest.approx(values.mean().item())
    half = 1.96 * values.std().item() / 2000**0.5
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_it_covers_the_mean_about_as_often_as_it_says() -> None:
    drawn = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    found = [mean_of(values, resamples=500) for values in drawn]
    assert 0.89 < sum(one.low <= 0 <= one.high for one in found) / 300 < 0.98


def test_equal_numbers_and_one_number_have_no_spread() -> None:
    for count in (1, 5):
        found = mean_of(torch.full((count,), 2.5))
        assert (found.value, found.low, found.high) == (2.5, 2.5, 2.5)


def test_a_tie_is_half_a_win() -> None:
    assert win_rate(torch.tensor([1.0, 0.5, 0.0, -2.0])).value == 0.625
    assert win_rate(torch.tensor([1.0, 3.0])) == mean_of(torch.ones(2))
