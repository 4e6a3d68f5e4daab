"""EPD: its step by hand, its table, the bases that it may stand on, and what it costs."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD, Directions
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Condition, Field
from solvers.integrate import Solver
from solvers.process import FLOW
from solvers.schedules import flowmatch
from tests.solvers.gauss import (
    LATENTS,
    directions,
    distance,
    flow,
    integrate,
    learned,
    log_snr,
    run,
    ve,
)

GRID = log_snr(4, 0.1, 20.0)
STEPS = len(GRID) - 1


def test_a_step_by_hand() -> None:
    """Section 3 of the paper's method, written with a loop over the points."""
    table = learned(1, 3)
    t, s, x = 5.0, 2.0, LATENTS * 5
    d_n = (x - ve(x, x.new_full((2,), t))) / t
    total = torch.zeros_like(x)
    for k in range(3):
        r, w, c, o = (float(tensor[0, k]) for tensor in table.tensors())
        t_k = s**r * t ** (1 - r)
        x_k = x + (t_k - t) * d_n
        total = total + w * o * (x_k - ve(x_k, x.new_full((2,), c * t_k))) / t_k
    end = run(EPD(table), torch.tensor([t, s]))
    assert distance(end, x + (s - t) * total) < 1e-12


BASES: list[Solver] = [Heun(), IPNDM(4), IPNDMv(4), DPMpp(2), DPMpp(3), DPMpp(3, False), DEIS(4)]
BASES += [DEIS(3, "rhoab"), DPM2(), Euler()]


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_epd_stands_on_any_solver_whose_step_is_a_path(base: Solver) -> None:
    """Halfway points of a better path bring Euler's and the base's error down.

    At r = 0 the step is Euler's and its gradient is finite, whatever the base.
    """
    grid, x = log_snr(9, 0.1, 20.0), LATENTS * 20
    error = distance(run(EPD(directions([[0.5]] * 8), base), grid), exact())
    assert error < 0.5 * distance(run(Euler(), grid), exact())
    for dtype in (torch.float32, torch.float64):
        table = directions([[0.0]] * 8)
        r = table.r.requires_grad_()
        end = run(EPD(table, base), grid, x=x.to(dtype))
        end.sum().backward()
        assert distance(end, run(Euler(), grid, x=x.to(dtype))) < 1e-5
        assert r.grad is not None
        assert r.grad.isfinite().all()


@functools.cache
def exact() -> Tensor:
    return run(Heun(), log_snr(400, 0.1, 20.0))


def test_epd_samples_flow_matching_from_pure_noise() -> None:
    exact = run(Heun(), flowmatch(300, shift=3.0), flow, LATENTS)
    grid = flowmatch(33, shift=3.0)
    both_ends = directions([[0.0, 1.0]] * 32)
    for base in (Euler(), IPNDM(3), DPMpp(2, process=FLOW), DPMpp(3, False, process=FLOW)):
        error = distance(run(EPD(both_ends, base), grid, flow, LATENTS), exact)
        assert error < 0.5 * distance(run(Euler(), grid, flow, LATENTS), exact)


@pytest.mark.parametrize(
    "base",
    [UniPC(2), EDM(lambda _i, x: x), EPD(learned(STEPS)), DEIS(4, "rhoab")],
    ids=lambda base: type(base).__name__,
)
def test_a_base_that_cannot_serve_is_refused(base: Solver) -> None:
    with pytest.raises(ValueError, match=f"cannot stand on {type(base).__name__}"):
        EPD(learned(STEPS), base)


def test_a_table_is_taken_in_the_type_of_the_samples_and_has_a_row_for_each_step() -> None:
    single = Directions(*(t.float() for t in learned(STEPS).tensors()))
    assert run(EPD(learned(STEPS)), GRID, x=LATENTS.float() * 20).dtype == torch.float32
    assert run(EPD(single), GRID).dtype == torch.float64
    for rows in (STEPS - 1, STEPS + 1):
        with pytest.raises(ValueError, match=f"a table of {rows} steps cannot take {STEPS} steps"):
            run(EPD(learned(rows)), GRID)


VIEWS = {"view", "_unsafe_view", "select", "split", "squeeze", "transpose", "t", "expand", "alias"}


class Count(TorchDispatchMode):
    """Counts the tensor operations that compute, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).split(".")[1]
        self.computed += name not in VIEWS
        return func(*args, **(kwargs or {}))


def operations(points: int, batch: int = 1, base: Solver | None = None) -> int:
    """What one more step costs with a network that does nothing."""

    def null(x: torch.Tensor, _sigma: torch.Tensor, _cond: Condition | None) -> torch.Tensor:
        return x

    counts = []
    for steps in (6, 7):
        solver = EPD(learned(steps, points), base or Euler())
        with Count() as count:
            list(integrate(solver, Field(null), LATENTS[:batch], log_snr(steps + 1, 0.1, 20.0)))
        counts.append(count.computed)
    return counts[1] - counts[0]


def test_a_step_of_two_points_takes_15_tensor_operations() -> None:
    """The step that the published code takes in 24 to 39; a batch adds two, which lay out rows."""
    assert operations(points=2) <= 15
    assert operations(points=2, batch=2) == operations(points=2) + 2
    for points in (1, 3, 8):  # more points take no more operations
        assert operations(points) == operations(2)
