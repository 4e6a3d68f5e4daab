"""The learned mean against the starting table, on prompts and noises kept out of training.

E images. Several noises to a prompt show also what a set of images is: its diversity, and its
Frechet distance to the fine solution's.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from backends.base import Prompt
from backends.generate import Job
from solvers.classic import Heun
from solvers.sampler import Sampler
from src.runs import Stop
from src.stats import mean_of
from training.ppo.objectives import diversity, frechet
from training.ppo.rollout import Scorer, Scoring, Task, images_of, score_jobs

FEATURES = "features"
FINE = 4
"""Steps of the fine solution in each interval of a table's grid."""


def by_prompt(scorer: Scorer) -> Scoring:
    """A scorer of texts as one of jobs."""

    def scoring(images: Tensor, jobs: Sequence[Job]) -> Mapping[str, Tensor]:
        texts = ["" if job.prompt is None else str(job.prompt) for job in jobs]
        return scorer(images.expand(-1, 3, -1, -1), texts)

    return scoring


def pull_to_fine(task: Task) -> Scoring:
    """`pull`: how far images are in features from the fine solution of their noise."""

    def pull(images: Tensor, jobs: Sequence[Job]) -> Mapping[str, Tensor]:
        distinct = list(dict.fromkeys(jobs))
        fine = task.features(images_of(task, fine_sampler(task.sampler), distinct))
        target = fine[[distinct.index(job) for job in jobs]]
        return {"pull": (task.features(images) - target).square().mean(1).sqrt()}

    return pull


def fine_sampler(sampler: Sampler) -> Sampler:
    """The fine solution: Heun on the grid with FINE steps, even in log sigma, in each interval."""
    levels = [level for level in sampler.sigmas if level > 0]
    between = [a * (b / a) ** (i / FINE) for a, b in pairwise(levels) for i in range(FINE)]
    rate = sampler.guidance_rate
    return Sampler(Heun(), (*between, levels[-1]), sampler.process, guidance_rate=rate)


def features_of(task: Task, sampler: Sampler, jobs: Sequence[Job], stop: Stop) -> Tensor:
    """The features [E, F] of images by one sampler, on every rank."""
    scoring = [lambda images, _jobs: {FEATURES: task.features(images)}]
    return score_jobs(task, sampler, jobs, scoring, stop).scores[FEATURES]


def held_out_scores(
    task: Task, sampler: Sampler, jobs: Sequence[Job], stop: Stop, fine: Tensor | None = None
) -> dict[str, Tensor]:
    """The scores [E] of held-out images by one sampler, on every rank, by reward.

    With the features `fine` [E, F] of the fine solution's also `diversity` [E], how far an image
    is in features from the others of its prompt, and `frechet` [1], the distance of the sets.
    """
    scorings = [by_prompt(scorer) for scorer in (task.score, task.judge) if scorer]
    if fine is None:
        return score_jobs(task, sampler, jobs, scorings, stop).scores
    scorings.append(lambda images, _jobs: {FEATURES: task.features(images)})
    scores = score_jobs(task, sampler, jobs, scorings, stop).scores
    points = scores.pop(FEATURES)
    spread = diversity(points, [job.prompt for job in jobs])
    return scores | {"diversity": spread, "frechet": frechet(points, fine)[None]}


def compared(
    start: Mapping[str, Tensor], now: Mapping[str, Tensor], jobs: Sequence[Job]
) -> dict[str, float]:
    """The numbers of an evaluation: of each score the means, the mean gain, its 95 % interval.

    Prompts are the units: images of one prompt are averaged. A score of fewer than two is left
    out, but for those of the whole set.
    """
    numbers: dict[str, float] = {}
    for name in (name for name in now if name in start):
        both = (now[name].isfinite() & start[name].isfinite()).nonzero()[:, 0].tolist()
        means = {f"eval/{name}": now[name], f"eval/{name}_start": start[name]}
        gains: dict[Prompt, list[float]] = {}
        for i in both:
            gains.setdefault(jobs[i].prompt, []).append((now[name][i] - start[name][i]).item())
        if len(gains) > 1:
            each = [sum(values) / len(values) for values in gains.values()]
            gain = mean_of(torch.tensor(each, dtype=torch.float64))
            numbers |= {
                f"eval/{name}_gain": gain.value,
                f"eval/{name}_gain_low": gain.low,
                f"eval/{name}_gain_high": gain.high,
                f"eval/{name}_pairs": len(both),
            }
        if len(gains) > 1 or len(now[name]) == 1:
            numbers |= {label: values[both].mean().item() for label, values in means.items()}
    return numbers
