"""Forward-only fitting: closed forms, identities with what it must find, and what it may cost."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from solvers.classic import IPNDM, Euler
from solvers.epd import Directions, Table
from solvers.field import Condition, Field
from tests.solvers.gauss import integrate
from tests.training.students import FREE, MULTISTEP, SIGMAS, curved, data, with_points
from training.fit import fit
from training.gram import Normal, best_free, best_shares
from training.student import Student, Trajectories, last_state, rmse
from training.table import MultistepForm

BOTH = pytest.mark.parametrize("student", [FREE, MULTISTEP], ids=["epd", "multistep"])


def error(student: Student, table: Table, batch: Trajectories) -> float:
    return rmse(student.holding(table), [batch])


def by_euler(batch: Trajectories) -> float:
    *_, euler = integrate(Euler(), batch.field, batch.x, torch.tensor(SIGMAS))
    return (euler - batch.targets[-1]).square().mean().sqrt().item()


def test_a_choice_is_the_best_of_all_subsets_and_shares() -> None:
    a = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normal, pairs = Normal.of(a.T @ a), list(combinations(range(6), 2))
    free = best_free(normal, torch.tensor(pairs))
    errors = {}
    for pair in pairs:
        left = a[:, -1:] - a[:, list(pair)] @ torch.linalg.lstsq(a[:, list(pair)], a[:, -1:])[0]
        errors[pair] = left.square().sum().item()
    assert free.columns == min(errors, key=lambda pair: errors[pair])
    assert free.error == pytest.approx(min(errors.values()), rel=1e-9)
    shares = best_shares(normal, torch.tensor(pairs))
    assert shares.coefficients.sum().item() == pytest.approx(1)
    assert bool((shares.coefficients >= 0).all())
    for i, j in pairs:
        for w in torch.linspace(0, 1, 101, dtype=torch.float64):
            left = a[:, -1] - w * a[:, i] - (1 - w) * a[:, j]
            assert shares.error <= left.square().sum().item() + 1e-9
    rest = normal.without(torch.tensor([3, 4]), torch.tensor([0, 1]))
    both = normal.take(torch.tensor([0, 1, 3, 4]))
    assert torch.allclose(rest.solve(), both.solve()[:2], atol=1e-4)


def test_a_midpoint_student_is_found_from_its_own_states() -> None:
    r = torch.full((3, 1), 0.5, dtype=torch.float64)
    one = torch.ones_like(r)
    batch = data(64, 6)
    teacher = tuple(FREE.holding(Directions(r, one, one, one)).states(batch.field, batch.x))
    table = fit(with_points(FREE, 1), [replace(batch, targets=teacher)], positions=33)
    assert isinstance(table, Directions)
    assert torch.equal(table.r, r)
    assert torch.allclose(table.weight * table.dir_scale, one, atol=1e-3)


def test_adams_bashforth_is_found_by_a_multistep_fit() -> None:
    batch = data(64, 6)
    trajectory = tuple(integrate(IPNDM(3), batch.field, batch.x, SIGMAS))
    table = fit(with_points(MULTISTEP, 1), [replace(batch, targets=trajectory)], positions=9)
    left = error(MULTISTEP, table, replace(batch, targets=trajectory))
    assert left < 0.1 * (trajectory[-1] - batch.targets[-1]).square().mean().sqrt().item()


@BOTH
def test_a_fit_beats_its_base_by_k_rows_at_once_without_a_graph_however_it_is_batched(
    student: Student,
) -> None:
    rows: list[int] = []
    weight = torch.ones((), requires_grad=True)

    def network(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        rows.append(len(x))
        x0 = curved(x, sigma, cond) * weight
        assert not x0.requires_grad
        return x0

    whole, fresh = replace(data(96, 5), field=Field(network)), data(96, 5, seed=1)
    one = fit(student, [whole], positions=9)
    assert max(rows) == 96 * 2
    assert error(student, one, fresh) < by_euler(fresh) / 3
    many = fit(student, list(whole.parts(12)), positions=9)
    for a, b in zip(one.tensors(), many.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_scales_are_among_those_given_and_within_their_reach() -> None:
    def misled(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        return curved(x, sigma / 1.1, cond)

    batch = replace(data(64, 6), field=Field(misled))
    plain, wide = fit(FREE, [batch]), (0.9, 1.0, 1.1)
    scaled = fit(FREE, [batch], time_scales=wide)
    assert set(scaled.time_scale.flatten().tolist()) <= set(wide)
    assert error(FREE, scaled, batch) < error(FREE, plain, batch)
    ends = fit(FREE, [batch], time_at_ends=wide).time_scale
    assert torch.equal(ends[1], torch.ones(2).double())
    assert bool((ends[[0, 2]] != 1).any())
    near = fit(FREE, [data(64, 6)], scale_dir=0.05)
    assert isinstance(near, Directions)
    assert torch.allclose(near.weight.sum(1), torch.ones(3, dtype=torch.float64))
    assert bool((near.weight >= 0).all())
    assert bool(((near.dir_scale - 1).abs() <= 0.05 + 1e-9).all())


def test_a_multistep_may_take_its_first_step_without_a_call() -> None:
    student = replace(MULTISTEP, afs=True, form=MultistepForm(3, 2, afs=True))
    table = fit(student, [data(96, 5)])
    assert (student.holding(table).calls, student.holding(table).rows) == (2, 4)
    again = student.form.decode(student.form.encode(table))
    ends = [last_state(student.holding(t), data(4, 5)) for t in (table, again)]
    assert torch.allclose(ends[0], ends[1], rtol=1e-2)
    assert error(student, table, data(96, 5)) < by_euler(data(96, 5))
