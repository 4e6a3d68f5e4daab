import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from solvers.sampler import Sampler
from src.runs import Stop
from tests.pretend_gpu import pretend_gpu
from tests.training.ppo.quadrature import quadrature, reward, task
from training.ppo.config import Ppo
from training.ppo.evaluate import by_prompt
from training.ppo.learners import Clipped
from training.ppo.policy import start_of
from training.ppo.rollout import (
    Scored,
    Scorer,
    Task,
    fixed_jobs,
    noise_seed,
    prompt_at,
    score_jobs,
    step_jobs,
)

NAMES = tuple("abcde")


def seeds(grouping: str) -> list[list[int]]:
    jobs, _ = step_jobs(NAMES, 1, 0, count=8, k=4, grouping=grouping)
    return [[job.seed for job in jobs[i : i + 4]] for i in (0, 4)]


def test_every_round_of_the_stream_has_every_prompt_once_in_another_order() -> None:
    rounds = [[prompt_at(NAMES, 7, 5 * i + j) for j in range(5)] for i in range(4)]
    assert all(sorted(map(str, names)) == list(NAMES) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert rounds != [[prompt_at(NAMES, 8, 5 * i + j) for j in range(5)] for i in range(4)]


def test_a_group_of_common_random_numbers_has_one_prompt_and_one_noise() -> None:
    first, second = seeds("crn")
    assert len(set(first)) == len(set(second)) == 1
    assert first != second
    for grouping in ("prompt", "mixed"):
        first, second = seeds(grouping)
        assert len({*first, *second}) == 8


def test_held_out_noise_is_fixed_and_apart_from_that_of_training() -> None:
    jobs = fixed_jobs(NAMES, 3, 8)
    assert jobs == fixed_jobs(NAMES, 3, 9)[:8]
    assert [job.prompt for job in jobs] == ["a", "b", "c", "d", "e", "a", "b", "c"]
    trained = {noise_seed(3, f"{position}") for position in range(100)}
    assert len({job.seed for job in jobs} - trained) == 8


def scored(of: Task, count: int, scorer: Scorer, sampler: Sampler | None = None) -> Scored:
    jobs = fixed_jobs(of.held_out, 0, count)
    return score_jobs(of, sampler or of.sampler, jobs, [by_prompt(scorer)], Stop())


def test_an_image_does_not_depend_on_the_size_of_the_batch() -> None:
    start = start_of(task().sampler, Ppo(), print)
    learner = Clipped(start, Ppo(), 0)
    sampler = start.sampler_of(learner.draw(0, [f"{i}" for i in range(7)]))
    results = [
        scored(replace(task(), batch=size), 7, reward, sampler).scores["mean"]
        for size in (1, 3, 7)
    ]
    assert len(set(results[0].tolist())) == 7
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


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


def test_an_image_that_holds_nan_has_no_score() -> None:
    def broken(latents: Tensor) -> Tensor:
        images = quadrature().decode(latents)
        images[1, 0, 0, 0] = math.nan
        return images

    sick = replace(task(), backend=replace(quadrature(), decode=broken), decode_batch=5)
    result = scored(sick, 5, reward)
    assert result.scores["near"].isfinite().tolist() == [True, False, True, True, True]
    assert "NaN" in result.reasons[0]


class Event:
    """A CUDA event that is over at once."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, _other: "Event") -> float:
        return 1.0


@pytest.mark.parametrize("batch", [4, 8])
def test_a_rollout_waits_for_the_gpu_once_a_batch(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    start = start_of(task().sampler, Ppo(train_scale_dir=True), print)
    draws = Clipped(start, Ppo(), 0).draw(0, [f"{i}" for i in range(8)])
    with pretend_gpu() as seen:
        on_gpu = replace(quadrature(), device=torch.device("cuda"), dtype=torch.float32)
        whole = replace(task(), backend=on_gpu, batch=batch)
        jobs = fixed_jobs(whole.held_out, 0, 8)
        score_jobs(whole, start.sampler_of(draws), jobs, [by_prompt(brightness)], Stop())
    assert sum(seen.waits.values()) == 8 // batch


def brightness(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"brightness": images.mean((1, 2, 3))}
