"""The loop: where it stops, what it counts, what it asks, and where gradients flow."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun
from solvers.epd import EPD, Directions
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Condition, Field, Tally
from solvers.integrate import Solver
from tests.solvers.gauss import LATENTS, distance, gauss, integrate, learned, log_snr, run, ve

GRID = log_snr(5, 0.05, 30.0)
STEPS = len(GRID) - 1
X = LATENTS * 30


def noise(index: int, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7 + index)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


COSTS: list[tuple[Solver, int, int]] = [  # sequential calls and rows of a step
    *((s, 1, 1) for s in (Euler(), IPNDM(4), DPMpp(3), DPMpp(2, predict_x0=False))),
    *((s, 1, 1) for s in (DEIS(3), DEIS(4), UniPC(3))),
    *((s, 2, 2) for s in (Heun(), DPM2(), EDM(noise, s_churn=9.0))),
    (EPD(learned(STEPS)), 2, 3),
    (EPD(learned(STEPS, 4), IPNDM(3)), 2, 5),
    (EPD(learned(STEPS, 3), Heun()), 3, 7),
]
EVERY = [solver for solver, _, _ in COSTS if not isinstance(solver, EDM)]


@pytest.mark.parametrize(("solver", "calls", "rows"), COSTS, ids=lambda v: type(v).__name__)
def test_calls_and_rows_are_what_the_method_says(solver: Solver, calls: int, rows: int) -> None:
    field = Field(ve)
    list(integrate(solver, field, X, GRID, correct=True))
    assert field.tally == Tally(calls * STEPS, rows * STEPS * len(X))


def test_a_state_is_yielded_for_each_level_after_the_first_and_only_when_asked_for() -> None:
    field, x = Field(ve), X
    trajectory = integrate(Euler(), field, x, GRID)
    for n, (sigma, after) in enumerate(pairwise(GRID), 1):
        state = next(trajectory)
        assert field.tally.calls == n
        x = x + (after - sigma) * Field(ve)(x[:, None], sigma.item())[:, 0]
        assert torch.allclose(state, x, atol=1e-12)
    assert next(trajectory, None) is None


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_afs_detaching_a_final_0_and_float32_on_every_solver(solver: Solver) -> None:
    whole, cut, free, longer = (Field(ve) for _ in range(4))
    states = list(integrate(solver, whole, X, GRID, correct=True))
    detached = list(integrate(solver, cut, X, GRID, detach=True, correct=True))
    assert torch.equal(torch.stack(detached), torch.stack(states))
    assert cut.tally == whole.tally
    list(integrate(solver, free, X, GRID, afs=True, correct=True))
    assert free.tally.calls == whole.tally.calls - 1  # the first slope is the formula's
    *before, clean = integrate(solver, longer, X, [*GRID.tolist(), 0.0], correct=True)
    assert torch.equal(torch.stack(before), torch.stack(states))
    assert longer.tally.calls == whole.tally.calls + 1
    # the network's word at the last level; UniPC's corrector moves x, and not what was said
    assert distance(clean, ve(states[-1], GRID[-1:].expand(2))) < 1e-12
    single = run(solver, GRID, x=X.float(), correct=True)
    assert single.dtype == torch.float32
    assert distance(single.double(), states[-1]) < 1e-5


def test_afs_by_hand() -> None:
    x = next(integrate(Euler(), Field(ve), LATENTS, [3.0, 2.0], afs=True))
    assert torch.allclose(x, LATENTS - LATENTS / math.sqrt(10))


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_a_sample_is_the_same_in_any_shape_and_batch(solver: Solver) -> None:
    """On an elementwise field the shape is only a way of laying numbers out."""
    for shape in ((6,), (5, 3), (3, 4, 4), (2, 3, 4, 4)):
        size = math.prod(shape)
        flat = torch.linspace(-30, 30, 2 * size, dtype=torch.float64).reshape(2, size)
        end = run(solver, GRID, gauss, flat.reshape(2, *shape), correct=True)
        assert end.shape == (2, *shape)
        expected = run(solver, GRID, gauss, flat, correct=True)
        assert torch.allclose(end.flatten(1), expected, atol=1e-13)
    x = X.float()
    alone = [run(solver, GRID, gauss, x[i : i + 1], correct=True) for i in range(2)]
    assert torch.equal(run(solver, GRID, gauss, x, correct=True), torch.cat(alone))


def table_that_learns() -> tuple[Tensor, Directions]:
    table = learned(STEPS)
    r = table.r.requires_grad_()
    return r, table


@pytest.mark.parametrize("base", [Euler(), IPNDM(3), DPMpp(2)], ids=repr)
def test_gradients_reach_every_step_and_detached_each_step_alone(base: Solver) -> None:
    r, table = table_that_learns()
    run(EPD(table, base), GRID).sum().backward()
    assert r.grad is not None
    assert (r.grad != 0).all()
    for i in range(STEPS):
        r, table = table_that_learns()
        states = list(integrate(EPD(table, base), Field(ve), X, GRID, detach=True))
        states[i].sum().backward()
        assert r.grad is not None
        assert (r.grad != 0).any(1).tolist() == [step == i for step in range(STEPS)]


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


def test_churn_takes_its_noise_from_the_callable_alone_and_is_its_formula() -> None:
    """One step of Karras et al. 2022, Alg. 2, with gamma = min(s_churn / N, sqrt 2 - 1)."""
    state = torch.random.get_rng_state()
    churned = EDM(noise, s_churn=2.0, s_noise=1.003)
    assert torch.equal(run(churned, GRID), run(churned, GRID))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert distance(run(churned, GRID), run(Heun(), GRID)) > 1e-3
    sigma, after, gamma = 4.0, 1.0, 0.2
    higher, field = sigma * (1 + gamma), Field(ve)
    x = LATENTS + math.sqrt(higher**2 - sigma**2) * 1.1 * noise(0, LATENTS[:, None])[:, 0]
    d = field(x[:, None], higher)[:, 0]
    end = x + (after - higher) * d
    end = x + (after - higher) * (d + field(end[:, None], after)[:, 0]) / 2
    churned = EDM(noise, s_churn=0.2, s_noise=1.1)
    assert distance(run(churned, torch.tensor([sigma, after]), x=LATENTS), end) < 1e-12


def test_churn_to_zero_is_karras_algorithm_2() -> None:
    """All N steps, the last of which ends at 0, have their noise."""
    levels = [4.0, 1.0, 0.2, 0.0]
    churned = EDM(noise, s_churn=0.9, s_noise=1.1)
    gamma, x, field = 0.3, LATENTS * levels[0], Field(ve)
    for i, (sigma, after) in enumerate(pairwise(levels)):
        higher = sigma * (1 + gamma)
        x = x + math.sqrt(higher**2 - sigma**2) * 1.1 * noise(i, x[:, None])[:, 0]
        d = field(x[:, None], higher)[:, 0]
        end = x + (after - higher) * d
        if after:
            end = x + (after - higher) * (d + field(end[:, None], after)[:, 0]) / 2
        x = end
    grid = torch.tensor(levels, dtype=torch.float64)
    assert distance(run(churned, grid, x=LATENTS * levels[0]), x) < 1e-12


def test_conditions_reach_the_network_at_every_point() -> None:
    def denoiser(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        assert cond is not None
        return gauss(x, sigma) * cond.given["gain"].reshape(-1, 1, 1, 1)

    gain, solver = torch.tensor([0.5, 2.0], dtype=torch.float64), EPD(learned(STEPS, 3))
    *_, both = integrate(solver, Field(denoiser, Condition({"gain": gain})), X, GRID)
    for i in range(2):
        field = Field(denoiser, Condition({"gain": gain[i : i + 1]}))
        *_, alone = integrate(solver, field, X[i : i + 1], GRID)
        assert torch.equal(both[i : i + 1], alone)
