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
from solvers.sampler import SOLVERS, Sampler, SolverOptions, hand_made, make_solver, parse_name
from solvers.schedules import NoiseLevels, Timesteps, flowmatch, polynomial, time_uniform
from solvers.vp import table_of
from src.text import guidance_rates
from tests.solvers.gauss import LATENTS, integrate, log_snr, ve

NAN, INF = math.nan, math.inf
GRIDS: tuple[Callable[..., Tensor], ...] = (polynomial, log_snr, time_uniform)


def each(make: Callable[..., object], words: str, *values: Any) -> list[tuple[Any, str]]:
    """A row of REFUSED for every value."""
    return [(lambda v=v: make(*v) if isinstance(v, tuple) else make(v), words) for v in values]


def edm(options: dict[str, float]) -> EDM:
    return EDM(lambda _i, x: x, **options)  # pyright: ignore[reportArgumentType]


def discrete(first: float, last: float) -> Tensor:
    return NoiseLevels(VE, 0.1, 1.0, Timesteps(first, last, lambda t: t)).grid("discrete", 5)


def level_grid(name: str) -> Tensor:
    return NoiseLevels(VE, 0.1, 1.0).grid(name, 5)


def exponent(schedule: str) -> Sampler:
    return hand_made("euler", NoiseLevels(FLOW, 0.1, 1.0), 5, schedule=schedule, rho=7)


def sampler(*grid: float) -> Sampler:
    return Sampler(IPNDM(3), grid)


REFUSED: list[tuple[Callable[[], object], str]] = [
    *(
        row
        for kind in (IPNDM, IPNDMv, DEIS, DPMpp, UniPC)
        for row in each(kind, f"{kind.__name__} has the orders 1 to", 0, 5, "3", 2.0, None, True)
    ),
    *each(DPMpp, "1 to 3", 4),
    *each(DPM2, "r of DPM2 must be above 0", 0.0, 1.1, NAN),
    *each(edm, "s_churn, s_noise >= 0", {"s_churn": -1.0}, {"s_churn": NAN}, {"s_noise": INF}),
    *each(edm, "s_min <= s_max", {"s_min": 2.0, "s_max": 1.0}),
    *each(UniPC, "unknown variant of UniPC 'bh3'", (2, "bh3")),
    *each(UniPC, "it needs predict_x0", (2, "bh2", False, True, FLOW)),
    *each(DEIS, "unknown mode of DEIS 'rho'", (2, "rho")),
    *each(Process, "unknown process 'vp'", "vp"),
    *each(parse_name, "unknown solver", "rk45", "euler-", "ipndm-x", "", "IPNDM", "dpmpp-3-2"),
    *each(make_solver, "has the orders", "ipndm-0", "ipndm-5", "euler-2", "dpmpp-4", "heun-1"),
    *each(make_solver, "'ipndm-2' and order 3 disagree", ("ipndm-2", SolverOptions(order=3))),
    *each(Sampler, "afs is for VE models", (IPNDM(3), (1.0, 0.5), FLOW, True)),
    *each(sampler, "two or more falling levels", (), (1.0,), (1.0, 2.0), (2.0, 1.0, 1.0)),
    *each(sampler, "two or more falling levels", (1.0, -0.1), (2.0, 0.0, 0.0)),
    *each(sampler, "two or more falling levels", (NAN, 1.0), (2.0, NAN), (INF, 1.0)),
    *(
        row
        for kind in GRIDS
        for row in (
            *each(kind, "sigma_min|low", (5, 1.0, 1.0), (5, 80.0, 0.002), (5, -1.0, 80.0)),
            *each(kind, "sigma_min|low", (5, NAN, 80.0), (5, 0.1, INF)),
            *each(kind, "num_steps >= 2", (1, 0.002, 80.0), (-3, 0.002, 80.0)),
        )
    ),
    *(
        row
        for kind in (polynomial, time_uniform)
        for row in each(kind, "rho > 0", *((5, 0.002, 80.0, rho) for rho in (0.0, -1.0, NAN)))
    ),
    *each(log_snr, "0 < low", (5, 0.0, 80.0)),
    *each(time_uniform, "no VP process has the ends", (5, 1.0, 2.0)),
    *each(discrete, "a grid needs", (5, 5), (9, 3), (-1, 999), (0, INF)),
    *each(
        table_of, "num_train_timesteps", *({"num_train_timesteps": n} for n in (0, 1e3, 1 << 40))
    ),
    *each(
        table_of, "betas must be", {"beta_start": "x"}, {"trained_betas": "a"}, {"beta_end": NAN}
    ),
    *each(table_of, "a scheduler's config is a table", "abc", 7),
    *each(level_grid, "unknown schedule 'cosine'", "cosine"),
    *each(level_grid, "no 'discrete' schedule", "discrete"),
    *each(exponent, "schedule_rho 7 does nothing on", "logsnr", "flowmatch"),
    *((lambda s=s: flowmatch(5, shift=s), "shift above 0") for s in (0.0, -3.0, NAN)),
    (lambda: flowmatch(5, mu=NAN), "shift above 0"),
    *each(flowmatch, "num_steps >= 2", 1),
    *(
        (lambda text=text: guidance_rates(text, (10.0, 3.0, 1.0)), "write one rate, 3 with commas")
        for text in ("", "1,2", "1,2,3,4", "a", "-1", "nan", "4@1", "4@a-b", "1,2,3@0-1")
    ),
    *(
        (lambda text=text: guidance_rates(text, (10.0, 3.0, 1.0)), "no step begins")
        for text in ("4@3-1", "4@4-9")
    ),
]


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


def test_the_processes_by_hand() -> None:
    assert (VE.alpha(3.0), FLOW.alpha(0.25)) == (1, 0.75)
    assert math.isclose(float(VE.half_log_snr(2.0)), -math.log(2))
    assert math.isclose(float(FLOW.half_log_snr(0.25)), math.log(3))
    clock = torch.as_tensor(FLOW.half_log_snr(torch.tensor([0.25, 1.0], dtype=torch.float64)))
    assert torch.allclose(clock, torch.tensor([math.log(3), math.log(1e-6)]).double())
