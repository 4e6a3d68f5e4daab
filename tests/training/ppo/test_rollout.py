import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.sampler import Sampler
from src.runs import Stop
from tests.pretend_gpu import pretend_gpu
from tests.training.ppo.quadrature import decode, quadrature, reward, task
from training.ppo.config import Ppo
from training.ppo.learners import Clipped
from training.ppo.policy import start_of
from training.ppo.rollout import (
    Scored,
    Scorer,
    Task,
    by_prompt,
    fixed_jobs,
    noise_seed,
    prompt_at,
    score_jobs,
    step_jobs,
)

NAMES = tuple("abcde")


def drawn(count: int) -> Sampler:
    """A table for each of some images."""
    start = start_of(task().sampler, Ppo(train_scale_dir=True), print)
    learner = Clipped(start, Ppo(), 0)
    return start.sampler_of(learner.draw(0, [f"{i}" for i in range(count)]))


def scored(of: Task, count: int, scorer: Scorer, sampler: Sampler | None = None) -> Scored:
    jobs = fixed_jobs(of.held_out, 0, count)
    return score_jobs(of, sampler or of.sampler, jobs, [by_prompt(scorer)], Stop())


def test_prompts_come_in_rounds_groups_share_noise_and_held_out_noise_is_apart() -> None:
    rounds = [[prompt_at(NAMES, 7, 5 * i + j) for j in range(5)] for i in range(4)]
    assert all(sorted(map(str, names)) == list(NAMES) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert rounds != [[prompt_at(NAMES, 8, 5 * i + j) for j in range(5)] for i in range(4)]
    for grouping, distinct in (("crn", 2), ("prompt", 8), ("mixed", 8)):
        jobs, streams = step_jobs(NAMES, 1, 0, count=8, k=4, grouping=grouping)
        assert len({job.seed for job in jobs}) == distinct
        assert [len({job.prompt for job in jobs[i : i + 4]}) for i in (0, 4)] == [1, 1]
        assert len(set(streams)) == 8
    jobs = fixed_jobs(NAMES, 3, 8)
    assert jobs == fixed_jobs(NAMES, 3, 9)[:8]
    assert [job.prompt for job in jobs] == ["a", "b", "c", "d", "e", "a", "b", "c"]
    trained = {noise_seed(3, f"{position}") for position in range(100)}
    assert len({job.seed for job in jobs} - trained) == 8


def picky(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """A reward that has no number for the prompt "hh", and raises for "hhh"."""
    if "hhh" in prompts:
        raise ValueError("hhh cannot be scored")
    scores = [math.nan if p == "hh" else float(len(p)) for p in prompts]
    return {"picky": images.new_tensor(scores)}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_image_without_a_score_is_told_and_does_not_cost_the_others_theirs(batch: int) -> None:
    result = scored(replace(task(), batch=batch), 5, picky)
    assert result.scores["picky"].tolist()[::3] == [1.0, 4.0]
    assert result.scores["picky"].isfinite().tolist() == [True, False, False, True, True]
    assert sorted(result.reasons) == ["hhh cannot be scored", "picky gave nan"]


def test_an_image_is_that_of_any_batch_and_has_no_score_where_it_holds_nan() -> None:
    means = [
        scored(replace(task(), batch=size), 7, reward, drawn(7)).scores["mean"]
        for size in (1, 3, 7)
    ]
    assert len(set(means[0].tolist())) == 7
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])

    def broken(latents: Tensor) -> Tensor:
        images = decode(latents)
        images[1, 0, 0, 0] = math.nan
        return images

    sick = replace(task(), backend=replace(quadrature(), decode=broken), decode_batch=5)
    result = scored(sick, 5, reward)
    assert result.scores["near"].isfinite().tolist() == [True, False, True, True, True]
    assert "NaN" in result.reasons[0]


@pytest.mark.parametrize("batch", [4, 8])
def test_a_rollout_waits_for_the_gpu_once(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """A CUDA event that is over at once."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, _other: Any) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    sampler = drawn(8)
    with pretend_gpu() as seen:
        on_gpu = replace(quadrature(), device=torch.device("cuda"), dtype=torch.float32)
        whole = replace(task(), backend=on_gpu, batch=batch)
        scored(whole, 8, lambda images, _: {"brightness": images.mean((1, 2, 3))}, sampler)
    assert sum(seen.waits.values()) == 1
