"""Signals: a run stops at once, whole, and on all ranks together."""

import dataclasses
import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backends.load import load_backend
from tests.test_train_distill import mixture
from training.company import Company
from training.gradient_job import GradientJob, first_guess
from training.settings import Config, resolved
from training.stop import Stop, Stopped
from training.task import Surroundings, make_task


def job(tmp_path: Path, poll: Callable[[], object]) -> GradientJob:
    config = Config(method="gradient", batch=8, total_kimg=0.032, tick=0.032, validation=8)
    config = resolved(dataclasses.replace(config, fine_steps=9), is_flow=False)
    backend = load_backend(str(mixture(tmp_path, "ve")))
    task = make_task(config, Surroundings(backend, poll=poll))
    return GradientJob(task, Company(), first_guess(task))


@pytest.mark.parametrize("calls", [1, 26, 30, 31, 32, 33, 60, 125])
def test_a_batch_that_is_interrupted_is_learned_from_again(tmp_path: Path, calls: int) -> None:
    """A signal before any call of the network, of the teacher or in an update, costs nothing."""
    whole = job(tmp_path, lambda: None)
    whole.tick(0)
    stop, polls = Stop(), itertools.count()

    def poll() -> None:
        if next(polls) == calls:
            stop.signal = signal.SIGTERM
        stop.poll()

    cut, after = job(tmp_path, poll), job(tmp_path, lambda: None)
    with pytest.raises(Stopped):
        cut.tick(0)
    assert cut.learner.seen % 8 == 0
    after.load(cut.state())
    after.tick(0)
    assert torch.equal(after.learner.theta, whole.learner.theta)
    assert torch.equal(after.learner.best, whole.learner.best)
