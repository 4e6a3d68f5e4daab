"""How far solvers end from the fine solution of the same seeds, what their images are worth, and
at what cost: what is compared, and what is measured of it.

Shapes: N jobs (images) in all, B of a batch, * one latent.
"""  # noqa: D205

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels, Prompt
from backends.generate import ImageBatch, Job, generate
from backends.load import check_fit
from eval.features import FeatureSpace, spaces_of, synonyms
from eval.fid import Statistics, merged, precision_recall, statistics_of
from eval.machine import clock
from rewards.base import Reward, WeightedSum
from rewards.scorer import score_all, single_rewards
from solvers.field import Condition
from solvers.predictor import load_predictor
from solvers.recipe import fitted_on
from solvers.sampler import SOLVERS as ALL_SOLVERS
from solvers.sampler import Sampler, hand_made, make_solver, parse_name
from solvers.schedules import SCHEDULES as ALL_SCHEDULES
from src import ranks
from src.files import find_predictors
from src.stats import Estimate, mean_of
from src.text import number

SOLVERS = (
    *("euler", "heun", "dpm2", "ipndm-2", "ipndm-3", "ipndm-4", "ipndm_v-3"),
    *("dpmpp-2", "dpmpp-3", "unipc-2", "unipc-3", "deis-3"),
)
"""The hand-made solvers that a learned one has to beat."""
SCHEDULES = {"ve": ("polynomial", "logsnr", "time_uniform"), "flow": ("flowmatch", "polynomial")}
RHO = {"polynomial": 7.0, "time_uniform": 1.0}
FINE_STEPS = 64
LEVEL_TOLERANCE = 1e-3
NEIGHBOURS = 3

Rewards = Mapping[str, Reward]


# --- what is compared -----------------------------------------------------------------------


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

    def fitted_in(self, space: str) -> bool:
        """Whether its table was fitted in a feature space, under any of that one's names."""
        return not {*spaces_of([space]), *synonyms(space)}.isdisjoint(self.fitted_on)


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
    return f"{schedule}-{RHO[schedule] if rho is None else rho:g}" if schedule in RHO else schedule


def rivals_for(
    solvers: Sequence[str],
    nfes: Sequence[str | int],
    schedules: Sequence[str],
    levels: NoiseLevels,
    guidance_rate: float = 1.0,
) -> list[Candidate]:
    """Every hand-made candidate of these solvers, calls and schedules (["best"]: the usual).

    Each is there without AFS and with it; on a single schedule with it only where the calls do
    not come out without it (a solver of two calls an interval at an odd number). Combinations
    that do not exist are left out. ValueError for unknown names, and for calls that are no
    numbers from 1 on.
    """
    for nfe in nfes:
        if not str(nfe).isdecimal() or int(nfe) < 1:
            raise ValueError(f"--nfe {nfe!r} is no number from 1 on: write, say, 1,3,5")
    unknown = [name for name in schedules if name not in ("best", *ALL_SCHEDULES)]
    if unknown or not schedules:
        choice = ", ".join(ALL_SCHEDULES)
        raise ValueError(f"unknown schedule {unknown}: choose best or from {choice}")
    if "best" in schedules:
        schedules = (*SCHEDULES[levels.process.name], *(("discrete",) if levels.timesteps else ()))
    rivals: list[Candidate] = []
    for solver in solvers:
        make_solver(solver)
        calls = ALL_SOLVERS[parse_name(solver)[0]].calls
        for nfe in map(int, nfes):
            cell: list[Candidate] = []
            for afs in (False, True) if levels.process.name == "ve" else (False,):
                if cell and len(schedules) == 1:
                    break
                intervals, odd = divmod(nfe + afs, calls)
                if odd or intervals < 1:
                    continue
                num_steps = intervals + 1
                cell += [
                    by_hand(solver, num_steps, one, levels, afs=afs, guidance_rate=guidance_rate)
                    for one in schedules
                ]
            rivals += cell
    return rivals


def predictor_files(patterns: Sequence[str]) -> list[Path]:
    """The files of predictors by paths, names in exps/, and patterns, each once.

    ValueError where one names none.
    """
    return list(dict.fromkeys(file for one in patterns for file in find_predictors(one)))


def learned(patterns: Sequence[str], backend: Backend) -> list[Candidate]:
    """Predictors, named by kind, base and K ("epd-ipndm K=2"), the fewest calls first.

    Two of one name and number of calls are told apart by their files. ValueError for a pattern
    that nothing matches, and for a predictor that does not belong to this backend.
    """
    candidates = []
    for path in predictor_files(patterns):
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
                spaces_of(fitted_on(recipe.training)),
            )
        )
    seen = Counter((c.name, c.nfe) for c in candidates)
    named = [
        replace(c, name=f"{c.name} ({c.source})") if seen[c.name, c.nfe] > 1 else c
        for c in candidates
    ]
    return sorted(named, key=lambda c: (c.nfe, c.name))


def halves_of(prompts: Sequence[Prompt]) -> tuple[list[int], list[int]]:
    """Two sets of images of other seeds, so that none stands beside its own, of the same prompts.

    Of each prompt (or class, or None) every other image; one that stands alone is in neither.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    seen, all_of = Counter[Prompt](), Counter(prompts)
    for i, prompt in enumerate(prompts):
        if all_of[prompt] > 1:
            halves[seen[prompt] % 2].append(i)
        seen[prompt] += 1
    return halves


def from_here(path: Path | str) -> str:
    """A path as seen from the current folder, so that what is written holds no machine's."""
    return Path(os.path.relpath(path)).as_posix() if Path(path).is_absolute() else str(path)


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


# --- what is measured -----------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """On what everything is compared."""

    backend: Backend
    jobs: tuple[Job, ...]
    fine: Candidate
    batch: int = 64


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
    sets: tuple[float, ...] = ()  # each one's, on the same seeds for all candidates

    def __str__(self) -> str:
        """`51.20 +-0.31, trained on`."""
        spread = "" if self.spread is None else f" +-{self.spread:.2g}"
        return number(self.value) + spread + ", trained on" * self.trained_on


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
    frechet: float | None  # in the first of the feature spaces, as precision and recall are
    time: float  # in bare network calls of the same batch, timed beside it; median of batches
    source: str | None
    rmse_low: float | None = None  # ends of its 95 % interval
    rmse_high: float | None = None
    rewards: Mapping[str, Estimate] = field(default_factory=dict)  # means, in their own units
    gains: Mapping[str, Estimate] = field(default_factory=dict)  # over the fine solution, in pairs
    frechets: Mapping[str, Frechet] = field(default_factory=dict)  # by feature space
    precision: float | None = None  # how many of its images are like some of the fine solution's
    recall: float | None = None  # how many of the fine solution's are like some of its images
    evaluations: float = 0.0  # rows an image, with those of "nothing" that guidance takes
    left_out: Mapping[str, str] = field(default_factory=dict)  # what is missing, and why


@dataclass
class Running:
    """What was seen of a candidate's batches so far."""

    squared: list[Tensor] = field(default_factory=list)  # mean squares [B] of every batch
    calls: int = 0
    rows: int = 0
    evaluations: int = 0
    times: list[float] = field(default_factory=list)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)  # [B, F], of the first space
    rewards: dict[str, list[Tensor]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why images have no score, by reward
    broken: str = ""  # why there are no features of all images


def measure(
    benchmark: Benchmark,
    candidates: Sequence[Candidate],
    references: Sequence[FrechetReference] = (),
    rewards: Rewards | None = None,
) -> tuple[Score, list[Score]]:
    """The scores of the fine solution and of candidates, in their order, on the same jobs.

    Candidates take turns batch by batch, so that what else the machine does meets all alike.
    A reward that fails on an image leaves it out, and where images have no features there is no
    Frechet distance: `left_out` tells why. Raises ValueError for a candidate that starts or ends
    at another noise level than the fine solution, or under other guidance, and where the fine
    solution's first batch holds NaN, or has no features or no image with a score.
    """
    for candidate in candidates:
        check_comparable(candidate, benchmark.fine)
    every = [benchmark.fine, *candidates]
    running = [Running() for _ in every]
    bar = ranks.progress(len(benchmark.jobs) * len(every), "image", "fine and candidates")
    for at in range(0, len(benchmark.jobs), benchmark.batch):
        jobs = benchmark.jobs[at : at + benchmark.batch]
        prompts = ["" if job.prompt is None else str(job.prompt) for job in jobs]
        target: Tensor | None = None
        for candidate, sums in zip(every, running, strict=True):
            batch, time, evaluations = _timed(benchmark, candidate, jobs)
            sums.times.append(time)
            sums.calls, sums.rows = batch.tally.calls, sums.rows + batch.tally.rows
            sums.evaluations += evaluations
            target = batch.latents.double() if target is None else target
            sums.squared.append((batch.latents - target).square().flatten(1).mean(1).cpu())
            first = not at and sums is running[0]
            if first and not target.isfinite().all():
                raise ValueError("the fine solution holds NaN or infinity: try --dtype float32")
            try:
                features = add_statistics(sums.statistics, batch.images, references)
                sums.features += [one.cpu().float() for one in features[:1]]
            except ValueError as error:
                if first:
                    raise
                sums.broken = sums.broken or str(error)
            images = batch.images.float().expand(-1, 3, -1, -1)
            for name, values in scored(rewards or {}, images, prompts, sums.reasons).items():
                if first and not values.isfinite().any():
                    raise ValueError(reason_of(name, sums.reasons))
                sums.rewards.setdefault(name, []).append(values)
            bar.update(len(jobs))
    bar.close()
    asked = [job.prompt for job in benchmark.jobs]
    fine, *scores = (
        _score(candidate, sums, references, running[0], asked)
        for candidate, sums in zip(every, running, strict=True)
    )
    return replace(fine, gains={}), scores


def scored(
    rewards: Rewards, images: Tensor, prompts: Sequence[str], reasons: dict[str, str]
) -> dict[str, Tensor]:
    """The scores [B] in float64, NaN where a reward fails: why is kept once for each reward."""

    def alone(name: str, reward: Reward, part: slice) -> Tensor:
        try:
            return score_all({name: reward}, images[part], prompts[part])[name].double().cpu()
        except ValueError as error:
            if part.stop - part.start == 1:
                reasons.setdefault(name, str(error))
                return torch.full((1,), torch.nan, dtype=torch.float64)
        ones = (slice(i, i + 1) for i in range(part.start, part.stop))
        return torch.cat([alone(name, reward, one) for one in ones])

    whole = slice(0, len(images))
    parts = {name: alone(name, reward, whole) for name, reward in single_rewards(rewards).items()}
    return parts | {n: r.mean(parts) for n, r in rewards.items() if isinstance(r, WeightedSum)}


def reason_of(name: str, reasons: Mapping[str, str]) -> str:
    """Why images have no score of a reward: its own reason, or that of a part of the sum."""
    return reasons.get(name) or next(iter(reasons.values()))


@torch.no_grad()
def _timed(
    benchmark: Benchmark, candidate: Candidate, jobs: Sequence[Job]
) -> tuple[ImageBatch, float, int]:
    """One batch of images, its time, and the rows that the network was evaluated on.

    The time, decoding included, is over that of one bare call before it.
    """
    backend, sigmas = benchmark.backend, benchmark.fine.sampler.sigmas
    cond = backend.encode([job.prompt for job in jobs])
    network = backend.guided(candidate.sampler.guidance_rate, cond)
    dtype = torch.promote_types(backend.dtype, torch.float32)
    x = torch.zeros(len(jobs), *backend.shape, device=backend.device, dtype=dtype)
    sigma = x.new_full((len(jobs),), sigmas[len(sigmas) // 2])
    started = clock(backend.device)
    network(x, sigma, cond)
    rows = 0

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return backend.denoise(x, sigma, cond)

    counting = replace(backend, denoise=counted)
    called = clock(backend.device)
    batch = next(generate(counting, candidate.sampler, jobs, batch=len(jobs)))
    return batch, (clock(backend.device) - called) / (called - started), rows


def add_statistics(
    sums: dict[str, Statistics], images: Tensor, references: Sequence[FrechetReference]
) -> list[Tensor]:
    """Merge the statistics of images into the sums by feature space -> their features.

    ValueError for features that hold NaN or infinity.
    """
    features = [reference.space(images) for reference in references]
    for name, each in zip((r.space.name for r in references), features, strict=True):
        if not each.isfinite().all():
            raise ValueError(f"the features of {name} hold NaN or infinity")
        new = statistics_of(each)
        sums[name] = merged(sums[name], new) if name in sums else new
    return features


def _score(
    candidate: Candidate,
    sums: Running,
    references: Sequence[FrechetReference],
    fine: Running,
    prompts: Sequence[Prompt],
) -> Score:
    """The score of all batches; `fine` is what was seen of the fine solution's."""
    assert sums.calls == candidate.nfe, f"{candidate.name} made {sums.calls} calls"
    error = mean_of(torch.cat(sums.squared))
    rewards = {name: torch.cat(values) for name, values in sums.rewards.items()}
    gains = {name: values - torch.cat(fine.rewards[name]) for name, values in rewards.items()}
    missing = {n: m for n, v in rewards.items() if (m := int(v.isnan().sum()))}
    left_out = {f"{n} of {m} images": reason_of(n, sums.reasons) for n, m in missing.items()}
    broken = sums.broken or (fine.broken and f"the fine solution's: {fine.broken}")
    if not all(squares.isfinite().all() for squares in sums.squared):
        left_out["an RMSE"] = "an image's latents hold NaN or infinity: try --dtype float32"
    distances = {}
    for name, of in ((r.space.name, r.statistics) for r in references):
        if broken if of is None else sums.broken:
            left_out[f"a Frechet distance ({name})"] = str(broken)
        elif sums.statistics[name].count > 1:
            value = (of or fine.statistics[name]).distance(sums.statistics[name])
            distances[name] = Frechet(value, trained_on=candidate.fitted_in(name))
    likeness: tuple[float | None, ...] = (None, None)
    if references and not broken:
        halves = halves_of(prompts)
        if min(map(len, halves)) > NEIGHBOURS + 1:
            ours, theirs = (
                torch.cat(seen.features)[half]
                for seen, half in zip((sums, fine), halves, strict=True)
            )
            likeness = precision_recall(ours, theirs, NEIGHBOURS)
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
        rmse_low=max(error.low, 0.0) ** 0.5,  # wide where images are few
        rmse_high=error.high**0.5,
        rewards=means(rewards),
        gains=means(gains),
        frechets=distances,
        precision=likeness[0],
        recall=likeness[1],
        evaluations=sums.evaluations / sum(map(len, sums.squared)),
        left_out=left_out,
    )


def means(values: Mapping[str, Tensor]) -> dict[str, Estimate]:
    """The means of what is a number, by name; of nothing there is none."""
    finite = {name: v[v.isfinite()] for name, v in values.items()}
    return {name: mean_of(v) for name, v in finite.items() if len(v)}
