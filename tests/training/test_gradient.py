"""Adam on a table: what it learns, and what must not change that."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from src.runs import read_sealed, write_sealed
from tests.training.students import batch, start, student
from training.gradient import GradientLearner, checkpointed
from training.settings import OBJECTIVES
from training.student import Trajectories, rmse


def learner(objective: str = "per-step", lr: float = 0.2, total: int = 400) -> GradientLearner:
    return GradientLearner(student(), total, start(), lr, objective=objective)


def error(theta: Tensor) -> float:
    return rmse(student().sampler(theta), [batch(5000, 64)])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_lowers_the_error_on_other_seeds(objective: str) -> None:
    adam = learner(objective)
    for i in range(50):
        adam.learn([batch(8 * i)], 8)
    assert error(adam.theta.detach()) < 0.6 * error(start())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_in_two_parts_teaches_the_same(objective: str) -> None:
    whole, parts = learner(objective), learner(objective)
    for i in range(3):
        data = batch(8 * i)
        loss = whole.learn([data], 8)
        assert parts.learn([data.part(slice(4)), data.part(slice(4, 8))], 8) == pytest.approx(
            loss, rel=1e-5
        )
    assert torch.allclose(whole.theta, parts.theta, atol=1e-4)


def test_checkpointing_changes_no_gradient() -> None:
    plain, again = learner("end-to-end"), learner("end-to-end")
    assert plain.learn([batch()], 8) == again.learn([checkpointed(batch())], 8)
    assert torch.equal(plain.theta, again.theta)


def test_a_resumed_learner_is_the_same_to_the_bit(tmp_path: object) -> None:
    through, before = learner(), learner()
    for adam in (through, before):
        for i in range(3):
            adam.learn([batch(8 * i)], 8)
        adam.judge([batch(5000)])
    write_sealed(f"{tmp_path}/c.pt", before.state())
    after = learner()
    after.load(read_sealed(f"{tmp_path}/c.pt"))
    for adam in (through, after):
        adam.learn([batch(100)], 8)
    assert torch.equal(through.theta, after.theta)
    assert torch.equal(through.ema, after.ema)
    assert (through.best - after.best).abs().max() == 0
    assert (through.seen, through.error) == (after.seen, after.error)


def test_a_checkpoint_of_another_table_is_refused() -> None:
    other = GradientLearner(student(2), 8, start(2))
    with pytest.raises(ValueError, match="16 numbers, this run 24"):
        learner().load(other.state())


def poisoned() -> Trajectories:
    data = batch()
    return dataclasses.replace(data, targets=tuple(t * math.nan for t in data.targets))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(objective: str) -> None:
    adam = learner(objective)
    adam.learn([batch()], 8)
    before = adam.state()
    assert math.isnan(adam.learn([poisoned()], 8))
    assert torch.equal(adam.theta, before["theta"])
    assert (adam.skipped, adam.updates) == (1, before["updates"])
    assert math.isfinite(adam.learn([batch(8)], 8))


def test_too_many_skipped_updates_stop_the_run_in_one_line() -> None:
    adam = learner()
    for _ in range(10):
        adam.learn([poisoned()], 8)
    with pytest.raises(ValueError, match=r"not finite: lower --lr 0\.2") as caught:
        adam.learn([poisoned()], 8)
    assert adam.skipped == 11
    assert "\n" not in str(caught.value)


def test_the_best_on_validation_is_kept() -> None:
    adam = learner(lr=30.0)
    judges = [batch(5000, 32)]
    adam.judge(judges)
    at_first = adam.error
    for i in range(5):
        adam.learn([batch(8 * i)], 8)
        adam.judge(judges)
    assert adam.error <= at_first
    assert rmse(student().sampler(adam.best), judges) == adam.error


def test_what_was_given_stands_for_election_too() -> None:
    """As after a fit: a first tick that only does harm changes nothing."""
    adam, judges = learner(), [batch(5000, 32)]
    for numbers in (adam.theta.data, adam.ema):
        numbers.fill_(5.0)
    adam.judge(judges)
    assert torch.equal(adam.best, start())
