"""Forward-only fitting: closed forms, identities with what it must find, and what it may cost."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, IPNDM, Euler
from solvers.epd import Directions, Table
from solvers.field import Condition, Field
from solvers.process import FLOW
from tests.solvers.mixture import integrate
from training.fit import fit
from training.gram import Normal, best_free, best_shares
from training.student import Student, Trajectories, last_state, rmse
from training.table import FreeForm, MultistepForm

SIGMAS = (10.0, 3.0, 0.8, 0.1)


def curved(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    """A smooth denoiser that is not linear."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) * 0.9 + 0.05 * x / (1 + sigma**2)


def data(*shape: int, seed: int = 0, sigmas: tuple[float, ...] = SIGMAS) -> Trajectories:
    """Noise, and where a fine Heun-like solution takes it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * sigmas[0]
    logs = torch.tensor(sigmas, dtype=torch.float64).log()
    parts = [torch.linspace(a, b, 17)[:-1] for a, b in pairwise(logs.tolist())]
    fine = torch.cat([*parts, logs[-1:]]).exp()
    fine[0] = sigmas[0]
    states = tuple(integrate(DPM2(), Field(curved), x, fine))
    return Trajectories(Field(curved), x, states[15::16])


EPD_STUDENT = Student(SIGMAS, FreeForm(3, 2), Euler())
MULTISTEP = Student(SIGMAS, MultistepForm(3, 2))
BOTH = pytest.mark.parametrize("student", [EPD_STUDENT, MULTISTEP], ids=["epd", "multistep"])


def pairs(count: int) -> Tensor:
    return torch.tensor(list(combinations(range(count), 2)))


def with_points(student: Student, points: int) -> Student:
    return replace(student, form=replace(student.form, points=points))


def error(student: Student, table: Table, batch: Trajectories) -> float:
    return rmse(student.holding(table), [batch])


def test_free_choice_is_the_best_of_all_subsets() -> None:
    a = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = a.T @ a
    normal = Normal.of(products)
    mix = best_free(normal, pairs(6))
    errors = {}
    for pair in combinations(range(6), 2):
        left = a[:, -1:] - a[:, list(pair)] @ torch.linalg.lstsq(a[:, list(pair)], a[:, -1:])[0]
        errors[pair] = left.square().sum().item()
    assert mix.columns == min(errors, key=lambda pair: errors[pair])
    assert mix.error == pytest.approx(min(errors.values()), rel=1e-9)


def test_shares_are_on_the_simplex_and_beat_every_share_of_a_fine_grid() -> None:
    a = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    normal = Normal.of(a.T @ a)
    mix = best_shares(normal, pairs(4))
    assert mix.coefficients.sum().item() == pytest.approx(1)
    assert bool((mix.coefficients >= 0).all())
    for i, j in combinations(range(4), 2):
        for w in torch.linspace(0, 1, 101, dtype=torch.float64):
            left = a[:, 4] - w * a[:, i] - (1 - w) * a[:, j]
            assert mix.error <= left.square().sum().item() + 1e-9


def test_held_columns_leave_what_least_squares_leaves() -> None:
    a = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    normal = Normal.of(a.T @ a)
    rest = normal.without(torch.tensor([3, 4]), torch.tensor([0, 1]))
    both = normal.take(torch.tensor([0, 1, 3, 4]))
    assert torch.allclose(rest.solve(), both.solve()[:2], atol=1e-4)


def test_a_midpoint_student_is_found_from_its_own_states() -> None:
    r = torch.full((3, 1), 0.5, dtype=torch.float64)
    one = torch.ones_like(r)
    batch = data(64, 6)
    teacher = tuple(EPD_STUDENT.holding(Directions(r, one, one, one)).states(batch.field, batch.x))
    table = fit(with_points(EPD_STUDENT, 1), [replace(batch, targets=teacher)], positions=33)
    assert isinstance(table, Directions)
    assert torch.equal(table.r, r)
    assert torch.allclose(table.weight * table.dir_scale, one, atol=1e-3)


def test_adams_bashforth_is_found_by_a_multistep_fit() -> None:
    batch = data(64, 6)
    states = tuple(integrate(IPNDM(3), batch.field, batch.x, SIGMAS))
    table = fit(with_points(MULTISTEP, 1), [replace(batch, targets=states)], positions=9)
    left = rmse(MULTISTEP.holding(table), [replace(batch, targets=states)])
    assert left < 0.1 * (states[-1] - batch.targets[-1]).square().mean().sqrt().item()


@BOTH
def test_a_fit_beats_its_hand_made_base_on_fresh_noise(student: Student) -> None:
    table = fit(student, [data(96, 5)])
    fresh = data(96, 5, seed=1)
    sigmas = torch.tensor(SIGMAS)
    *_, euler = integrate(Euler(), fresh.field, fresh.x, sigmas)
    by_hand = (euler - fresh.targets[-1]).square().mean().sqrt().item()
    assert error(student, table, fresh) < by_hand / 3


@BOTH
def test_batches_and_ranks_change_nothing(student: Student) -> None:
    whole = data(48, 5)
    parts = [
        Trajectories(whole.field, whole.x[i : i + 12], tuple(t[i : i + 12] for t in whole.targets))
        for i in range(0, 48, 12)
    ]
    one, many = (fit(student, b, positions=9) for b in ([whole], parts))
    for a, b in zip(one.tensors(), many.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@BOTH
def test_no_graph_is_built_and_no_more_than_k_rows_are_asked_at_once(student: Student) -> None:
    rows: list[int] = []
    weight = torch.ones((), requires_grad=True)

    def network(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        rows.append(len(x))
        x0 = curved(x, sigma, cond) * weight
        assert not x0.requires_grad
        return x0

    fit(with_points(student, 3), [replace(data(8, 3), field=Field(network))], positions=10)
    assert max(rows) == 8 * 3


def test_time_scales_are_chosen_among_those_given() -> None:
    def told_wrong(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        return curved(x, sigma / 1.1, cond)

    right = data(64, 6)
    batch = replace(right, field=Field(told_wrong))
    plain = fit(EPD_STUDENT, [batch])
    scaled = fit(EPD_STUDENT, [batch], time_scales=(0.9, 1.0, 1.1))
    assert set(scaled.time_scale.flatten().tolist()) <= {0.9, 1.0, 1.1}
    assert error(EPD_STUDENT, scaled, batch) < error(EPD_STUDENT, plain, batch)


def test_bounded_scales_keep_weights_on_the_simplex() -> None:
    table = fit(EPD_STUDENT, [data(64, 6)], scale_dir=0.05)
    assert isinstance(table, Directions)
    assert torch.allclose(table.weight.sum(1), torch.ones(3, dtype=torch.float64))
    assert bool((table.weight >= 0).all())
    assert bool(((table.dir_scale - 1).abs() <= 0.05 + 1e-9).all())


@pytest.mark.parametrize("shape", [(16, 12), (16, 2, 7), (8, 1, 2, 3, 3)])
@pytest.mark.parametrize("student", [EPD_STUDENT, MULTISTEP, replace(MULTISTEP, process=FLOW)])
def test_latents_may_have_any_shape(student: Student, shape: tuple[int, ...]) -> None:
    sigmas = (1.0, 0.6, 0.3, 0.05)
    batch = data(*shape, sigmas=sigmas)
    student = replace(student, sigmas=sigmas)
    table = fit(student, [batch], positions=7)
    assert last_state(student.holding(table), batch).shape == shape


def test_a_multistep_may_take_its_first_step_without_a_call() -> None:
    student = replace(MULTISTEP, afs=True, form=MultistepForm(3, 2, afs=True))
    table = fit(student, [data(96, 5)])
    assert (student.holding(table).calls, student.holding(table).rows) == (2, 4)
    again = student.form.decode(student.form.encode(table))
    ends = [last_state(student.holding(t), data(4, 5)) for t in (table, again)]
    assert torch.allclose(ends[0], ends[1], rtol=1e-2)
    *_, euler = integrate(Euler(), Field(curved), data(96, 5).x, torch.tensor(SIGMAS))
    by_hand = (euler - data(96, 5).targets[-1]).square().mean().sqrt().item()
    assert error(student, table, data(96, 5)) < by_hand
