"""Refinement by what samples look like: sets, features, rewards, and what is refused."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from solvers.classic import Heun
from solvers.field import Condition, Field
from solvers.sampler import Sampler
from solvers.schedules import polynomial
from training.api import Settings, distill, sample
from training.descend import Lens, Linearised, Objective
from training.distances import energy, frechet, parse_terms
from training.student import Trajectories

POINTS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.8, -1.4]])
FEW = Settings(nfe=3, samples=160, judges=80, positions=7, rounds=2, fine_steps=17, robust=False)
FEW = replace(FEW, schedule="logsnr")


def cloud(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    """The posterior mean of three points with a little width."""
    sigma = sigma[:, None]
    variance = 0.2**2 + sigma**2
    share = (-(x[:, None] - POINTS).square().sum(-1) / (2 * variance)).softmax(1)
    return (share @ POINTS * sigma**2 + x * 0.2**2) / variance


def waves(x: Tensor) -> Tensor:
    """Six features of points in the plane."""
    return torch.cat([torch.sin(k * x) for k in (1, 2, 3)], 1)


def near_first(x: Tensor, _numbers: object) -> Tensor:
    return -(x - POINTS[0]).square().sum(1).sqrt()


def noise(count: int = 400) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3))


def test_set_distances_are_those_of_closed_forms() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    assert energy(a, b).item() == pytest.approx(2 * (1 + 3 + 1 + 1) / 4 - 1 - 1)
    x = noise(500)
    assert frechet(x, x).item() == pytest.approx(0, abs=1e-5)
    assert frechet(x + 2, x).item() == pytest.approx(8, rel=1e-4)
    spread = frechet(3 * x, x).item()
    assert spread == pytest.approx(4 * (torch.cov(x.T).trace() + x.mean(0).square().sum()).item())
    for distance in (energy, frechet):
        moved = (x + 0.1).requires_grad_()
        (slope,) = torch.autograd.grad(distance(moved, x), moved)
        assert bool(slope.isfinite().all())


def test_sums_are_read_as_weights_and_names() -> None:
    assert parse_terms("l2+0.1*distribution") == ((1.0, "l2"), (0.1, "distribution"))
    for wrong, says in (("l3", "unknown distance 'l3'"), ("-1*l2", "weight -1"), ("", "unknown")):
        with pytest.raises(ValueError, match=says):
            parse_terms(wrong)


@pytest.mark.parametrize(
    ("solver", "distance", "look"),
    [
        ("epd-ipndm", "features", lambda x, t: (waves(x) - waves(t)).square().sum(1).mean()),
        ("epd-multistep", "distribution", lambda x, t: frechet(waves(x), waves(t))),
        ("epd", "energy", lambda x, t: energy(waves(x), waves(t))),
        ("epd-multistep", "reward", lambda x, _t: -near_first(x, ()).mean()),
    ],
)
def test_each_objective_lowers_itself_on_fresh_noise(
    solver: str, distance: str, look: Callable[[Tensor, Tensor], Tensor]
) -> None:
    ends = []
    for name in ("l2", distance):
        settings = replace(FEW, solver=solver, distance=name)
        predictor = distill(
            cloud, "ve", shape=(2,), settings=settings, features=waves, reward=near_first
        )
        ends.append(sample(predictor, cloud, noise()))
    grid = tuple(polynomial(65, 0.002, 80.0).tolist())
    *_, target = Sampler(Heun(), grid).states(Field(cloud), noise() * 80)
    before, after = (look(end, target).item() for end in ends)
    assert after < before + 0.02 * abs(before)
    assert predictor.recipe.training["fitted_on"] == ["features"]


def test_a_step_of_squares_is_that_of_gauss_newton() -> None:
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(40, 3, 2, generator=generator)
    best = torch.tensor([0.5, -1.0, 2.0])
    targets = torch.einsum("npd,p->nd", moves, best)
    columns = torch.cat([moves, targets[:, None]], 1).transpose(0, 1).flatten(1).double()
    linear = Linearised(torch.zeros(40, 2), moves, targets, columns @ columns.T, 80)
    for name in ("l2", "features"):
        objective = Objective(((1.0, name),), (2,), (1.0,))
        assert torch.allclose(linear.step(objective, 1e-9).float(), best, atol=1e-2)


def test_a_lens_sees_the_teachers_samples_in_units_of_their_spread() -> None:
    batch = Trajectories(Field(cloud), noise(), (noise(),))
    lens = Lens(waves, near_first).on([batch])
    seen = lens(noise(), range(400))
    assert seen.shape == (400, 6 + 2 + 1)
    assert torch.allclose(torch.cov(seen[:, :6].T), torch.eye(6), atol=1e-3)
    assert torch.allclose(torch.cov(seen[:, 6:8].T), torch.eye(2), atol=1e-3)
    assert Lens(None, None).on([batch])(noise(4), range(4)).shape == (4, 0)


@pytest.mark.parametrize(
    ("distance", "more", "says"),
    [
        ("features", {}, "'features' needs its network"),
        ("l2+reward", {}, "needs its reward"),
        ("lpips", {}, "unknown distance 'lpips'"),
        ("features", {"features": lambda x: x[:, :, 9]}, "cannot look at"),
        ("energy", {"features": lambda x: x * torch.nan}, "features gives numbers that are not"),
        ("features", {"features": lambda x: x.sum()}, r"features gives \(\) for 2 samples"),
        ("reward", {"reward": lambda x, _n: x}, r"reward gives \(2, 2\) for 2 samples"),
        ("huber", {}, "unknown distance 'huber'"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line_before_any_work(
    distance: str, more: dict[str, object], says: str
) -> None:
    calls = []

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        calls.append(len(x))
        return cloud(x, sigma, cond)

    settings = replace(FEW, distance=distance)
    with pytest.raises(ValueError, match=says):
        distill(counted, "ve", shape=(2,), settings=settings, **more)  # pyright: ignore[reportArgumentType]
    assert len(calls) <= 1


@pytest.mark.parametrize("calls", [60, 110, 130, 170])
def test_a_network_that_breaks_on_the_way_crashes_nothing(calls: int) -> None:
    """One sample is not a number after so many calls: in a fit, a Jacobian, a comparison."""
    count = []

    def breaking(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        count.append(1)
        x0 = cloud(x, sigma, cond)
        return x0.index_fill(0, torch.tensor([0]), math.nan) if len(count) > calls else x0

    settings = replace(FEW, distance="distribution", samples=16, judges=8)
    with contextlib.suppress(ValueError):
        table = distill(breaking, "ve", shape=(2,), settings=settings, features=waves).table
        assert all(bool(t.isfinite().all()) for t in table.tensors())
    assert len(count) > calls
