"""Gauss-Newton on tables: a Jacobian that is one, ends that get nearer, and forms that invert."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from solvers.classic import IPNDM, Euler
from solvers.epd import Directions, Table
from solvers.field import Condition, Field
from solvers.sampler import Sampler
from tests.pretend_gpu import pretend_gpu
from training.fit import fit
from training.refine import ends, gauss_newton, normal_products
from training.student import Student, Trajectories, last_state, rmse
from training.table import (
    FreeForm,
    MultistepForm,
    PublishedForm,
    grid_to_raw,
    raw_to_grid,
    widened,
)

SIGMAS = (10.0, 3.0, 0.8, 0.1)
N, K = 3, 2


def curved(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) * 0.9


def data(count: int = 24, seed: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64) * SIGMAS[0]
    fine = torch.tensor([SIGMAS[0], SIGMAS[-1]], dtype=torch.float64).log()
    sigmas = torch.linspace(fine[0], fine[1], 200, dtype=torch.float64).exp().tolist()
    *_, end = Sampler(IPNDM(4), (*SIGMAS[:1], *sigmas[1:])).states(Field(curved), x)
    return Trajectories(Field(curved), x, (end,) * N)


STUDENTS = [
    Student(SIGMAS, FreeForm(N, K), Euler(), afs=True),
    Student(SIGMAS, PublishedForm(N, K, 0.05, 0.2, time_at_ends=0.25), IPNDM(2)),
    Student(SIGMAS, MultistepForm(N, K)),
]
EACH = pytest.mark.parametrize("student", STUDENTS, ids=["free", "published", "multistep"])


def greedy(student: Student, batch: Trajectories) -> Table:
    reach = student.form.scale_dir if isinstance(student.form, PublishedForm) else None
    return fit(student, [batch], positions=9, scale_dir=reach)


@EACH
def test_decoding_what_was_encoded_gives_the_same_steps(student: Student) -> None:
    theta = student.encode(greedy(student, data()))
    again = student.encode(student.decode(theta)[0])
    assert torch.allclose(again, theta, atol=1e-3)
    ends = [last_state(student.sampler(t), data()) for t in (theta, again)]
    assert torch.allclose(ends[0], ends[1], rtol=1e-3)


def test_weights_of_any_sign_survive_the_free_form() -> None:
    mix = torch.tensor([[1.4, -0.4], [0.0, 1.0], [-0.2, -0.3]], dtype=torch.float64)
    size = mix.abs().sum(-1, keepdim=True)
    one = torch.ones_like(mix)
    table = Directions(one / 2, mix.abs() / size, one, torch.where(mix < 0, -size, size))
    form = FreeForm(N, K)
    again = form.decode(form.encode(table))
    assert torch.allclose(again.weight * again.dir_scale, mix)
    assert torch.allclose(again.weight.sum(-1), torch.ones(N, dtype=torch.float64))


def test_grids_survive_and_always_fall() -> None:
    raw = grid_to_raw(SIGMAS)
    assert raw_to_grid(raw, 10.0, 0.1) == pytest.approx(SIGMAS)
    wild = raw_to_grid(torch.tensor([500.0, -500.0, 0.0]), 10.0, 0.1)
    assert all(a > b for a, b in pairwise(wild))


@EACH
def test_difference_quotients_agree_with_the_gradient(student: Student) -> None:
    batch = data(6)
    theta = student.encode(greedy(student, batch))
    nudge = torch.full_like(theta, 1e-7)
    products = normal_products(student, theta, batch, nudge)
    moving = theta.clone().requires_grad_()
    loss = (last_state(student.sampler(moving), batch) - batch.targets[-1]).square().sum() / 2
    (slope,) = torch.autograd.grad(loss, moving)
    assert torch.allclose(
        -products[:-1, -1], slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item()
    )


@EACH
def test_ends_are_those_of_whole_trajectories_by_the_rows_that_change_alone(
    student: Student,
) -> None:
    rows: list[int] = []

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        rows.append(len(x))
        return curved(x, sigma, cond)

    student, batch = replace(student, grid=True), replace(data(4), field=Field(counted))
    theta = student.encode(greedy(student, data()))
    nudge = torch.full_like(theta, 1e-3)
    by_rows = list(ends(student, theta, batch, nudge))
    asked = sum(rows)
    moved = [theta, *(theta + row for row in torch.diag(nudge))]
    whole = [last_state(student.sampler(each), batch) for each in moved]
    assert all(map(torch.allclose, by_rows, whole))
    assert asked < 0.7 * (sum(rows) - asked)


def test_a_fit_and_its_refinement_wait_for_a_gpu_by_the_round_and_not_by_the_batch() -> None:
    waits = []
    for count in (2, 6):
        with pretend_gpu() as seen:
            whole = data(24)
            x, end = (t.float().to("cuda") for t in (whole.x, whole.targets[-1]))
            batches = [Trajectories(Field(curved), x, (end,) * N)] * count
            table = fit(STUDENTS[0], batches, positions=5)
            fitted = sum(seen.waits.values())
            gauss_newton(STUDENTS[0], STUDENTS[0].encode(table), batches, rounds=2)
        assert sum(seen.uploads.values()) < 40 * count
        waits.append((fitted, sum(seen.waits.values()) - fitted))
    assert waits == [(N, 1 + 2 * 2 + 2)] * 2, seen.waits


@pytest.mark.parametrize(("grid", "robust"), [(False, ()), (True, (4.0,))])
@EACH
def test_refinement_beats_the_greedy_table_on_fresh_noise(
    student: Student, grid: bool, robust: tuple[float, ...]
) -> None:
    student, batch, fresh = replace(student, grid=grid), data(64), data(64, seed=9)
    start = student.encode(greedy(student, batch))
    theta = gauss_newton(student, start, [batch], rounds=4, robust=robust)
    assert rmse(student.sampler(theta), [fresh]) < rmse(student.sampler(start), [fresh])


def test_ranks_sum_to_one_run() -> None:
    student, whole = STUDENTS[2], data(16)
    halves = [whole.part(slice(8)), whole.part(slice(8, 16))]
    theta = student.encode(greedy(student, whole))
    one, two = (gauss_newton(student, theta, b, rounds=2) for b in ([whole], halves))
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def test_a_table_that_runs_away_is_not_taken() -> None:
    def fragile(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        return torch.where(x.abs() > 40, torch.nan, curved(x, sigma, cond))

    batch = replace(data(16), field=Field(fragile))
    theta = STUDENTS[0].encode(greedy(STUDENTS[0], data(16)))
    better = gauss_newton(STUDENTS[0], theta, [batch], rounds=2)
    assert bool(better.isfinite().all())


@pytest.mark.parametrize("student", [STUDENTS[0], STUDENTS[2]])
def test_a_wider_table_takes_the_same_steps(student: Student) -> None:
    one = replace(student, form=replace(student.form, points=1))
    table = fit(one, [data()], positions=9)
    ends = [last_state(student.holding(t), data()) for t in (table, widened(table, 2))]
    assert torch.allclose(ends[0], ends[1])
