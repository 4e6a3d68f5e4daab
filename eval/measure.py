"""How far candidates end from the fine solution of the same seeds, and at what cost.

Shapes: N jobs (images) in all, B of a batch, * one latent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from backends.base import Backend
from backends.generate import Batch, Job, Method, generate
from eval.candidates import Candidate
from eval.frechet import Extractor, Moments, Reference, merged, moments
from eval.machine import clock
from rewards.base import Reward
from rewards.scorer import score_batch
from src.images import to_bytes
from src.intervals import Estimate, mean_of

LEVEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Study:
    """On what everything is compared."""

    backend: Backend
    jobs: tuple[Job, ...]
    fine: Candidate
    batch: int = 64

    def parts(self) -> Iterator[tuple[int, tuple[Job, ...]]]:
        """The jobs in batches, each with the place of its first."""
        for at in range(0, len(self.jobs), self.batch):
            yield at, self.jobs[at : at + self.batch]


@dataclass(frozen=True)
class Judge:
    """What makes Frechet distances of images."""

    extract: Extractor
    reference: Reference

    def see(self, images: Tensor) -> Moments:
        """The statistics of images [B, C, H, W] in [0, 1], rounded as in their PNGs."""
        return moments(self.extract(to_bytes(images).float() / 255))


@dataclass(frozen=True)
class Score:
    """What a candidate achieved."""

    name: str
    nfe: int  # sequential calls, as counted by the loop
    schedule: str
    afs: bool
    points: int
    rows: float  # evaluations of the network an image, every point counted
    rmse: float  # to the fine solution, over all numbers of the latents
    frechet: float | None
    time: float  # in bare network calls of the same batch, timed beside it; median of batches
    source: str | None
    rmse_low: float | None = None  # ends of its 95 % interval
    rmse_high: float | None = None
    rewards: Mapping[str, Estimate] = field(default_factory=dict)  # means, in their own units
    gains: Mapping[str, Estimate] = field(default_factory=dict)  # over the fine solution, in pairs


@dataclass
class Running:
    """Sums over the batches so far."""

    squared: list[Tensor] = field(default_factory=list)  # mean squares [B] of every batch
    calls: int = 0
    rows: int = 0
    times: list[float] = field(default_factory=list)
    seen: Moments | None = None
    rewards: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_images(self, new: Moments) -> None:
        """Take in the statistics of one more batch."""
        self.seen = new if self.seen is None else merged(self.seen, new)

    def add_rewards(self, new: Mapping[str, Tensor]) -> None:
        """Take in the scores [B] of one more batch."""
        for name, values in new.items():
            self.rewards.setdefault(name, []).append(values.double().cpu())

    def reward(self, name: str) -> Tensor:
        """The scores [N] so far."""
        return torch.cat(self.rewards[name])


@dataclass(frozen=True)
class Fine:
    """The fine solution of every job."""

    latents: Tensor  # [N, *] on the CPU
    images: Tensor  # [N, C, H, W] uint8 on the CPU
    score: Score
    rewards: Mapping[str, Tensor] = field(default_factory=dict)  # [N] of each


Rewards = Mapping[str, Reward]


def solve_finely(study: Study, judge: Judge | None = None, rewards: Rewards | None = None) -> Fine:
    """The fine solutions, and their own Frechet distance, rewards and time."""
    latents: list[Tensor] = []
    images: list[Tensor] = []
    running = Running()
    for _, part in tqdm(list(study.parts()), desc="fine solution", unit="batch", disable=None):
        unit = bare_call(study.backend, study.fine.method, part)
        made, seconds = timed(study.backend, study.fine.method, part)
        note(running, made, seconds / unit)
        running.squared.append(torch.zeros(len(part), dtype=torch.float64))
        look(running, made, judge, rewards)
        latents.append(made.latents.cpu())
        images.append(to_bytes(made.images).cpu())
    score = scored(study.fine, running, judge, {})
    seen = {name: running.reward(name) for name in running.rewards}
    return Fine(torch.cat(latents), torch.cat(images), score, seen)


def measure(
    study: Study,
    candidates: Sequence[Candidate],
    fine: Fine,
    judge: Judge | None = None,
    *,
    rewards: Rewards | None = None,
) -> list[Score]:
    """The scores of candidates, in their order, all on the study's jobs.

    Candidates take turns batch by batch, so that what else the machine does meets all alike.
    Raises ValueError for a candidate that starts or ends at another noise level than the fine
    solution, or under other guidance.
    """
    for candidate in candidates:
        check_comparable(candidate, study.fine)
    running = [Running() for _ in candidates]
    total = len(list(study.parts())) * len(candidates)
    with tqdm(total=total, desc="candidates", unit="batch", disable=None) as bar:
        for at, part in study.parts():
            target = fine.latents[at : at + len(part)].double()
            for candidate, sums in zip(candidates, running, strict=True):
                unit = bare_call(study.backend, study.fine.method, part)
                made, seconds = timed(study.backend, candidate.method, part)
                note(sums, made, seconds / unit)
                error = made.latents.cpu() - target
                sums.squared.append(error.square().flatten(1).mean(1))
                look(sums, made, judge, rewards)
                bar.update()
    return [
        scored(candidate, sums, judge, fine.rewards)
        for candidate, sums in zip(candidates, running, strict=True)
    ]


def note(sums: Running, made: Batch, time: float) -> None:
    """Count one batch."""
    sums.calls = made.tally.calls
    sums.rows += made.tally.rows
    sums.times.append(time)


def look(sums: Running, made: Batch, judge: Judge | None, rewards: Rewards | None) -> None:
    """What judge and rewards see in one batch."""
    if judge:
        sums.add_images(judge.see(made.images))
    if rewards:
        prompts = [job.prompt if isinstance(job.prompt, str) else "" for job in made.jobs]
        images = made.images.float().expand(-1, 3, -1, -1)
        sums.add_rewards(score_batch(rewards, images, prompts))


def scored(
    candidate: Candidate, sums: Running, judge: Judge | None, fine: Mapping[str, Tensor]
) -> Score:
    """The score of all batches; `fine` has the rewards [N] of the fine solution."""
    assert sums.calls == candidate.nfe, f"{candidate.name} made {sums.calls} calls"
    squared = torch.cat(sums.squared)
    error = mean_of(squared)
    rewards = {name: sums.reward(name) for name in sums.rewards}
    return Score(
        name=candidate.name,
        nfe=sums.calls,
        schedule=candidate.schedule,
        afs=candidate.method.afs,
        points=candidate.points,
        rows=sums.rows / len(squared),
        rmse=error.value**0.5,
        frechet=judge.reference.distance(sums.seen) if judge and sums.seen else None,
        time=median(sums.times),
        source=candidate.source,
        rmse_low=error.low**0.5,
        rmse_high=error.high**0.5,
        rewards={name: mean_of(values) for name, values in rewards.items()},
        gains={n: mean_of(values - fine[n]) for n, values in rewards.items() if n in fine},
    )


def check_comparable(candidate: Candidate, fine: Candidate) -> None:
    """ValueError unless both solve the same problem."""
    ours, theirs = candidate.method, fine.method
    for end, place in (("starts", 0), ("ends", -1)):
        level, other = ours.sigmas[place].item(), theirs.sigmas[place].item()
        if abs(level / other - 1) > LEVEL_TOLERANCE:
            who = candidate.source or candidate.name
            raise ValueError(f"{who} {end} at sigma {level:g}, the fine solution at {other:g}")
    if ours.guidance_rate != theirs.guidance_rate:
        who, rate = candidate.source or candidate.name, ours.guidance_rate
        fix = f"the fine solution has {theirs.guidance_rate:g}: set --guidance_rate"
        raise ValueError(f"{who} has the guidance rate {rate:g}, {fix}")


def timed(backend: Backend, method: Method, jobs: Sequence[Job]) -> tuple[Batch, float]:
    """One batch of images, and the seconds that it took, decoding included."""
    started = clock(backend.device)
    made = next(generate(backend, method, jobs, batch=len(jobs)))
    return made, clock(backend.device) - started


@torch.no_grad()
def bare_call(backend: Backend, method: Method, jobs: Sequence[Job]) -> float:
    """The seconds of one network call for these jobs."""
    cond = backend.encode([job.prompt for job in jobs])
    network = backend.guided(method.guidance_rate, cond)
    dtype = torch.promote_types(backend.dtype, torch.float32)
    x = torch.zeros(len(jobs), *backend.latent_shape, device=backend.device, dtype=dtype)
    sigma = x.new_full((len(jobs),), method.sigmas[len(method.sigmas) // 2].item())
    started = clock(backend.device)
    network(x, sigma, cond)
    return clock(backend.device) - started


def best(scores: Sequence[Score], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of each name and number of calls the candidate with the least error, in their order."""
    winners: dict[tuple[str, int], tuple[float, Candidate]] = {}
    for score, candidate in zip(scores, candidates, strict=True):
        key = (score.name, score.nfe)
        if key not in winners or score.rmse < winners[key][0]:
            winners[key] = (score.rmse, candidate)
    return [candidate for _, candidate in winners.values()]
