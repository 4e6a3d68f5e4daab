"""The grids: their ends, their spacing, and what is refused (for diffusers: test_diffusers)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from solvers.process import VE
from solvers.schedules import (
    NoiseLevels,
    Timesteps,
    VPClock,
    log_snr,
    polynomial,
    time_uniform,
)

SIZES = st.integers(2, 60)
RHOS = st.floats(0.3, 12)
LOWS = st.floats(1e-4, 0.02)
HIGHS = st.floats(1, 200)


def falls(grid: Tensor) -> bool:
    return bool((grid.diff() < 0).all() and (grid > 0).all() and grid.isfinite().all())


def evenly(values: Tensor) -> bool:
    steps = values.diff()
    return bool(((steps - steps.mean()).abs() < 1e-9 * values.abs().max()).all())


@given(n=SIZES, low=LOWS, high=HIGHS, rho=RHOS)
def test_polynomial_is_even_in_its_root_and_exact_at_its_ends(
    n: int, low: float, high: float, rho: float
) -> None:
    grid = polynomial(n, low, high, rho)
    assert (grid.dtype, len(grid)) == (torch.float64, n)
    assert (grid[0].item(), grid[-1].item()) == (high, low)
    assert falls(grid)
    assert evenly(grid ** (1 / rho))


@given(n=SIZES, low=LOWS, high=HIGHS)
def test_log_snr_is_even_in_the_logarithm_and_exact_at_its_ends(
    n: int, low: float, high: float
) -> None:
    grid = log_snr(n, low, high)
    assert (grid[0].item(), grid[-1].item()) == (high, low)
    assert falls(grid)
    assert evenly(grid.log())


@given(n=SIZES, low=LOWS, high=HIGHS, rho=RHOS)
def test_time_uniform_is_even_in_the_root_of_time_and_exact_at_its_ends(
    n: int, low: float, high: float, rho: float
) -> None:
    grid = time_uniform(n, low, high, rho)
    assert (grid[0].item(), grid[-1].item()) == (high, low)
    assert falls(grid)
    times = torch.as_tensor(VPClock.between(low, high).time(grid))
    assert evenly(times ** (1 / rho))


def test_polynomial_of_rho_1_is_even_and_of_large_rho_is_log_snr() -> None:
    assert evenly(polynomial(9, 0.1, 10, rho=1))
    assert torch.allclose(polynomial(9, 0.1, 10, rho=1e7), log_snr(9, 0.1, 10), rtol=1e-5)


def test_time_uniform_by_hand() -> None:
    """beta_d and beta_min solve sigma(1e-3) = 0.002 and sigma(1) = 80; t = 0.5005 is halfway."""
    low, high = math.log(1 + 0.002**2), math.log(1 + 80**2)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - beta_d / 2
    t = (1 + 1e-3) / 2
    expected = math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1)
    assert math.isclose(time_uniform(3, 0.002, 80.0)[1].item(), expected, rel_tol=1e-12)


@given(low=LOWS, high=HIGHS, t=st.floats(1e-3, 1))
def test_the_clock_of_the_vp_process_turns_back(low: float, high: float, t: float) -> None:
    clock = VPClock.between(low, high)
    assert math.isclose(float(clock.time(clock.sigma(t))), t, rel_tol=1e-6)
    assert math.isclose(float(clock.sigma(1.0)), high, rel_tol=1e-9)
    assert math.isclose(float(clock.sigma(1e-3)), low, rel_tol=1e-6)


@pytest.mark.parametrize("clock", [VPClock(19.9, 0.1), VPClock.between(0.1, 80.0)])
def test_the_speed_of_the_clock_is_its_derivative(clock: VPClock) -> None:
    for t in (0.01, 0.3, 0.9):
        slope = (float(clock.sigma(t + 1e-6)) - float(clock.sigma(t - 1e-6))) / 2e-6
        assert math.isclose(float(clock.speed(t)), slope, rel_tol=1e-5)


@given(n=SIZES, rho=RHOS, first=st.integers(0, 10), last=st.integers(500, 999))
def test_discrete_is_even_in_the_root_of_the_timestep_and_exact_at_its_ends(
    n: int, rho: float, first: int, last: int
) -> None:
    levels = NoiseLevels(VE, 0.1, 1.0, Timesteps(first, last, lambda t: t.float()))
    t = levels.grid("discrete", n, rho=rho)
    assert t.dtype == torch.float64
    assert (t[0].item(), t[-1].item()) == (last, first)
    assert bool((t.diff() < 0).all())
    even = torch.linspace(last ** (1 / rho), first ** (1 / rho), n).double() ** rho
    assert torch.allclose(t, even, rtol=1e-3, atol=1e-3)
