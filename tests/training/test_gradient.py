"""Adam on a table: what it learns, and what must not change that."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from src.runs import read_sealed, write_sealed
from tests.training.students import PUBLISHED, data, with_points
from training.gradient import GradientLearner, checkpointed
from training.settings import OBJECTIVES
from training.student import Student, Trajectories, rmse


def learner(
    objective: str = "per-step", lr: float = 0.2, student: Student = PUBLISHED
) -> GradientLearner:
    theta = student.encode(student.even_table())
    return GradientLearner(student, 400, theta, lr, objective=objective)


def batch(seed: int = 0) -> Trajectories:
    return data(8, 5, seed=seed)


def poisoned() -> Trajectories:
    return dataclasses.replace(batch(), targets=tuple(t * math.nan for t in batch().targets))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_lowers_the_error_on_other_seeds_in_parts_and_past_nan(
    objective: str,
) -> None:
    adam, parts, first = learner(objective), learner(objective), learner(objective).theta.detach()
    for i in range(50):
        loss = adam.learn([batch(i)], 8)
        if i < 3:
            assert parts.learn(list(batch(i).parts(4)), 8) == pytest.approx(loss, rel=1e-5)
        if i == 2:
            assert torch.allclose(adam.theta, parts.theta, atol=1e-4)
            before = adam.state()
            assert math.isnan(adam.learn([poisoned()], 8))
            assert torch.equal(adam.theta, before["theta"])
            assert (adam.skipped, adam.updates) == (1, before["updates"])
    fresh = [data(64, 5, seed=99)]
    ends = (rmse(PUBLISHED.sampler(theta), fresh) for theta in (adam.theta.detach(), first))
    assert next(ends) < 0.6 * next(ends)


def test_a_resumed_learner_is_the_same_to_the_bit_and_so_is_a_checkpointed_gradient(
    tmp_path: Path,
) -> None:
    through, before, after = learner(), learner(), learner()
    for adam in (through, before):
        for i in range(3):
            adam.learn([batch(i)], 8)
        adam.judge([batch(99)])
    write_sealed(tmp_path / "c.pt", before.state())
    after.load(read_sealed(tmp_path / "c.pt"))
    through.learn([batch(100)], 8)
    after.learn([checkpointed(batch(100))], 8)
    for name in ("theta", "ema", "best"):
        assert torch.equal(getattr(through, name), getattr(after, name))
    assert (through.seen, through.error) == (after.seen, after.error)
    older = {name: value for name, value in before.state().items() if name != "chosen_by"}
    after.load(older)  # chosen by other samples: judged anew, and kept where it is the best
    assert after.error == math.inf
    assert torch.equal(after.best, before.best)
    with pytest.raises(ValueError, match="18 numbers, this run 24"):
        learner().load(
            learner(student=with_points(PUBLISHED, 1)).state() | {"theta": torch.ones(18)}
        )


def test_too_many_skipped_updates_stop_the_run_in_one_line() -> None:
    adam = learner()
    for _ in range(10):
        adam.learn([poisoned()], 8)
    with pytest.raises(ValueError, match=r"^[^\n]*not finite: lower --lr 0\.2[^\n]*$"):
        adam.learn([poisoned()], 8)


def test_the_best_on_validation_is_kept_the_start_among_them() -> None:
    adam, judges = learner(lr=30.0), [data(32, 5, seed=99)]
    adam.judge(judges)
    at_first = adam.error
    for i in range(5):
        adam.learn([batch(i)], 8)
        adam.judge(judges)
    assert adam.error <= at_first
    assert rmse(PUBLISHED.sampler(adam.best), judges) == adam.error
    harmed = learner()
    for numbers in (harmed.theta.data, harmed.ema):
        numbers.fill_(5.0)
    harmed.judge(judges)
    assert torch.equal(harmed.best, learner().best)
