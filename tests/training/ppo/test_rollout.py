import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.epd import MultistepTable, ParallelMultistep
from solvers.sampler import Sampler
from src.runs import Stop, Stopped
from tests.pretend_gpu import pretend_gpu
from tests.training.ppo.quadrature import EVERY, SHORT, decode, quadrature, reward, task
from training.ppo.config import Ppo
from training.ppo.learners import Clipped
from training.ppo.policy import start_of
from training.ppo.rollout import (
    Scored,
    Scorer,
    Task,
    by_prompt,
    fixed_jobs,
    measured_unit,
    noise_seed,
    prompt_at,
    score_jobs,
    step_jobs,
)
from training.ppo.trainer import train

NAMES = tuple("abcde")


def drawn(count: int) -> Sampler:
    """A table for each of some images."""
    start = start_of(task().sampler, Ppo(train_scale_dir=True), print)
    learner = Clipped(start, Ppo(), 0)
    return start.sampler_of(learner.draw(0, [f"{i}" for i in range(count)]))


def scored(of: Task, count: int, scorer: Scorer, sampler: Sampler | None = None) -> Scored:
    jobs = fixed_jobs(of.held_out, 0, count)
    scorings = {"all": by_prompt(scorer)}
    return score_jobs(of, sampler or of.sampler, jobs, scorings, Stop())


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
    why = [("all", "hhh cannot be scored"), ("picky", "picky gave nan")]
    assert sorted(result.reasons) == why


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
    assert "NaN" in result.reason("near")


def multistep(*r: float) -> Sampler:
    """A table of one call for each of these places, one point each."""
    places = torch.tensor(r, dtype=torch.float64)[:, None]
    one = torch.ones_like(places)
    levels = tuple(torch.logspace(0, -1, len(r) + 1).tolist())
    return Sampler(ParallelMultistep(MultistepTable(one, places, one, one * 0, one)), levels)


def test_what_a_number_does_is_measured_undecoded_told_and_stopped_by_a_signal(
    tmp_path: Path,
) -> None:
    def decode(_latents: Tensor) -> Tensor:
        raise AssertionError("decoded")

    of = replace(task(), sampler=multistep(0.3, 0.6), backend=replace(quadrature(), decode=decode))
    start, stop, heard = start_of(of.sampler, Ppo(), print), Stop(), []
    measured_unit(of, start, 0.03, stop, heard.append)
    assert heard == ["sampling 36 times, undecoded, to see what each of 8 free numbers does"]
    stop.hear(15, None)
    with pytest.raises(Stopped):
        train(of, SHORT, EVERY, tmp_path, stop=stop, say=heard.append)
    assert heard[1:] == [heard[0], "stopped before there was anything to go on from: start anew"]


def test_a_point_at_the_end_of_its_interval_is_measured_by_a_step_back() -> None:
    """Which is between the same two places as a step on from there."""
    ppo = Ppo(train_weights=False)
    back, on, off = (
        measured_unit(of, start_of(of.sampler, ppo, print), 0.03, Stop(), print)[1]
        for of in (replace(task(), sampler=multistep(0.5, r)) for r in (1.0, 0.99, 0.992))
    )
    assert 0 < back.item() == pytest.approx(on.item(), rel=1e-6)
    assert off.item() == pytest.approx(on.item(), rel=0.05)


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
