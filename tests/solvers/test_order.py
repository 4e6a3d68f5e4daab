"""The measured order of every solver.

The equation is dx/dsigma = A'(sigma) x^2, so that 1 / x = 1 / x_0 + A(sigma_0 - sigma), for four
curves A(u) = c u^5 exp(-q u) at once. A and its first four derivatives vanish at the start: there
the first steps of a multistep method, which are of lower order because it has no past yet, leave
no error behind, and what is measured is the method and not its start.

Each order is the slope of log2 |error| between 80 and 160 steps.
"""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Condition, Field
from solvers.integrate import Solver
from solvers.sampler import no_noise
from solvers.schedules import log_snr, polynomial
from tests.solvers.mixture import directions, integrate

HIGH, LOW, STEPS = 2.0, 0.5, 80
C = torch.tensor([3.0, 0.2, 1.0, 2.0], dtype=torch.float64)
Q = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)


def denoiser(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    level = sigma.reshape(-1, 1)
    u = HIGH - level
    return x - level * C * u**4 * (5 - Q * u) * torch.exp(-Q * u) * x**2


def exact(u: float) -> Tensor:
    return 1 / (1 + C * u**5 * torch.exp(-Q * u))


def even(n: int) -> Tensor:
    return torch.linspace(HIGH, LOW, n + 1, dtype=torch.float64)


def log(n: int) -> Tensor:
    return log_snr(n + 1, LOW, HIGH)


def karras(n: int) -> Tensor:
    return polynomial(n + 1, LOW, HIGH, rho=7)


Grid = Callable[[int], Tensor]


def error(solver: Solver, grid: Tensor, corrected: bool = False) -> float:
    x = torch.ones(1, 4, dtype=torch.float64)
    *_, end = integrate(solver, Field(denoiser), x, grid, correct=corrected)
    return (end - exact(HIGH - LOW)).norm().item()


def order(make: Callable[[int], Solver], grid: Grid, corrected: bool = False) -> float:
    coarse, fine = (error(make(n), grid(n), corrected) for n in (STEPS, 2 * STEPS))
    return math.log2(coarse / fine)


def named(value: object) -> str:
    """The same in every process: a function's repr holds its address."""
    return re.sub(r"<function (\w+) at \w+>", r"\1", repr(value))


@pytest.mark.parametrize("grid", [log, karras])
@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (Euler(), 1),
        (Heun(), 2),
        (EDM(no_noise), 2),
        (DPM2(), 2),
        (DPM2(0.3), 2),
        (IPNDM(1), 1),
        (IPNDM(2), 2),
        *((IPNDMv(p), p) for p in (1, 2, 3)),
        *((DEIS(p), p) for p in (1, 2, 3)),
        *((DEIS(p, "rhoab"), p) for p in (1, 2, 3)),
        *((DPMpp(p, predict_x0, False), p) for p in (1, 2) for predict_x0 in (True, False)),
        *(
            (UniPC(p, variant, predict_x0, False), p)
            for p in (1, 2, 3)
            for variant in ("bh1", "bh2")
            for predict_x0 in (True, False)
        ),
    ],
    ids=named,
)
def test_the_error_falls_with_the_order_of_the_solver(
    solver: Solver, expected: int, grid: Grid
) -> None:
    assert abs(order(lambda _n: solver, grid) - expected) < 0.25


@pytest.mark.parametrize("highest", [1, 2, 3, 4])
def test_adams_bashforth_has_its_order_on_the_equal_steps_that_it_is_for(highest: int) -> None:
    assert abs(order(lambda _n: IPNDM(highest), even) - highest) < 0.25


@pytest.mark.parametrize("mode", ["tab", "rhoab"])
def test_deis_of_order_4_has_it_on_equal_steps(mode: str) -> None:
    assert abs(order(lambda _n: DEIS(4, mode), even) - 4) < 0.25  # pyright: ignore[reportArgumentType]


def test_deis_of_order_4_in_time_has_at_least_that_on_uneven_steps() -> None:
    assert order(lambda _n: DEIS(4), log) > 3.75
    assert order(lambda _n: DEIS(4), karras) > 3.75


@pytest.mark.parametrize("grid", [even, log, karras])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_corrector_of_unipc_adds_one_to_the_order(
    p: int, variant: str, predict_x0: bool, grid: Grid
) -> None:
    """Zhao et al. 2023, arXiv:2302.04867, Theorem 3.1: UniC-p raises an order p to p + 1."""
    solver = UniPC(p, variant, predict_x0, lower_order_final=False)  # pyright: ignore[reportArgumentType]
    assert abs(order(lambda _n: solver, grid, corrected=True) - (p + 1)) < 0.25


@pytest.mark.parametrize("rows", [[[0.5]], [[0.2, 0.8]], [[0.0, 0.5, 1.0]]], ids=str)
def test_epd_with_points_around_the_middle_has_order_2(rows: list[list[float]]) -> None:
    assert abs(order(lambda n: EPD(directions(rows * n)), log) - 2) < 0.25


def test_epd_with_points_off_the_middle_has_order_1() -> None:
    assert abs(order(lambda n: EPD(directions([[0.1, 0.5]] * n)), log) - 1) < 0.25


@pytest.mark.parametrize("base", [Euler(), IPNDM(2), DPMpp(2, lower_order_final=False)], ids=repr)
def test_the_plug_in_with_a_point_in_the_middle_has_order_2(base: Solver) -> None:
    assert abs(order(lambda n: EPD(directions([[0.5]] * n), base), log) - 2) < 0.25


@pytest.mark.parametrize("highest", [3, 4])
def test_adams_bashforth_for_equal_steps_falls_back_to_order_2_on_unequal_ones(
    highest: int,
) -> None:
    """Why iPNDM is at its best on time_uniform and polynomial grids, whose steps vary slowly."""
    assert abs(order(lambda _n: IPNDM(highest), log) - 2) < 0.25


@pytest.mark.parametrize("predict_x0", [True, False])
def test_dpmpp_of_order_3_as_published_has_order_2_and_a_smaller_error(predict_x0: bool) -> None:
    """The published formula, which diffusers shares, takes half of the second derivative.

    Its D2 is the second divided difference, 1/2 of the derivative that its coefficient is for.
    UniPC(3) without corrector interpolates the same points with the whole of it and has order 3.
    """
    third = DPMpp(3, predict_x0, lower_order_final=False)
    assert abs(order(lambda _n: third, log) - 2) < 0.25
    assert error(third, log(STEPS)) < error(DPMpp(2, predict_x0, False), log(STEPS))


def test_ipndm_v_of_order_4_as_published_has_order_3_at_best() -> None:
    """Its third difference weighs 11/24 for 3/8 on equal steps (see test_identities).

    Off grids even in log sigma its weights do not sum to 1 either, which leaves order 2.
    """
    assert order(lambda _n: IPNDMv(4), log) < 3.25
    assert abs(order(lambda _n: IPNDMv(4), karras) - 2) < 0.25


def test_rhoab_of_order_4_as_published_does_not_converge_on_uneven_steps() -> None:
    """It keeps the weights of the fourth step for all later ones, whose lengths differ."""
    assert order(lambda _n: DEIS(4, "rhoab"), log) < 0.25
