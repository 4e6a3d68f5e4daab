import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends.generate import Job
from solvers.sampler import Sampler
from src.runs import Stop, Stopped
from src.seeds import generator
from tests.pretend_gpu import pretend_gpu
from tests.training.ppo.quadrature import quadrature, reward, task
from training.ppo.config import Ppo
from training.ppo.evaluate import by_prompt
from training.ppo.learners import make_learner
from training.ppo.policy import start_of
from training.ppo.rollout import (
    Clock,
    Scored,
    Scorer,
    Task,
    fixed_jobs,
    noise_seed,
    prompt_at,
    score_jobs,
    step_jobs,
    timed,
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


def test_steps_take_the_stream_up_where_the_last_one_left_it() -> None:
    steps = [step_jobs(NAMES, 2, step, count=4, k=2, grouping="crn") for step in range(5)]
    prompts = [job.prompt for jobs, _ in steps for job in jobs[::2]]
    assert prompts == [prompt_at(NAMES, 2, i) for i in range(10)]
    assert len({stream for _, streams in steps for stream in streams}) == 20


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
    learner = make_learner(start, Ppo(), 0)
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


def test_where_nothing_can_be_scored_the_reason_is_told() -> None:
    with pytest.raises(ValueError, match="no image could be scored: hhh cannot be scored"):
        scored(replace(task(), held_out=("hhh", "hhh")), 3, picky)


def test_scores_may_be_rows_such_as_features() -> None:
    def rows(images: Tensor, _jobs: Sequence[Job]) -> dict[str, Tensor]:
        return {"features": images.flatten(1)[:, :2]}

    jobs = fixed_jobs(task().held_out, 0, 7)
    result = score_jobs(task(), task().sampler, jobs, [rows], Stop())
    assert result.scores["features"].shape == (7, 2)


def test_latents_are_decoded_so_many_at_a_time() -> None:
    seen: list[int] = []

    def watched(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return quadrature().decode(latents)

    backend = timed(replace(quadrature(), decode=watched), Clock(torch.device("cpu")), 2)
    latents = torch.randn(5, 3, 2, 2, generator=generator(0))
    assert torch.equal(backend.decode(latents), quadrature().decode(latents))
    assert seen == [2, 2, 1]


def test_time_is_counted_once() -> None:
    clock = Clock(torch.device("cpu"))
    ticks = iter([0.0, 1.0, 3.0, 10.0])
    clock.now = lambda: next(ticks)  # type: ignore[method-assign]
    with clock.on("denoise"), clock.on("decode"):
        pass
    assert (clock.seconds()["decode"], clock.seconds()["denoise"]) == (2.0, 8.0)


def test_a_signal_stops_a_rollout_between_batches() -> None:
    jobs = fixed_jobs(task().held_out, 0, 5)
    with pytest.raises(Stopped):
        score_jobs(task(), task().sampler, jobs, [by_prompt(reward)], Stop(15))


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
    draws = make_learner(start, Ppo(), 0).draw(0, [f"{i}" for i in range(8)])
    with pretend_gpu() as seen:
        on_gpu = replace(quadrature(), device=torch.device("cuda"), dtype=torch.float32)
        whole = replace(task(), backend=on_gpu, batch=batch)
        jobs = fixed_jobs(whole.held_out, 0, 8)
        score_jobs(whole, start.sampler_of(draws), jobs, [by_prompt(brightness)], Stop())
    assert sum(seen.waits.values()) == 8 // batch


def brightness(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"brightness": images.mean((1, 2, 3))}
