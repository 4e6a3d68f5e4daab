"""How far candidates end from the fine solution of the same seeds, and at what cost.

Shapes: N jobs (images) in all, B of a batch, * one latent.
"""

from collections.abc import Iterator, Sequence
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
from src.images import to_bytes

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


@dataclass
class Running:
    """Sums over the batches so far."""

    squared: float = 0.0
    numbers: int = 0
    calls: int = 0
    rows: int = 0
    times: list[float] = field(default_factory=list)
    seen: Moments | None = None

    def add_images(self, new: Moments) -> None:
        """Take in the statistics of one more batch."""
        self.seen = new if self.seen is None else merged(self.seen, new)


@dataclass(frozen=True)
class Fine:
    """The fine solution of every job."""

    latents: Tensor  # [N, *] on the CPU
    images: Tensor  # [N, C, H, W] uint8 on the CPU
    score: Score


def solve_finely(study: Study, judge: Judge | None = None) -> Fine:
    """The fine solutions, and their own Frechet distance and time."""
    latents: list[Tensor] = []
    images: list[Tensor] = []
    running = Running()
    for _, part in tqdm(list(study.parts()), desc="fine solution", unit="batch", disable=None):
        unit = bare_call(study.backend, study.fine.method, part)
        made, seconds = timed(study.backend, study.fine.method, part)
        note(running, made, seconds / unit)
        if judge:
            running.add_images(judge.see(made.images))
        latents.append(made.latents.cpu())
        images.append(to_bytes(made.images).cpu())
    score = scored(study.fine, running, judge, len(study.jobs))
    return Fine(torch.cat(latents), torch.cat(images), score)


def measure(
    study: Study, candidates: Sequence[Candidate], fine: Fine, judge: Judge | None = None
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
                sums.squared += (made.latents.cpu() - target).square().sum().item()
                if judge:
                    sums.add_images(judge.see(made.images))
                bar.update()
    return [
        scored(candidate, sums, judge, len(study.jobs))
        for candidate, sums in zip(candidates, running, strict=True)
    ]


def note(sums: Running, made: Batch, time: float) -> None:
    """Count one batch."""
    sums.numbers += made.latents.numel()
    sums.calls = made.tally.calls
    sums.rows += made.tally.rows
    sums.times.append(time)


def scored(candidate: Candidate, sums: Running, judge: Judge | None, count: int) -> Score:
    """The score of all batches."""
    assert sums.calls == candidate.nfe, f"{candidate.name} made {sums.calls} calls"
    return Score(
        name=candidate.name,
        nfe=sums.calls,
        schedule=candidate.schedule,
        afs=candidate.method.afs,
        points=candidate.points,
        rows=sums.rows / count,
        rmse=(sums.squared / sums.numbers) ** 0.5,
        frechet=judge.reference.distance(sums.seen) if judge and sums.seen else None,
        time=median(sums.times),
        source=candidate.source,
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
