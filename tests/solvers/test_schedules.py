"""The grids: their ends, their spacing, and what is refused (for diffusers: test_diffusers)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from solvers.schedules import (
    VPClock,
    custom,
    discrete,
    flowmatch,
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


def test_a_sigma_min_of_a_tenth_has_a_vp_process_too() -> None:
    grid = time_uniform(9, 0.1, 80.0)
    assert (grid[0], grid[-1]) == (80, 0.1)
    assert falls(grid)


BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LATENT_SIGMAS = ((1 - (1 - BETAS).cumprod(0)) / (1 - BETAS).cumprod(0)).sqrt()


def latent_sigma(t: Tensor) -> Tensor:
    """The levels of Stable Diffusion, linear in log sigma between whole timesteps."""
    low = t.floor().clamp(0, 998).long()
    logs = LATENT_SIGMAS.log()
    return torch.lerp(logs[low], logs[low + 1], t - low).exp()


def asked(n: int, first: float, last: float, rho: float) -> Tensor:
    """The timesteps whose levels `discrete` asks for."""
    seen: list[Tensor] = []

    def sigma_of(t: Tensor) -> Tensor:
        seen.append(t)
        return latent_sigma(t)

    discrete(n, first, last, sigma_of, rho)
    return seen[0]


@given(n=SIZES, rho=RHOS, first=st.integers(0, 10), last=st.integers(500, 999))
def test_discrete_is_even_in_the_root_of_the_timestep_and_exact_at_its_ends(
    n: int, rho: float, first: int, last: int
) -> None:
    t = asked(n, first, last, rho)
    assert (t[0].item(), t[-1].item()) == (last, first)
    assert bool((t.diff() < 0).all())
    assert evenly(t ** (1 / rho))


def test_discrete_keeps_whole_timesteps_whole_where_rho_is_1() -> None:
    assert asked(4, 0, 999, 1.0).tolist() == [999, 666, 333, 0]


def test_discrete_by_hand_at_rho_2() -> None:
    """The square roots 30, 20, 10 of 900, 400, 100."""
    assert torch.allclose(asked(3, 100, 900, 2.0), torch.tensor([900.0, 400.0, 100.0]).double())


@pytest.mark.parametrize("rho", [0.5, 1, 1.7, 3, 7])
def test_discrete_ends_in_the_levels_of_the_first_and_last_timestep(rho: float) -> None:
    grid = discrete(11, 0, 999, latent_sigma, rho)
    assert torch.allclose(grid[[0, -1]], LATENT_SIGMAS[[-1, 0]], rtol=1e-14)
    assert falls(grid)


def test_discrete_on_a_network_with_single_precision_levels_is_double() -> None:
    assert discrete(3, 0, 999, lambda t: latent_sigma(t).float()).dtype == torch.float64


def test_custom_takes_the_levels_as_they_are() -> None:
    grid = custom([5, 2.5, 1e-3])
    assert grid.dtype == torch.float64
    assert grid.tolist() == [5, 2.5, 1e-3]


@pytest.mark.parametrize(
    "levels",
    [[], [1.0], [1.0, 2.0], [2.0, 2.0], [2.0, 0.0], [2.0, -1.0], [math.nan, 1.0], [math.inf, 1.0]],
    ids=str,
)
def test_custom_refuses_what_does_not_fall_to_a_level_above_0(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must"):
        custom(levels)


RANGES = [
    (0.002, 0.002),
    (80.0, 0.002),
    (0.0, 80.0),
    (-1.0, 80.0),
    (math.nan, 80.0),
    (0.002, math.nan),
    (0.002, math.inf),
]
RANGED = [polynomial, log_snr, time_uniform]


@pytest.mark.parametrize("schedule", RANGED)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_an_empty_or_endless_range_is_refused(
    schedule: Callable[..., Tensor], low: float, high: float
) -> None:
    with pytest.raises(ValueError, match=r"need 0 < sigma_min < sigma_max, not .*"):
        schedule(5, low, high)


@pytest.mark.parametrize("schedule", RANGED)
@pytest.mark.parametrize("n", [1, 0, -3])
def test_fewer_than_two_levels_are_refused(schedule: Callable[..., Tensor], n: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps must be 2 or more.*not {n}"):
        schedule(n, 0.002, 80.0)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf])
def test_a_rho_that_is_not_above_0_is_refused(rho: float) -> None:
    for make in (
        lambda: polynomial(5, 0.002, 80.0, rho),
        lambda: time_uniform(5, 0.002, 80.0, rho),
        lambda: discrete(5, 0, 999, latent_sigma, rho),
    ):
        with pytest.raises(ValueError, match=f"schedule_rho must be above 0, not {rho}"):
            make()


def test_a_range_too_narrow_for_a_vp_process_is_refused() -> None:
    with pytest.raises(ValueError, match="no VP process has the ends"):
        time_uniform(5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("first", "last"), [(5, 5), (9, 3), (-1, 999), (0, math.inf), (math.nan, 9)]
)
def test_timesteps_that_do_not_rise_are_refused(first: float, last: float) -> None:
    with pytest.raises(ValueError, match="timesteps must rise from first >= 0"):
        discrete(5, first, last, latent_sigma)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 1},
        {"num_steps": 5, "shift": 0.0},
        {"num_steps": 5, "shift": -3.0},
        {"num_steps": 5, "shift": math.nan},
        {"num_steps": 5, "mu": math.nan},
        {"num_steps": 5, "num_train_timesteps": 1},
    ],
    ids=str,
)
def test_flowmatch_refuses_an_empty_grid_and_a_shift_that_is_not_above_0(
    options: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match="flowmatch needs num_steps >= 2"):
        flowmatch(**options)
