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
from solvers.schedules import polynomial
from tests.solvers.gauss import directions, integrate, log_snr

HIGH, LOW, STEPS = 2.0, 0.5, 80
C = torch.tensor([3.0, 0.2, 1.0, 2.0], dtype=torch.float64)
Q = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
BOTH = (True, False)


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


def epd(rows: list[list[float]], base: Solver | None = None) -> Callable[[int], Solver]:
    return lambda n: EPD(directions(rows * n), base or Euler())


def named(value: object) -> str:
    """The same in every process: a function's repr holds its address."""
    return re.sub(r"<function (\S+) at \w+>", r"\1", repr(value))


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        *((s, 1) for s in (Euler(), IPNDM(1))),
        *((s, 2) for s in (Heun(), EDM(no_noise), DPM2(), DPM2(0.3), IPNDM(2))),
        *((kind, p) for p in (1, 2, 3) for kind in (IPNDMv(p), DEIS(p), DEIS(p, "rhoab"))),
        *((DPMpp(p, x0, False), p) for p in (1, 2) for x0 in BOTH),
        *((UniPC(p, v, x0, False), p) for p in (1, 2, 3) for v in ("bh1", "bh2") for x0 in BOTH),
    ],
    ids=named,
)
def test_the_error_falls_with_the_order_of_the_solver(solver: Solver, expected: int) -> None:
    for grid in (log, karras):
        assert abs(order(lambda _n: solver, grid) - expected) < 0.25


@pytest.mark.parametrize("predict_x0", BOTH)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_corrector_of_unipc_adds_one_to_the_order(
    p: int, variant: str, predict_x0: bool
) -> None:
    """Zhao et al. 2023, arXiv:2302.04867, Theorem 3.1: UniC-p raises an order p to p + 1."""
    solver = UniPC(p, variant, predict_x0, lower_order_final=False)
    for grid in (even, log, karras):
        assert abs(order(lambda _n: solver, grid, corrected=True) - (p + 1)) < 0.25


@pytest.mark.parametrize(
    ("make", "grid", "expected"),
    [
        *((lambda _n, p=p: IPNDM(p), even, p) for p in (1, 2, 3, 4)),
        # on unequal steps, why iPNDM is at its best where they vary slowly
        *((lambda _n, p=p: IPNDM(p), log, 2) for p in (3, 4)),
        *((lambda _n, mode=mode: DEIS(4, mode), even, 4) for mode in ("tab", "rhoab")),
        *((epd(rows), log, 2) for rows in ([[0.5]], [[0.2, 0.8]], [[0.0, 0.5, 1.0]])),
        (epd([[0.1, 0.5]]), log, 1),
        *((epd([[0.5]], base), log, 2) for base in (IPNDM(2), DPMpp(2, lower_order_final=False))),
        # as published: off grids even in log sigma its weights do not sum to 1
        (lambda _n: IPNDMv(4), karras, 2),
        # as published, and in diffusers: it takes half of the second derivative
        *((lambda _n, x0=x0: DPMpp(3, x0, False), log, 2) for x0 in BOTH),
    ],
)
def test_orders_on_some_grids_alone(
    make: Callable[[int], Solver], grid: Grid, expected: int
) -> None:
    assert abs(order(make, grid) - expected) < 0.25


def test_what_else_is_known_of_the_published_formulas() -> None:
    for grid in (log, karras):
        assert order(lambda _n: DEIS(4), grid) > 3.75
    assert order(lambda _n: IPNDMv(4), log) < 3.25  # its third difference weighs 11/24 for 3/8
    # it keeps the weights of the fourth step for all later ones, whose lengths differ
    assert order(lambda _n: DEIS(4, "rhoab"), log) < 0.25
    for x0 in BOTH:
        second, third = (error(DPMpp(p, x0, False), log(STEPS)) for p in (2, 3))
        assert third < second
