"""The grids: their ends, their spacing, and their clocks (for diffusers: test_diffusers)."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from solvers.process import VE
from solvers.schedules import NoiseLevels, Timesteps, VPClock, polynomial, time_uniform
from tests.solvers.gauss import log_snr

SIZES, RHOS = st.integers(2, 60), st.floats(0.3, 12)
LOWS, HIGHS = st.floats(1e-4, 0.02), st.floats(1, 200)


def evenly(values: Tensor) -> bool:
    steps = values.diff()
    return bool(((steps - steps.mean()).abs() < 1e-9 * values.abs().max()).all())


@given(n=SIZES, low=LOWS, high=HIGHS, rho=RHOS)
def test_grids_fall_evenly_in_their_own_measure_and_are_exact_at_their_ends(
    n: int, low: float, high: float, rho: float
) -> None:
    in_time, clock = time_uniform(n, low, high, rho), VPClock.between(low, high)
    for grid, measure in (
        (polynomial(n, low, high, rho), lambda s: s ** (1 / rho)),
        (log_snr(n, low, high), torch.log),
        (NoiseLevels(VE, low, high).grid("logsnr", n), torch.log),
        (in_time, lambda s: torch.as_tensor(clock.time(s)) ** (1 / rho)),
    ):
        assert (grid.dtype, len(grid)) == (torch.float64, n)
        assert (grid[0].item(), grid[-1].item()) == (high, low)
        assert (grid.diff() < 0).all()
        assert grid.isfinite().all()
        assert evenly(measure(grid))


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


def test_grids_by_hand() -> None:
    """beta_d and beta_min solve sigma(1e-3) = 0.002 and sigma(1) = 80; t = 0.5005 is halfway."""
    low, high = math.log(1 + 0.002**2), math.log(1 + 80**2)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - beta_d / 2
    t = (1 + 1e-3) / 2
    expected = math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1)
    assert math.isclose(time_uniform(3, 0.002, 80.0)[1].item(), expected, rel_tol=1e-12)
    assert evenly(polynomial(9, 0.1, 10, rho=1))
    assert torch.allclose(polynomial(9, 0.1, 10, rho=1e7), log_snr(9, 0.1, 10), rtol=1e-5)


@given(low=LOWS, high=HIGHS, t=st.floats(1e-3, 1))
def test_the_clock_of_the_vp_process_turns_back_and_its_speed_is_its_derivative(
    low: float, high: float, t: float
) -> None:
    clock = VPClock.between(low, high)
    assert math.isclose(float(clock.time(clock.sigma(t))), t, rel_tol=1e-6)
    assert math.isclose(float(clock.sigma(1.0)), high, rel_tol=1e-9)
    assert math.isclose(float(clock.sigma(1e-3)), low, rel_tol=1e-6)
    for clock in (VPClock(19.9, 0.1), VPClock.between(0.1, 80.0)):
        near = (float(clock.sigma(0.9 * t + h)) for h in (1e-6, -1e-6))
        above, below = near
        slope = (above - below) / 2e-6
        assert math.isclose(float(clock.speed(0.9 * t)), slope, rel_tol=1e-4)
