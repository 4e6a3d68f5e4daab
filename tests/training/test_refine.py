"""Gauss-Newton on tables: a Jacobian that is one, ends that get nearer, and forms that invert."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from solvers.classic import IPNDM, Euler, Heun
from solvers.epd import Directions, evaluated
from solvers.field import Condition, Field
from solvers.integrate import Solver, Step
from training.distill import Batch, Plan, Table, last_state, table_rmse
from training.fit import HISTORY, FitOptions, fit
from training.grams import gram
from training.memo import Memo
from training.refine import RefineOptions, Student, gauss_newton, normal_products, steps_of
from training.table import (
    Form,
    FreeForm,
    MultistepForm,
    PublishedForm,
    grid_to_raw,
    raw_to_grid,
)

SIGMAS = (10.0, 3.0, 0.8, 0.1)
N, K = 3, 2


def curved(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) * 0.9


def data(count: int = 24, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64) * SIGMAS[0]
    fine = torch.tensor([SIGMAS[0], SIGMAS[-1]], dtype=torch.float64).log()
    sigmas = torch.linspace(fine[0], fine[1], 200, dtype=torch.float64).exp().tolist()
    *_, end = Plan((*SIGMAS[:1], *sigmas[1:]), base=Euler()).run(IPNDM(4), Field(curved), x)
    return Batch(Field(curved), x, (end,) * N)


FORMS: list[tuple[Plan, Form]] = [
    (Plan(SIGMAS, base=Euler(), afs=True), FreeForm(N, K)),
    (Plan(SIGMAS, base=Euler(), afs=True), FreeForm(N, K, history=4, afs=True)),
    (Plan(SIGMAS, base=IPNDM(2)), PublishedForm(N, K, 0.05, 0.2)),
    (Plan(SIGMAS), MultistepForm(N, K, HISTORY)),
]


def plain(points: int) -> Directions:
    one = torch.ones(N, points, dtype=torch.float64)
    return Directions(one / 2, one / points, one, one)


def greedy(plan: Plan, form: Form, batch: Batch) -> Table:
    reach = form.scale_dir if isinstance(form, PublishedForm) else None
    known = form.history if isinstance(form, FreeForm) else 0
    return fit(plan, [batch], FitOptions(K, 9, reach, known=known))


@pytest.mark.parametrize(("plan", "form"), FORMS)
def test_decoding_what_was_encoded_gives_the_same_steps(plan: Plan, form: Form) -> None:
    theta = form.encode(greedy(plan, form, data()))
    again = form.encode(form.decode(theta))
    assert torch.allclose(again, theta, atol=1e-3)
    ends = [last_state(plan, form.decode(t), data()) for t in (theta, again)]
    assert torch.allclose(ends[0], ends[1], rtol=1e-3)


def test_weights_of_any_sign_survive_the_free_form() -> None:
    mix = torch.tensor([[1.4, -0.4], [0.0, 1.0], [-0.2, -0.3]], dtype=torch.float64)
    size = mix.abs().sum(-1, keepdim=True)
    one = torch.ones_like(mix)
    table = Directions(one / 2, mix.abs() / size, one, torch.where(mix < 0, -size, size))
    form = FreeForm(N, K)
    found = form.decode(form.encode(table))
    assert torch.allclose(found.weight * found.dir_scale, mix)
    assert torch.allclose(found.weight.sum(-1), torch.ones(N, dtype=torch.float64))


def test_multistep_leaves_out_slopes_that_are_not_known_yet() -> None:
    known = MultistepForm(4, 1, HISTORY).known
    assert known.sum(1).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("form", "counts"),
    [
        (FreeForm(4, 1, history=HISTORY), [1, 3, 5, 5]),
        (FreeForm(4, 1, history=HISTORY, afs=True), [1, 2, 4, 5]),
        (FreeForm(3, 1, history=HISTORY, calls=2), [1, 4, 5]),
        (FreeForm(3, 2, history=2), [1, 2, 2]),
    ],
)
def test_epd_leaves_out_slopes_that_are_not_known_yet(form: FreeForm, counts: list[int]) -> None:
    assert form.known.sum(1).tolist() == counts


def test_a_table_without_known_slopes_has_zeros_for_them() -> None:
    form = FreeForm(N, K, history=2)
    assert torch.equal(form.decode(form.encode(plain(K))).known, torch.zeros(N, 2).double())


def test_the_published_form_refuses_known_slopes() -> None:
    table = replace(plain(K), known=torch.ones(N, 1))
    with pytest.raises(ValueError, match="known slopes need free weights"):
        PublishedForm(N, K).encode(table)


@pytest.mark.parametrize("base", [Euler(), Heun()], ids=repr)
@pytest.mark.parametrize("afs", [False, True])
def test_the_slopes_that_a_form_counts_are_those_that_a_step_knows(
    base: Solver, afs: bool
) -> None:
    plan, x = Plan(SIGMAS, base=base, afs=afs), data(2).x
    found: list[int] = []
    form = FreeForm(N, 1, history=HISTORY, calls=2 if base == Heun() else 1, afs=afs)
    solver = plan.solver(form.decode(form.encode(plain(1))), x)

    def watching(field: Field, step: Step) -> Tensor:
        found.append(len(evaluated(step)))
        return solver(field, step)

    list(plan.run(watching, Field(curved), x))
    assert found == form.known.sum(1).tolist()


def test_grids_survive_and_always_fall() -> None:
    raw = grid_to_raw(SIGMAS)
    assert raw_to_grid(raw, 10.0, 0.1) == pytest.approx(SIGMAS)
    wild = raw_to_grid(torch.tensor([500.0, -500.0, 0.0]), 10.0, 0.1)
    assert all(a > b for a, b in pairwise(wild))


@pytest.mark.parametrize(("plan", "form"), FORMS)
def test_difference_quotients_agree_with_the_gradient(plan: Plan, form: Form) -> None:
    batch = data(6)
    student = Student(plan, form)
    theta = student.encode(greedy(plan, form, batch))
    nudge = torch.full_like(theta, 1e-7)
    products = normal_products(student, theta, batch, nudge)
    moving = theta.clone().requires_grad_()
    loss = (last_state(*student.decode(moving), batch) - batch.targets[-1]).square().sum() / 2
    (slope,) = torch.autograd.grad(loss, moving)
    assert torch.allclose(
        -products[:-1, -1], slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item()
    )


def test_a_memo_asks_only_for_rows_that_changed() -> None:
    rows: list[int] = []

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        rows.append(len(x))
        return curved(x, sigma, cond)

    memo = Memo(counted)
    x, sigma = torch.randn(4, 3), torch.ones(4)
    cond = Condition({"y": torch.arange(4)})
    first = memo(x, sigma, cond)
    memo.again()
    other = x.clone()
    other[2] += 1
    assert torch.equal(memo(other, sigma, cond), curved(other, sigma, None))
    memo.again()
    assert torch.equal(memo(x, sigma, cond), first)
    assert rows == [4, 1]


def test_an_undamped_step_solves_a_linear_problem() -> None:
    a = torch.randn(9, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    target = (a[:, :, 0] @ best).reshape(9, 1, 1)
    step = steps_of(gram([a, target]))[0]
    assert torch.allclose(step, best, atol=1e-4)


@pytest.mark.parametrize(("grid", "robust"), [(False, ()), (True, (4.0,))])
@pytest.mark.parametrize(("plan", "form"), FORMS)
def test_refinement_beats_the_greedy_table_on_fresh_noise(
    plan: Plan, form: Form, grid: bool, robust: tuple[float, ...]
) -> None:
    student, batch, fresh = Student(plan, form, grid), data(64), data(64, seed=9)
    table = greedy(plan, form, batch)
    before = table_rmse(*student.decode(student.encode(table)), [fresh])
    theta = gauss_newton(
        student, student.encode(table), [batch], RefineOptions(rounds=4, robust=robust)
    )
    assert table_rmse(*student.decode(theta), [fresh]) < before


def test_refinement_never_worsens_what_it_is_judged_by() -> None:
    plan, form = FORMS[0]
    student, batch = Student(plan, form), data(2)
    judges = [data(32, seed=5)]
    theta = student.encode(greedy(plan, form, batch))
    before = table_rmse(*student.decode(theta), judges)
    better = gauss_newton(student, theta, [batch], RefineOptions(3), judges=judges)
    assert table_rmse(*student.decode(better), judges) <= before


def test_ranks_sum_to_one_run() -> None:
    plan, form = FORMS[3]
    student, whole = Student(plan, form), data(16)
    halves = [
        replace(whole, x=whole.x[s], targets=tuple(t[s] for t in whole.targets))
        for s in (slice(8), slice(8, 16))
    ]
    theta = student.encode(greedy(plan, form, whole))
    one, two = (gauss_newton(student, theta, b, RefineOptions(2)) for b in ([whole], halves))
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def test_a_table_that_runs_away_is_not_taken() -> None:
    plan, form = FORMS[0]

    def fragile(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        x0 = curved(x, sigma, cond)
        return torch.where(x.abs() > 40, torch.nan, x0)

    batch = replace(data(16), field=Field(fragile))
    student = Student(plan, form)
    theta = student.encode(greedy(plan, form, data(16)))
    found = gauss_newton(student, theta, [batch], RefineOptions(2))
    assert bool(found.isfinite().all())
