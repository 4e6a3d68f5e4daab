"""The loop: where it stops, what it counts, what it asks, and where gradients flow."""

import math

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun
from solvers.epd import EPD, Directions
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Condition, Field, Tally
from solvers.integrate import Solver
from solvers.schedules import log_snr
from tests.solvers.mixture import LATENTS, distance, gauss, integrate, learned, run, ve

GRID = log_snr(5, 0.05, 30.0)
STEPS = len(GRID) - 1
EVERY = [
    Euler(),
    Heun(),
    DPM2(),
    IPNDM(4),
    DPMpp(3),
    DPMpp(2, predict_x0=False),
    DEIS(3),
    UniPC(3),
    EPD(learned(STEPS)),
    EPD(learned(STEPS), IPNDM(3)),
]


def noise(index: int, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7 + index)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_one_state_is_yielded_for_each_level_after_the_first() -> None:
    states = list(integrate(Euler(), Field(ve), LATENTS * 30, GRID))
    assert [s.shape for s in states] == [LATENTS.shape] * STEPS
    x = LATENTS * 30
    for state, sigma, after in zip(states, GRID, GRID[1:], strict=False):
        x = x + (after - sigma) * Field(ve)(x[:, None], sigma.item())[:, 0]
        assert torch.allclose(state, x, atol=1e-12)


def test_the_loop_runs_only_as_far_as_it_is_asked() -> None:
    field = Field(ve)
    trajectory = integrate(Euler(), field, LATENTS * 30, GRID)
    next(trajectory)
    assert field.tally.calls == 1


@pytest.mark.parametrize(
    ("solver", "calls", "rows"),
    [
        (Euler(), STEPS, STEPS),
        (IPNDM(4), STEPS, STEPS),
        (DPMpp(3), STEPS, STEPS),
        (DEIS(4), STEPS, STEPS),
        (UniPC(3), STEPS, STEPS),
        (Heun(), 2 * STEPS, 2 * STEPS),
        (DPM2(), 2 * STEPS, 2 * STEPS),
        (EDM(noise, s_churn=9.0), 2 * STEPS, 2 * STEPS),
        (EPD(learned(STEPS, 2)), 2 * STEPS, 3 * STEPS),
        (EPD(learned(STEPS, 4), IPNDM(3)), 2 * STEPS, 5 * STEPS),
        (EPD(learned(STEPS, 3), Heun()), 3 * STEPS, 7 * STEPS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_calls_and_rows_are_what_the_method_says(solver: Solver, calls: int, rows: int) -> None:
    field = Field(ve)
    list(integrate(solver, field, LATENTS * 30, GRID, correct=True))
    assert field.tally == Tally(calls, rows * len(LATENTS))


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_afs_saves_one_call_and_takes_the_first_slope_from_the_formula(solver: Solver) -> None:
    field, plain = Field(ve), Field(ve)
    list(integrate(solver, field, LATENTS * 30, GRID, afs=True, correct=True))
    list(integrate(solver, plain, LATENTS * 30, GRID, correct=True))
    assert field.tally.calls == plain.tally.calls - 1
    if solver == Euler():
        x = next(integrate(solver, field, LATENTS, [3.0, 2.0], afs=True))
        assert torch.allclose(x, LATENTS - LATENTS / math.sqrt(10))


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_a_final_0_denoises_once_more_and_leaves_the_steps_before_it_as_they_were(
    solver: Solver,
) -> None:
    field, x = Field(gauss), LATENTS * 30
    *before, last, clean = integrate(solver, field, x, [*GRID.tolist(), 0.0], correct=True)
    calls = field.tally.calls
    plain = Field(gauss)
    states = list(integrate(solver, plain, x, GRID, correct=True))
    assert torch.equal(torch.stack([*before, last]), torch.stack(states))
    assert calls == plain.tally.calls + 1
    if not isinstance(solver, UniPC):  # its corrector moves the last point before it is denoised
        assert distance(clean, gauss(last, GRID[-1:])) < 1e-12


def test_a_unipc_trajectory_ends_in_what_the_network_said_at_the_last_level() -> None:
    solver = UniPC(3)
    *_, last, clean = integrate(
        solver, Field(ve), LATENTS * 30, [*GRID.tolist(), 0.0], correct=True
    )
    assert distance(clean, ve(last, GRID[-1:].expand(2))) < 1e-12


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_single_precision_follows_double(solver: Solver) -> None:
    single = run(solver, GRID, x=LATENTS.float() * 30, correct=True)
    assert single.dtype == torch.float32
    assert distance(single.double(), run(solver, GRID, correct=True)) < 1e-5


@pytest.mark.parametrize("shape", [(6,), (5, 3), (3, 4, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_a_sample_may_have_any_shape(solver: Solver, shape: tuple[int, ...]) -> None:
    """On an elementwise field the shape is only a way of laying numbers out."""
    size = math.prod(shape)
    flat = torch.linspace(-30, 30, 2 * size, dtype=torch.float64).reshape(2, size)
    end = run(solver, GRID, gauss, flat.reshape(2, *shape), correct=True)
    assert end.shape == (2, *shape)
    assert torch.allclose(end.flatten(1), run(solver, GRID, gauss, flat, correct=True), atol=1e-13)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_a_sample_is_the_same_whatever_it_is_batched_with(solver: Solver) -> None:
    x = LATENTS.float() * 30
    both = run(solver, GRID, gauss, x, correct=True)
    alone = [run(solver, GRID, gauss, x[i : i + 1], correct=True) for i in range(2)]
    assert torch.equal(both, torch.cat(alone))


def table_that_learns() -> tuple[Tensor, Directions]:
    r = torch.full((STEPS, 2), 0.4, dtype=torch.float64, requires_grad=True)
    one = torch.ones(STEPS, 2, dtype=torch.float64)
    return r, Directions(r, one / 2, one, one)


@pytest.mark.parametrize("base", [Euler(), IPNDM(3), DPMpp(2)], ids=repr)
def test_gradients_reach_every_step_of_the_table(base: Solver) -> None:
    r, table = table_that_learns()
    run(EPD(table, base), GRID).sum().backward()
    assert r.grad is not None
    assert (r.grad != 0).all()


@pytest.mark.parametrize("base", [Euler(), IPNDM(3), DPMpp(2)], ids=repr)
def test_detaching_lets_each_step_learn_alone(base: Solver) -> None:
    for i in range(STEPS):
        r, table = table_that_learns()
        states = list(integrate(EPD(table, base), Field(ve), LATENTS * 30, GRID, detach=True))
        states[i].sum().backward()
        assert r.grad is not None
        assert (r.grad != 0).any(1).tolist() == [step == i for step in range(STEPS)]


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_detaching_changes_no_number_and_asks_for_no_more(solver: Solver) -> None:
    cut, whole = Field(ve), Field(ve)
    a = list(integrate(solver, cut, LATENTS * 30, GRID, detach=True, correct=True))
    b = list(integrate(solver, whole, LATENTS * 30, GRID, correct=True))
    assert torch.equal(torch.stack(a), torch.stack(b))
    assert cut.tally == whole.tally


def test_the_gradient_of_a_place_is_the_finite_difference() -> None:
    r, table = table_that_learns()
    run(EPD(table), GRID)[0, 0, 0, 0].backward()
    assert r.grad is not None
    step = torch.zeros_like(table.r)
    step[1, 0] = 1e-6
    rest = table.tensors()[1:]
    ends = [run(EPD(Directions(r.detach() + s, *rest)), GRID) for s in (step, -step)]
    slope = (ends[0] - ends[1])[0, 0, 0, 0].item() / 2e-6
    assert math.isclose(r.grad[1, 0].item(), slope, rel_tol=1e-6)


def test_churn_takes_its_noise_from_the_callable_alone() -> None:
    state = torch.random.get_rng_state()
    churned = EDM(noise, s_churn=2.0, s_noise=1.003)
    assert torch.equal(run(churned, GRID), run(churned, GRID))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert distance(run(churned, GRID), run(Heun(), GRID)) > 1e-3


def test_churn_by_hand() -> None:
    """One step of Karras et al. 2022, Alg. 2, with gamma = min(s_churn / N, sqrt 2 - 1)."""
    sigma, after, gamma = 4.0, 1.0, 0.2
    higher = sigma * (1 + gamma)
    x = LATENTS + math.sqrt(higher**2 - sigma**2) * 1.1 * noise(0, LATENTS[:, None])[:, 0]
    field = Field(ve)
    d = field(x[:, None], higher)[:, 0]
    end = x + (after - higher) * d
    end = x + (after - higher) * (d + field(end[:, None], after)[:, 0]) / 2
    churned = EDM(noise, s_churn=0.2, s_noise=1.1)
    assert distance(run(churned, torch.tensor([sigma, after]), x=LATENTS), end) < 1e-12


@pytest.mark.parametrize(
    "grid",
    [
        [1.0],
        [],
        [1.0, 2.0],
        [2.0, 1.0, 1.0],
        [1.0, -0.1],
        [2.0, 0.0, 0.0],
        [math.nan, 1.0],
        [2.0, math.nan],
        [math.inf, 1.0],
    ],
    ids=str,
)
def test_a_bad_grid_is_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must be two or more falling levels"):
        next(integrate(Euler(), Field(ve), LATENTS, grid))


def test_conditions_reach_the_network_at_every_point() -> None:
    def denoiser(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        assert cond is not None
        return gauss(x, sigma) * cond.given["gain"].reshape(-1, 1, 1, 1)

    gain = torch.tensor([0.5, 2.0], dtype=torch.float64)
    solver = EPD(learned(STEPS, 3))
    *_, both = integrate(solver, Field(denoiser, Condition({"gain": gain})), LATENTS * 30, GRID)
    for i in range(2):
        field = Field(denoiser, Condition({"gain": gain[i : i + 1]}))
        *_, alone = integrate(solver, field, LATENTS[i : i + 1] * 30, GRID)
        assert torch.equal(both[i : i + 1], alone)
