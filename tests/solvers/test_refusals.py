"""Solvers by name, and one table of what is refused where it is made, in one line."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, IPNDMv
from solvers.exponential import DEIS, DPMpp, UniPC, dynamic_threshold
from solvers.field import Field
from solvers.process import FLOW, VE, Process
from solvers.sampler import SOLVERS, Sampler, SolverOptions, make_solver, num_steps_for, parse_name
from solvers.schedules import NoiseLevels, Timesteps, flowmatch, log_snr, polynomial, time_uniform
from tests.solvers.mixture import LATENTS, integrate, ve

ORDERED: Any = (IPNDM, IPNDMv, DEIS, DPMpp, UniPC)
REFUSED: list[tuple[Callable[[], object], str]] = [
    *(
        (lambda kind=kind, order=order: kind(order), f"{kind.__name__} has the orders 1 to")
        for kind in ORDERED
        for order in (0, 5, "3", 2.0, None, True)
    ),
    (lambda: DPMpp(4), "1 to 3"),
    *((lambda r=r: DPM2(r), f"not {r}") for r in (0.0, 1.1, math.nan)),
    *(
        (lambda churn=churn: EDM(lambda _i, x: x, **churn), "s_churn, s_noise >= 0")
        for churn in ({"s_churn": -1.0}, {"s_churn": math.nan}, {"s_noise": math.inf})
    ),
    (lambda: EDM(lambda _i, x: x, s_min=2.0, s_max=1.0), "s_min <= s_max"),
    (lambda: UniPC(2, "bh3"), "unknown variant of UniPC 'bh3'"),
    (lambda: UniPC(2, predict_x0=False, process=FLOW), "it needs predict_x0"),
    (lambda: DEIS(2, "rho"), "unknown mode of DEIS 'rho'"),
    (lambda: Process("vp"), "unknown process 'vp'"),
    *(
        (lambda name=name: parse_name(name), f"unknown solver {name!r}")
        for name in ("rk45", "euler-", "ipndm-x", "", "IPNDM", "dpmpp-3-2")
    ),
    *(
        (lambda name=name: make_solver(name), "has the orders")
        for name in ("ipndm-0", "ipndm-5", "euler-2", "dpmpp-4", "heun-1")
    ),
    (lambda: make_solver("ipndm-2", SolverOptions(order=3)), "'ipndm-2' and order 3 disagree"),
    (lambda: num_steps_for("heun", 5, False), "heun makes 2 calls an interval: 5"),
    (lambda: num_steps_for("heun", 4, True), "4 is not to be had"),
    (lambda: Sampler(IPNDM(3), (1.0, 0.5), FLOW, afs=True), "afs is for VE models"),
    *(
        (lambda grid=grid: Sampler(IPNDM(3), grid), "two or more falling levels")
        for grid in ((), (1.0,), (1.0, 2.0), (2.0, 1.0, 1.0), (1.0, -0.1), (2.0, 0.0, 0.0))
    ),
    *(
        (lambda grid=grid: Sampler(IPNDM(3), grid), "two or more falling levels")
        for grid in ((math.nan, 1.0), (2.0, math.nan), (math.inf, 1.0))
    ),
    *(
        (lambda kind=kind, ends=ends: kind(5, *ends), "sigma_min|low")
        for kind in (polynomial, log_snr, time_uniform)
        for ends in ((1.0, 1.0), (80.0, 0.002), (-1.0, 80.0), (math.nan, 80.0), (0.1, math.inf))
    ),
    *(
        (lambda kind=kind, n=n: kind(n, 0.002, 80.0), f"num_steps >= 2.* not {n}")
        for kind in (polynomial, log_snr, time_uniform)
        for n in (1, -3)
    ),
    *(
        (lambda kind=kind, rho=rho: kind(5, 0.002, 80.0, rho), "rho > 0")
        for kind in (polynomial, time_uniform)
        for rho in (0.0, -1.0, math.nan)
    ),
    (lambda: log_snr(5, 0.0, 80.0), "0 < low"),
    (lambda: time_uniform(5, 1.0, 2.0), "no VP process has the ends"),
    *(
        (lambda ends=ends: discrete(*ends), "a grid needs")
        for ends in ((5, 5), (9, 3), (-1, 999), (0, math.inf))
    ),
    (lambda: NoiseLevels(VE, 0.1, 1.0).grid("cosine", 5), "unknown schedule 'cosine'"),
    (lambda: NoiseLevels(VE, 0.1, 1.0).grid("discrete", 5), "no 'discrete' schedule"),
    *((lambda s=s: flowmatch(5, shift=s), "shift above 0") for s in (0.0, -3.0, math.nan)),
    (lambda: flowmatch(5, mu=math.nan), "shift above 0"),
    (lambda: flowmatch(1), "num_steps >= 2"),
]


def discrete(first: float, last: float) -> Tensor:
    return NoiseLevels(VE, 0.1, 1.0, Timesteps(first, last, lambda t: t)).grid("discrete", 5)


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[w for _, w in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_thresholding_goes_by_each_sample_and_point() -> None:
    x0 = torch.stack([torch.full((2, 7), 5.0), torch.full((2, 7), 0.5)])
    assert dynamic_threshold(x0)[:, :, 0].tolist() == [[1, 1], [0.5, 0.5]]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_name_makes_its_solver_in_every_order_and_it_makes_the_calls_it_claims(
    name: str,
) -> None:
    entry = SOLVERS[name]
    for order in entry.orders:
        solver, field = make_solver(f"{name}-{order}"), Field(ve)
        *_, end = integrate(solver, field, LATENTS * 20, log_snr(6, 0.1, 20.0))
        assert end.isfinite().all()
        assert field.tally.calls == 5 * entry.calls
    assert make_solver(name) == make_solver(f"{name}-{entry.default_order}")


@pytest.mark.parametrize(
    ("name", "nfe", "afs", "num_steps"),
    [("euler", 5, False, 6), ("euler", 5, True, 7), ("heun", 6, False, 4), ("heun", 5, True, 4)],
)
def test_the_grid_for_a_number_of_calls(name: str, nfe: int, afs: bool, num_steps: int) -> None:
    assert num_steps_for(name, nfe, afs) == num_steps


def test_the_processes_by_hand() -> None:
    assert (VE.alpha(3.0), FLOW.alpha(0.25)) == (1, 0.75)
    assert math.isclose(float(VE.half_log_snr(2.0)), -math.log(2))
    assert math.isclose(float(FLOW.half_log_snr(0.25)), math.log(3))
    level = torch.tensor([0.25, 1.0], dtype=torch.float64)
    clock = FLOW.half_log_snr(level)
    assert isinstance(clock, Tensor)
    assert torch.allclose(clock, torch.tensor([math.log(3), math.log(1e-6)]).double())
