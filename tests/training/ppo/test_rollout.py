import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from src.seeds import generator
from tests.training.ppo.quadrature import quadrature, reward, task
from training.ppo.policy import Policy, PolicyOptions, stacked, start_of
from training.ppo.prompts import fixed_jobs
from training.ppo.rollout import Clock, in_order, score_jobs, timed
from training.stop import Stop, Stopped


def drawn() -> Policy:
    return Policy(start_of(task().method.table, print), PolicyOptions())


def test_an_image_does_not_depend_on_the_size_of_the_batch() -> None:
    policy, whole = drawn(), task()
    draws = stacked([policy().draw(generator(i)) for i in range(7)])
    method = replace(whole.method, table=policy.table(draws))
    jobs = fixed_jobs(whole.held_out, 0, 7)
    found = [
        score_jobs(replace(whole, batch=size), method, jobs, [reward], Stop()).scores["mean"]
        for size in (1, 3, 7)
    ]
    assert len(set(found[0].tolist())) == 7
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def picky(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """A reward that has no number for the prompt "hh", and raises for "hhh"."""
    if "hhh" in prompts:
        raise ValueError("hhh cannot be scored")
    scores = [math.nan if p == "hh" else float(len(p)) for p in prompts]
    return {"picky": images.new_tensor(scores)}


def test_an_image_without_a_score_is_told_and_does_not_cost_the_others_theirs() -> None:
    whole = task()
    jobs = fixed_jobs(whole.held_out, 0, 5)
    found = score_jobs(whole, whole.method, jobs, [picky], Stop())
    assert found.scores["picky"].isfinite().tolist() == [True, False, False, True, True]
    assert found.reasons == ("picky gave nan", "hhh cannot be scored")


def broken(latents: Tensor) -> Tensor:
    """A decoder that breaks the image of the second latent."""
    images = quadrature().decode(latents)
    images[1, 0, 0, 0] = math.nan
    return images


def test_an_image_that_holds_nan_is_not_shown_to_a_reward() -> None:
    whole = replace(task(), backend=replace(quadrature(), decode=broken), decode_batch=5)
    jobs = fixed_jobs(whole.held_out, 0, 5)
    found = score_jobs(whole, whole.method, jobs, [reward], Stop())
    assert found.scores["near"].isfinite().tolist() == [True, False, True, True, True]
    assert "NaN" in found.reasons[0]


def test_where_nothing_can_be_scored_the_reason_is_told() -> None:
    whole = replace(task(), held_out=("hhh", "hhh"))
    jobs = fixed_jobs(whole.held_out, 0, 3)
    with pytest.raises(ValueError, match="no image could be scored: hhh cannot be scored"):
        score_jobs(whole, whole.method, jobs, [picky], Stop())


def test_latents_are_decoded_so_many_at_a_time() -> None:
    seen: list[int] = []

    def watched_decode(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return quadrature().decode(latents)

    watched = timed(replace(quadrature(), decode=watched_decode), Clock(torch.device("cpu")), 2)
    latents = torch.randn(5, 3, 2, 2, generator=generator(0))
    assert torch.equal(watched.decode(latents), quadrature().decode(latents))
    assert seen == [2, 2, 1]


def test_time_is_counted_once() -> None:
    clock = Clock(torch.device("cpu"))
    ticks = iter([0.0, 1.0, 3.0, 10.0])
    clock.now = lambda: next(ticks)  # type: ignore[method-assign]
    with clock.on("denoise"), clock.on("decode"):
        pass
    assert (clock.seconds["decode"], clock.seconds["denoise"]) == (2.0, 8.0)


def test_what_ranks_made_comes_back_in_its_order() -> None:
    assert in_order([[0, 3, 6], [1, 4], [2, 5]]) == list(range(7))
    assert in_order([[0], [], []]) == [0]


def test_a_signal_stops_a_rollout_between_batches() -> None:
    whole = task()
    with pytest.raises(Stopped):
        score_jobs(whole, whole.method, fixed_jobs(whole.held_out, 0, 5), [reward], Stop(15))
