"""What a solver cannot be is refused where it is made, in one line that names it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, IPNDMv
from solvers.exponential import DEIS, DPMpp, UniPC, dynamic_threshold
from solvers.field import Field
from solvers.integrate import integrate
from solvers.process import FLOW, VE, process_named
from solvers.sampler import SOLVERS, SolverOptions, make_solver, num_steps_for, parse_name
from solvers.schedules import log_snr
from tests.solvers.mixture import LATENTS, ve

ORDERED = [(IPNDM, 4), (IPNDMv, 4), (DEIS, 4), (DPMpp, 3), (UniPC, 3)]


def refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("order", [0, 5, -1, "3", 2.0, None, True, math.nan], ids=repr)
@pytest.mark.parametrize(("kind", "highest"), ORDERED)
def test_an_order_that_the_solver_lacks_is_refused(kind: Any, highest: int, order: Any) -> None:
    refused(lambda: kind(order), kind.__name__, f"orders 1 to {highest}", repr(order))


@pytest.mark.parametrize(("kind", "highest"), ORDERED)
def test_the_order_above_the_highest_is_refused(kind: Any, highest: int) -> None:
    assert [kind(order).order for order in range(1, highest + 1)] == [*range(1, highest + 1)]
    refused(lambda: kind(highest + 1), str(highest + 1))


@pytest.mark.parametrize("r", [0.0, -0.1, 1.1, math.nan])
def test_a_midpoint_outside_the_step_is_refused(r: float) -> None:
    refused(lambda: DPM2(r), "DPM2", str(r))


@pytest.mark.parametrize(
    "churn", [{"s_churn": -1.0}, {"s_churn": math.nan}, {"s_noise": -1.0}, {"s_churn": math.inf}]
)
def test_a_negative_or_endless_churn_is_refused(churn: dict[str, float]) -> None:
    ((name, value),) = churn.items()
    refused(lambda: EDM(lambda _i, x: x, **churn), name, str(value))


def test_an_empty_range_of_churn_is_refused() -> None:
    refused(lambda: EDM(lambda _i, x: x, s_min=2.0, s_max=1.0), "s_min <= s_max", "2.0", "1.0")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: UniPC(2, "bh3"), "bh3"),  # pyright: ignore[reportArgumentType]
        (lambda: DEIS(2, "rho"), "rho"),  # pyright: ignore[reportArgumentType]
        (lambda: process_named("vp"), "vp"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(
    make: Callable[[], object], name: str
) -> None:
    refused(make, f"unknown {'process' if name == 'vp' else ''}".strip(), repr(name), "choose")


@pytest.mark.parametrize("kind", [DPMpp, UniPC])
def test_thresholding_is_refused_where_noise_is_predicted(kind: Any) -> None:
    refused(lambda: kind(2, predict_x0=False, thresholding=True), "thresholding", "predict_x0")


def test_thresholding_by_hand() -> None:
    """Ten times 1, and one 3: the 99.5 % quantile lies 95 % of the way from 1 to 3."""
    x0 = torch.ones(1, 1, 11)
    x0[..., 3] = -3
    limit = 1 + 2 * 0.95
    clipped = dynamic_threshold(x0)
    assert torch.allclose(clipped[..., 3], torch.tensor(-1.0))
    assert torch.allclose(clipped[..., 0], torch.tensor(1 / limit))


def test_thresholding_leaves_what_lies_in_range() -> None:
    x0 = torch.linspace(-0.9, 0.9, 30).reshape(1, 2, 15)
    assert torch.equal(dynamic_threshold(x0), x0)


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


@pytest.mark.parametrize("name", ["rk45", "euler-", "ipndm-x", "", "IPNDM", "dpmpp-3-2"])
def test_an_unknown_solver_is_refused(name: str) -> None:
    refused(lambda: parse_name(name), "unknown solver", repr(name))


@pytest.mark.parametrize("name", ["ipndm-5", "euler-2", "dpmpp-4", "heun-1"])
def test_a_solver_of_an_order_that_it_lacks_is_refused(name: str) -> None:
    refused(lambda: make_solver(name), name.split("-")[0], name.split("-")[1])


def test_two_orders_that_disagree_are_refused() -> None:
    refused(lambda: make_solver("ipndm-2", SolverOptions(order=3)), "ipndm-2", "3", "disagree")


def test_options_reach_the_solver() -> None:
    options = SolverOptions(process=FLOW, lower_order_final=False, variant="bh1")
    assert make_solver("unipc-2", options) == UniPC(2, "bh1", True, False, FLOW)
    assert make_solver("dpmpp", SolverOptions(order=3, predict_x0=False)) == DPMpp(3, False)
    assert make_solver("deis-4", SolverOptions(deis_mode="rhoab")) == DEIS(4, "rhoab")


@pytest.mark.parametrize(
    ("name", "nfe", "afs", "num_steps"),
    [("euler", 5, False, 6), ("euler", 5, True, 7), ("heun", 6, False, 4), ("heun", 5, True, 4)],
)
def test_the_grid_for_a_number_of_calls(name: str, nfe: int, afs: bool, num_steps: int) -> None:
    assert num_steps_for(name, nfe, afs) == num_steps


@pytest.mark.parametrize(("name", "nfe", "afs"), [("heun", 5, False), ("heun", 4, True)])
def test_a_number_of_calls_that_no_grid_gives_is_refused(name: str, nfe: int, afs: bool) -> None:
    refused(lambda: num_steps_for(name, nfe, afs), name, str(nfe), "afs")


def test_the_processes_by_hand() -> None:
    assert (VE.alpha(3.0), FLOW.alpha(0.25)) == (1, 0.75)
    assert math.isclose(float(VE.half_log_snr(2.0)), -math.log(2))
    assert math.isclose(float(FLOW.half_log_snr(0.25)), math.log(3))
    level = torch.tensor([0.25, 1.0], dtype=torch.float64)
    clock = FLOW.half_log_snr(level)
    assert isinstance(clock, Tensor)
    assert torch.allclose(clock, torch.tensor([math.log(3), math.log(1e-6)]).double())


@pytest.mark.parametrize(("name", "order"), [("ipndm-0", None), ("ipndm", 0)])
def test_order_0_by_name_is_refused(name: str, order: int | None) -> None:
    refused(lambda: make_solver(name, SolverOptions(order=order)), "ipndm", "not 0")
