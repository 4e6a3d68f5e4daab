"""Gauss-Newton on tables: a Jacobian that is one, ends that get nearer, and forms that invert."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.epd import Directions, MultistepTable, Table
from solvers.field import Condition, Field
from tests.pretend_gpu import pretend_gpu
from tests.training.students import FREE, MULTISTEP, PUBLISHED, SIGMAS, curved, data, with_points
from training.fit import fit
from training.refine import ends, gauss_newton, normal_products
from training.student import Student, Trajectories, last_state, rmse
from training.table import (
    HISTORY,
    EPDForm,
    MultistepForm,
    TimeScales,
    even_table,
    grid_to_raw,
    raw_to_grid,
    widened,
)

EACH = pytest.mark.parametrize(
    "student", [FREE, PUBLISHED, MULTISTEP], ids=["free", "published", "multistep"]
)


def greedy(student: Student, batch: Trajectories) -> Table:
    reach = student.form.scale_dir if isinstance(student.form, EPDForm) else None
    return fit(student, [batch], positions=9, scale_dir=reach)


def test_weights_of_any_sign_and_grids_survive_and_grids_always_fall() -> None:
    mix = torch.tensor([[1.4, -0.4], [0.0, 1.0], [-0.2, -0.3]], dtype=torch.float64)
    size = mix.abs().sum(-1, keepdim=True)
    one = torch.ones_like(mix)
    table = Directions(one / 2, mix.abs() / size, one, torch.where(mix < 0, -size, size))
    form = EPDForm(3, 2)
    again = form.decode(form.encode(table))
    assert torch.allclose(again.weight * again.dir_scale, mix)
    assert torch.allclose(again.weight.sum(-1), torch.ones(3, dtype=torch.float64))
    assert raw_to_grid(grid_to_raw(SIGMAS), 10.0, 0.1) == pytest.approx(SIGMAS)
    wild = raw_to_grid(torch.tensor([500.0, -500.0, 0.0]), 10.0, 0.1)
    assert all(a > b for a, b in pairwise(wild))


@EACH
def test_a_vector_gives_the_steps_it_was_made_of_and_its_quotients_are_the_gradient(
    student: Student,
) -> None:
    batch = data(6, 5)
    theta = student.encode(greedy(student, batch))
    again = student.encode(student.decode(theta)[0])
    assert torch.allclose(again, theta, atol=1e-3)
    both = [last_state(student.sampler(t), batch) for t in (theta, again)]
    assert torch.allclose(both[0], both[1], rtol=1e-3)
    products = normal_products(student, theta, batch, torch.full_like(theta, 1e-7))
    moving = theta.clone().requires_grad_()
    loss = (last_state(student.sampler(moving), batch) - batch.targets[-1]).square().sum() / 2
    (slope,) = torch.autograd.grad(loss, moving)
    floor = 1e-5 * slope.abs().max().item()
    assert torch.allclose(-products[:-1, -1], slope, rtol=1e-3, atol=floor)


@EACH
def test_ends_are_those_of_whole_trajectories_by_the_rows_that_change_alone(
    student: Student,
) -> None:
    rows: list[int] = []

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        rows.append(len(x))
        return curved(x, sigma, cond)

    student, batch = replace(student, grid=True), replace(data(4, 5), field=Field(counted))
    theta = student.encode(greedy(student, data(24, 5)))
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
            whole = data(24, 5)
            x, end = (t.float().to("cuda") for t in (whole.x, whole.targets[-1]))
            batches = [Trajectories(Field(curved), x, (end,) * 3)] * count
            table = fit(FREE, batches, positions=5)
            fitted = sum(seen.waits.values())
            gauss_newton(FREE, FREE.encode(table), batches, rounds=2)
        assert sum(seen.uploads.values()) < 40 * count
        waits.append((fitted, sum(seen.waits.values()) - fitted))
    assert waits == [(3, 1 + 2 * 2 + 2)] * 2, seen.waits


@pytest.mark.parametrize(("grid", "robust"), [(False, ()), (True, (4.0,))])
@EACH
def test_refinement_beats_the_greedy_table_on_fresh_noise(
    student: Student, grid: bool, robust: tuple[float, ...]
) -> None:
    student, batch, fresh = replace(student, grid=grid), data(64, 5), data(64, 5, seed=9)
    start = student.encode(greedy(student, batch))
    theta = gauss_newton(student, start, [batch], rounds=4, robust=robust)
    assert rmse(student.sampler(theta), [fresh]) < rmse(student.sampler(start), [fresh])


def test_batches_and_ranks_sum_to_one_run_and_a_table_that_runs_away_is_not_taken() -> None:
    whole = data(16, 5)
    theta = MULTISTEP.encode(greedy(MULTISTEP, whole))
    one, two = (gauss_newton(MULTISTEP, theta, b, rounds=2) for b in ([whole], [*whole.parts(8)]))
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)

    def fragile(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        return torch.where(x.abs() > 40, torch.nan, curved(x, sigma, cond))

    fragile_batch = replace(whole, field=Field(fragile))
    better = gauss_newton(MULTISTEP, theta, [fragile_batch], rounds=2)
    assert bool(better.isfinite().all())


@pytest.mark.parametrize("student", [FREE, MULTISTEP])
def test_a_wider_table_takes_the_same_steps(student: Student) -> None:
    table = fit(with_points(student, 1), [data(24, 5)], positions=9)
    if isinstance(table, MultistepTable):  # as files of few calls are
        table = replace(table, a=table.a[:, :3], b=table.b[:, :3])
    both = [last_state(student.holding(t), data(24, 5)) for t in (table, widened(table, 2))]
    assert torch.allclose(both[0], both[1])


@pytest.mark.parametrize("form", [EPDForm, MultistepForm])
@pytest.mark.parametrize(
    ("time", "reach"), [(TimeScales(0.1), [0.1] * 3), (TimeScales(0, 0.25), [0.25, 0, 0.25])]
)
def test_time_scales_stay_within_their_reach(form: Any, time: TimeScales, reach: list) -> None:
    here = form(3, 2, time=time)
    far = here.decode(
        torch.full_like(here.encode(even_table(3, 2, HISTORY * (form is MultistepForm))), 1e3)
    )
    assert torch.allclose(far.time_scale - 1, torch.tensor(reach).double()[:, None])
