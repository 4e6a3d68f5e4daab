"""How far solvers end from the fine solution of the same seeds, what their images are worth, and
at what cost: what is compared, and what is measured of it.

Shapes: N jobs (images) in all, B of a batch, * one latent.
"""  # noqa: D205

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels
from backends.generate import ImageBatch, Job, generate
from backends.load import check_fit
from eval.features import FeatureSpace
from eval.fid import Statistics, merged, statistics_of
from eval.machine import clock
from rewards.base import Reward
from rewards.scorer import score_batch
from solvers.predictor import find_predictor, load_predictor
from solvers.sampler import Sampler, hand_made, num_steps_for
from src import ranks
from src.stats import Estimate, mean_of

SOLVERS = (
    *("euler", "heun", "dpm2", "ipndm-2", "ipndm-3", "ipndm-4", "ipndm_v-3"),
    *("dpmpp-2", "dpmpp-3", "unipc-2", "unipc-3", "deis-3"),
)
"""The hand-made solvers that a learned one has to beat."""
SCHEDULES = {"ve": ("polynomial", "logsnr", "time_uniform"), "flow": ("flowmatch", "polynomial")}
RHO = {"polynomial": 7.0, "time_uniform": 1.0}
FINE_STEPS = 64
LEVEL_TOLERANCE = 1e-3

Rewards = Mapping[str, Reward]


@dataclass(frozen=True)
class Candidate:
    """One way to sample, by name."""

    name: str
    sampler: Sampler
    schedule: str
    points: int = 1  # K
    source: str | None = None  # the file of a learned one, from the current folder
    fitted_on: tuple[str, ...] = ()  # the feature spaces that its table was fitted in

    @property
    def nfe(self) -> int:
        """Network calls one after another for an image."""
        return self.sampler.calls


def fine_solution(
    levels: NoiseLevels, steps: int = FINE_STEPS, guidance_rate: float = 1.0
) -> Candidate:
    """Heun in `steps` steps, two calls each: on polynomial, rho 7, or flow's own schedule."""
    schedule = SCHEDULES[levels.process.name][0]
    return by_hand("heun", steps + 1, schedule, levels, guidance_rate=guidance_rate)


def by_hand(
    solver: str,
    num_steps: int,
    schedule: str,
    levels: NoiseLevels,
    *,
    rho: float | None = None,
    afs: bool = False,
    guidance_rate: float = 1.0,
) -> Candidate:
    """A hand-made solver on a schedule; ValueError where it does not fit these levels.

    On flow, every schedule ends where flow's own does, so that all solve one problem.
    """
    if levels.process.name == "flow":
        levels = replace(levels, sigma_min=float(levels.grid("flowmatch", 2)[-1]))
    sampler = hand_made(
        solver, levels, num_steps, schedule=schedule, rho=rho, afs=afs, guidance_rate=guidance_rate
    )
    return Candidate(solver, sampler, _label(schedule, rho))


def _label(schedule: str, rho: float | None) -> str:
    """The name with its exponent, if it has one: polynomial-7, logsnr."""
    rho = RHO.get(schedule) if rho is None else rho
    return f"{schedule}-{rho:g}" if schedule in RHO else schedule


def variants(
    solver: str,
    nfe: int,
    schedules: Sequence[str],
    levels: NoiseLevels,
    guidance_rate: float = 1.0,
) -> list[Candidate]:
    """A solver with this many sequential calls on each schedule, without AFS and with it.

    On a single schedule AFS is there only where the calls do not come out without it (a solver
    of two calls an interval at an odd number). Empty where they cannot come out.
    """
    choices: list[Candidate] = []
    for afs in (False, True) if levels.process.name == "ve" else (False,):
        if choices and len(schedules) == 1:
            break
        try:
            num_steps = num_steps_for(solver, nfe, afs)
        except ValueError:
            continue
        choices += [
            by_hand(solver, num_steps, one, levels, afs=afs, guidance_rate=guidance_rate)
            for one in schedules
        ]
    return choices


def learned(paths: Sequence[Path], backend: Backend) -> list[Candidate]:
    """Predictors, named by kind, base and K ("epd-ipndm K=2"), the fewest calls first.

    Two of one name and number of calls are told apart by their files. ValueError for one that
    does not belong to this backend.
    """
    candidates = []
    for path in paths:
        predictor = load_predictor(path)
        recipe = predictor.recipe
        check_fit(recipe, backend)
        kind = recipe.solver if recipe.base == "euler" else f"{recipe.solver}-{recipe.base}"
        candidates.append(
            Candidate(
                f"{kind} K={recipe.num_points}",
                predictor.sampler(backend.levels),
                _label(recipe.schedule_type, recipe.schedule_rho),
                recipe.num_points,
                from_here(path),
                tuple(map(space_name, recipe.training.get("fitted_on") or ())),
            )
        )
    seen = Counter((c.name, c.nfe) for c in candidates)
    named = [
        replace(c, name=f"{c.name} ({c.source})") if seen[c.name, c.nfe] > 1 else c
        for c in candidates
    ]
    return sorted(named, key=lambda c: (c.nfe, c.name))


def space_name(network: str) -> str:
    """The feature space of a network by the name that train_distill.py knows it by."""
    kind = network.partition("=")[0]  # of dinov2=FOLDER
    file = "inception" if "inception" in kind and Path(kind).suffix else kind
    return {"efficientnet-lite0": "efficientnet"}.get(kind, file)


def from_here(path: Path | str) -> str:
    """A path as seen from the current folder, so that what is written holds no machine's."""
    return Path(os.path.relpath(path)).as_posix() if Path(path).is_absolute() else str(path)


def predictor_files(patterns: Sequence[str]) -> list[Path]:
    """Paths, names in exps/ and patterns with * -> files; ValueError for what finds nothing."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if "*" in pattern or "?" in pattern:
            root = Path(path.anchor or ".")
            rest = str(path.relative_to(path.anchor))
            matches = sorted(p for p in root.glob(rest) if p.is_file())
        else:
            matches = [find_predictor(pattern)]
        if not matches:
            raise ValueError(f"no predictor is named {pattern!r}")
        files |= dict.fromkeys(matches)
    return list(files)


@dataclass(frozen=True)
class Benchmark:
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
class FrechetReference:
    """A feature space, and what images are held against in it."""

    space: FeatureSpace
    statistics: Statistics | None = None  # None: the fine solution's images of the same seeds


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance: of one set of images, or the mean over disjoint sets of seeds."""

    value: float
    spread: float | None = None  # the standard deviation over the sets
    trained_on: bool = False  # whether the table was fitted in these very features


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
    frechet: float | None  # in the first of the feature spaces
    time: float  # in bare network calls of the same batch, timed beside it; median of batches
    source: str | None
    rmse_low: float | None = None  # ends of its 95 % interval
    rmse_high: float | None = None
    rewards: Mapping[str, Estimate] = field(default_factory=dict)  # means, in their own units
    gains: Mapping[str, Estimate] = field(default_factory=dict)  # over the fine solution, in pairs
    frechets: Mapping[str, Frechet] = field(default_factory=dict)  # by feature space


@dataclass(frozen=True)
class Fine:
    """The fine solution of every job."""

    latents: Tensor  # [N, *] on the CPU
    score: Score
    rewards: Mapping[str, Tensor]  # [N] of each
    statistics: Mapping[str, Statistics]  # by feature space


@dataclass
class Running:
    """Sums over the batches so far."""

    squared: list[Tensor] = field(default_factory=list)  # mean squares [B] of every batch
    calls: int = 0
    rows: int = 0
    times: list[float] = field(default_factory=list)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    rewards: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self, batch: ImageBatch, references: Sequence[FrechetReference], rewards: Rewards | None
    ) -> None:
        """Count a batch, and look at its images."""
        self.calls = batch.tally.calls
        self.rows += batch.tally.rows
        for reference in references:
            space = reference.space
            new = statistics_of(space(batch.images))
            old = self.statistics.get(space.name)
            self.statistics[space.name] = merged(old, new) if old else new
        if rewards:
            prompts = ["" if job.prompt is None else str(job.prompt) for job in batch.jobs]
            images = batch.images.float().expand(-1, 3, -1, -1)
            for name, values in score_batch(rewards, images, prompts).items():
                self.rewards.setdefault(name, []).append(values.double().cpu())


def solve_finely(
    benchmark: Benchmark,
    references: Sequence[FrechetReference] = (),
    rewards: Rewards | None = None,
) -> Fine:
    """The fine solutions, and their own Frechet distance, rewards and time."""
    latents: list[Tensor] = []
    sums = Running()
    bar = ranks.progress(len(benchmark.jobs), "image", "fine solution")
    for _, part in benchmark.parts():
        batch = _timed(benchmark, benchmark.fine, part, sums)
        sums.add(batch, references, rewards)
        sums.squared.append(torch.zeros(len(part), dtype=torch.float64))
        latents.append(batch.latents.cpu())
        bar.update(len(part))
    bar.close()
    seen = {name: torch.cat(values) for name, values in sums.rewards.items()}
    score = _score(benchmark.fine, sums, references, sums.statistics, {})
    return Fine(torch.cat(latents), score, seen, sums.statistics)


def measure(
    benchmark: Benchmark,
    candidates: Sequence[Candidate],
    fine: Fine,
    references: Sequence[FrechetReference] = (),
    rewards: Rewards | None = None,
) -> list[Score]:
    """The scores of candidates, in their order, all on the benchmark's jobs.

    Candidates take turns batch by batch, so that what else the machine does meets all alike.
    Raises ValueError for a candidate that starts or ends at another noise level than the fine
    solution, or under other guidance.
    """
    for candidate in candidates:
        check_comparable(candidate, benchmark.fine)
    running = [Running() for _ in candidates]
    bar = ranks.progress(len(benchmark.jobs) * len(candidates), "image", "candidates")
    for at, part in benchmark.parts():
        target = fine.latents[at : at + len(part)].double()
        for candidate, sums in zip(candidates, running, strict=True):
            batch = _timed(benchmark, candidate, part, sums)
            sums.add(batch, references, rewards)
            error = batch.latents.cpu() - target
            sums.squared.append(error.square().flatten(1).mean(1))
            bar.update(len(part))
    bar.close()
    return [
        _score(candidate, sums, references, fine.statistics, fine.rewards)
        for candidate, sums in zip(candidates, running, strict=True)
    ]


def images_statistics(
    benchmark: Benchmark,
    candidate: Candidate,
    jobs: Sequence[Job],
    references: Sequence[FrechetReference],
) -> dict[str, Statistics]:
    """The statistics of the jobs' images by feature space; nothing else of them is kept."""
    sums = Running()
    bar = ranks.progress(len(jobs), "image", f"{candidate.name}, {candidate.nfe} calls")
    for images in generate(benchmark.backend, candidate.sampler, jobs, batch=benchmark.batch):
        sums.add(images, references, None)
        bar.update(len(images.jobs))
    bar.close()
    return sums.statistics


def _score(
    candidate: Candidate,
    sums: Running,
    references: Sequence[FrechetReference],
    fine: Mapping[str, Statistics],
    fine_rewards: Mapping[str, Tensor],
) -> Score:
    """The score of all batches; `fine` and `fine_rewards` [N] are the fine solution's."""
    assert sums.calls == candidate.nfe, f"{candidate.name} made {sums.calls} calls"
    error = mean_of(torch.cat(sums.squared))
    rewards = {name: torch.cat(values) for name, values in sums.rewards.items()}
    distances = {
        r.space.name: Frechet(
            (r.statistics or fine[r.space.name]).distance(sums.statistics[r.space.name]),
            trained_on=r.space.name in candidate.fitted_on,
        )
        for r in references
        if sums.statistics[r.space.name].count > 1
    }
    return Score(
        name=candidate.name,
        nfe=sums.calls,
        schedule=candidate.schedule,
        afs=candidate.sampler.afs,
        points=candidate.points,
        rows=sums.rows / sum(map(len, sums.squared)),
        rmse=error.value**0.5,
        frechet=next((one.value for one in distances.values()), None),
        time=median(sums.times),
        source=candidate.source,
        rmse_low=error.low**0.5,
        rmse_high=error.high**0.5,
        rewards={name: mean_of(values) for name, values in rewards.items()},
        gains={
            name: mean_of(values - fine_rewards[name])
            for name, values in rewards.items()
            if name in fine_rewards
        },
        frechets=distances,
    )


def check_comparable(candidate: Candidate, fine: Candidate) -> None:
    """ValueError unless both solve the same problem."""
    ours, theirs = candidate.sampler, fine.sampler
    who = candidate.source or candidate.name
    for end, place in (("starts", 0), ("ends", -1)):
        level, other = ours.sigmas[place], theirs.sigmas[place]
        if abs(level / other - 1) > LEVEL_TOLERANCE:
            raise ValueError(f"{who} {end} at sigma {level:g}, the fine solution at {other:g}")
    if ours.guidance_rate != theirs.guidance_rate:
        fix = f"the fine solution has {theirs.guidance_rate:g}: set --guidance_rate"
        raise ValueError(f"{who} has the guidance rate {ours.guidance_rate:g}, {fix}")


@torch.no_grad()
def _timed(
    benchmark: Benchmark, candidate: Candidate, jobs: Sequence[Job], sums: Running
) -> ImageBatch:
    """One batch of images; its time, decoding included, over that of one bare call before it."""
    backend, sigmas = benchmark.backend, benchmark.fine.sampler.sigmas
    cond = backend.encode([job.prompt for job in jobs])
    network = backend.guided(candidate.sampler.guidance_rate, cond)
    dtype = torch.promote_types(backend.dtype, torch.float32)
    x = torch.zeros(len(jobs), *backend.shape, device=backend.device, dtype=dtype)
    sigma = x.new_full((len(jobs),), sigmas[len(sigmas) // 2])
    started = clock(backend.device)
    network(x, sigma, cond)
    called = clock(backend.device)
    batch = next(generate(backend, candidate.sampler, jobs, batch=len(jobs)))
    sums.times.append((clock(backend.device) - called) / (called - started))
    return batch


def best(scores: Sequence[Score], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of each name and number of calls the candidate with the least error, in their order."""
    winners: dict[tuple[str, int], tuple[float, Candidate]] = {}
    for score, candidate in zip(scores, candidates, strict=True):
        key = (score.name, score.nfe)
        if key not in winners or score.rmse < winners[key][0]:
            winners[key] = (score.rmse, candidate)
    return [candidate for _, candidate in winners.values()]
