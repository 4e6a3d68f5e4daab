"""Images by samplers, and their scores, on all ranks: rollouts and evaluations.

B images of a call, b of them this rank's. Which prompts and noises a step uses are pure functions
of the seed and the position: nothing depends on the number of ranks, so that a run goes on under
another one. A position is the place of a prompt in the stream.
"""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Backend, Prompt
from backends.generate import Job, generate
from rewards.base import looking
from solvers.classic import Heun
from solvers.predictor import named_tensors
from solvers.recipe import Recipe
from solvers.sampler import Sampler
from src import ranks
from src.runs import Stop
from src.seeds import generator
from src.stats import mean_of
from training.ppo.objectives import diversity, frechet
from training.ppo.policy import FREE, WIDTH, Draws, Start

Scorer: TypeAlias = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""Images [B, 3, H, W] in [0, 1] and their B prompts -> the scores [B] of every reward, by name.

`functools.partial(rewards.scorer.score_all, rewards, batch=...)` is one. A ValueError stands for
images that have no score: they are then scored one by one.
"""
Scoring: TypeAlias = Callable[[Tensor, Sequence[Job]], Mapping[str, Tensor]]
"""The same of jobs; a result may be [B, F], such as features."""
PARTS = ("text", "denoise", "decode", "reward")
WHOLE = ""
"""The name of the column that says whether an image is one."""
Columns: TypeAlias = list[tuple[int, str, Tensor]]
"""The row of the first image, a name, and the scores [b] or [b, F]."""
NUDGE, NUDGED, LARGEST = 0.01, 4, 0.3
"""How far a number is moved to see what it does, in how many images, and how far it ever is."""
FINE = 4
"""Steps of the fine solution in each interval of a table's grid."""


def thumbnails(images: Tensor) -> Tensor:
    """Images [B, C, H, W] made small, as features [B, F]."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 16).flatten(1)


@dataclass(frozen=True)
class Task:
    """A predictor's sampler to start from, the model that it samples with, and what judges it.

    Raises ValueError for no prompts, fewer than two held-out prompts, a text that is in both,
    and batches below 1. Classes may be in both: their noises are others.
    """

    backend: Backend
    sampler: Sampler  # its table is the distilled one
    recipe: Recipe  # of that table; that of the exports
    score: Scorer
    reward: str  # the name, of those that `score` gives, that is trained on
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]  # evaluated on, never trained on
    judges: Mapping[str, Scorer] = field(default_factory=dict)  # more, at evaluations alone
    features: Callable[[Tensor], Tensor] = thumbnails  # images -> [B, F], for sets and the pull
    seed: int = 0
    batch: int = 16  # images denoised at once on a rank
    decode_batch: int = 8  # latents decoded at once
    points_chunk: int | None = None  # points of a call evaluated at once, where memory is short
    about: Mapping[str, Any] = field(default_factory=dict)  # what else scores hang on, by key

    def __post_init__(self) -> None:
        if not self.prompts or len(self.held_out) < 2:
            count = f"{len(self.prompts)} and {len(self.held_out)}"
            raise ValueError(f"training needs prompts and 2 or more held-out ones, not {count}")
        both = {text for text in self.held_out if isinstance(text, str)} & set(self.prompts)
        if both:  # of classes there are few: there, only noises are held out
            raise ValueError(f"{sorted(map(str, both))[0]!r} is trained on and held out: drop one")
        if self.batch < 1 or self.decode_batch < 1:
            raise ValueError(f"batch {self.batch}, decode_batch {self.decode_batch}: 1 or more")


# --- which images -------------------------------------------------------------------------


def prompt_at(prompts: Sequence[Prompt], seed: int, position: int) -> Prompt:
    """The prompt at a position of the endless stream: the list, shuffled anew in every round."""
    around, place = divmod(position, len(prompts))
    order = torch.randperm(len(prompts), generator=generator(seed, f"prompts/{around}"))
    return prompts[int(order[place])]


def noise_seed(seed: int, purpose: str) -> int:
    """A seed in 0, ..., 2^63 - 1 for the first noise of a purpose."""
    digest = hashlib.blake2b(f"{seed}/noise/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_jobs(
    prompts: Sequence[Prompt], seed: int, step: int, *, count: int, k: int, grouping: str
) -> tuple[list[Job], list[str]]:
    """The `count` images of step `step` (from 0), prompt by prompt, k of each, and their streams.

    A stream is of the random numbers that an image's table hangs on. With `crn` the k images of a
    prompt share their first noise; else each has its own.
    """
    jobs, streams = [], []
    for position in range(step * (count // k), (step + 1) * (count // k)):
        prompt = prompt_at(prompts, seed, position)
        for sample in range(k):
            noise = f"{position}" if grouping == "crn" else f"{position}/{sample}"
            jobs.append(Job(noise_seed(seed, noise), prompt))
            streams.append(f"table/{step}/{position}/{sample}")
    return jobs, streams


def fixed_jobs(prompts: Sequence[Prompt], seed: int, count: int) -> list[Job]:
    """The images that evaluations make: prompts in their order, again with other noise.

    Their noise is apart from that of training.
    """
    return [
        Job(noise_seed(seed, f"held-out/{i}"), prompts[i % len(prompts)]) for i in range(count)
    ]


# --- time ---------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by what they were spent on; of a GPU by its own events, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """The time, or an event that will tell it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count what happens meanwhile."""
        before = self.now()
        yield
        self.spans.append((part, before, self.now()))

    def seconds(self) -> dict[str, float]:
        """The sums by part; `denoise` is less what is within it."""
        total: dict[str, float] = defaultdict(float)
        if self.on_gpu:
            torch.cuda.synchronize()
        for part, before, after in self.spans:
            spent = before.elapsed_time(after) / 1000 if self.on_gpu else after - before
            total[part] += spent
            total["denoise"] -= spent if part in ("text", "decode") else 0.0
        return {part: total[part] for part in PARTS}


def timed(backend: Backend, clock: Stopwatch, decode_batch: int) -> Backend:
    """The backend, its ends timed; it decodes so many latents at once."""

    def encode(prompts: Sequence[Prompt]) -> Any:
        with clock.on("text"):
            return backend.encode(prompts)

    def decode(latents: Tensor) -> Tensor:
        with clock.on("decode"):
            return torch.cat([backend.decode(part) for part in latents.split(decode_batch)])

    return replace(backend, encode=encode, decode=decode)


# --- images and scores --------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """What B images scored, in their order, on every rank."""

    scores: dict[str, Tensor]  # [B] or [B, F] in float64, NaN where there is none
    reasons: tuple[tuple[str, str], ...]  # why not: which score or scoring, and what it said
    seconds: dict[str, float]  # of the slowest rank, by part

    def reason(self, *names: str) -> str:
        """Why an image has no score of these names."""
        begins = tuple(f"{name} " for name in names)  # as a part of a sum says
        own = (why for n, why in self.reasons if n in (*names, WHOLE) or why.startswith(begins))
        return next(own, f"no score is called {names[0]}")

    def lacking(self, *names: str) -> dict[str, str]:
        """Of these names and those that there are, the ones without any score, and why."""
        every = dict.fromkeys((*names, *self.scores))
        there = {n for n, values in self.scores.items() if bool(values.isfinite().any())}
        return {name: self.reason(name) for name in every if name not in there}

    def needed(self, *names: str) -> dict[str, Tensor]:
        """All scores; ValueError where no image has one of these names."""
        lacking = self.lacking(*names)
        for name in (name for name in names if name in lacking):
            raise ValueError(f"no image could be scored: {lacking[name]}")
        return self.scores


def rows_of(sampler: Sampler, images: slice) -> Sampler:
    """The sampler with its tables' and grids' rows of some images; [N, K] are all images'."""
    solver: Any = sampler.solver
    table = getattr(solver, "table", None)
    if table is not None:
        cut = {name: t[images] for name, t in named_tensors(table).items() if t.ndim == 3}
        sampler = replace(sampler, solver=replace(solver, table=replace(table, **cut)))
    return sampler if sampler.grids is None else replace(sampler, grids=sampler.grids[images])


def batches(
    task: Task, sampler: Sampler, jobs: Sequence[Job], clock: Stopwatch, stop: Stop
) -> Iterator[tuple[Sequence[Job], Tensor, Tensor]]:
    """The jobs, latents and images of each batch; tables [B, N, K] have a row for each job."""
    backend = timed(task.backend, clock, task.decode_batch)
    for start in range(0, len(jobs), task.batch):
        stop.poll()
        part = jobs[start : start + task.batch]
        own, size = rows_of(sampler, slice(start, start + len(part))), len(part)
        with clock.on("denoise"):
            batch = next(generate(backend, own, part, batch=size, points_chunk=task.points_chunk))
        yield part, batch.latents, batch.images


def images_of(task: Task, sampler: Sampler, jobs: Sequence[Job]) -> Tensor:
    """The images of jobs, on this rank alone."""
    clock = Stopwatch(task.backend.device)
    return torch.cat([images for _, _, images in batches(task, sampler, jobs, clock, Stop())])


@torch.no_grad()
def measured_unit(
    task: Task, start: Start, effect: float, stop: Stop, say: Callable[[str], object]
) -> Tensor:
    """How far each Gaussian number moves by a draw of 1, [N, S].

    The free numbers of multistep tables differ by orders of magnitude in what they do: each moves
    so far that WIDTH of it changes the end of a trajectory by `effect` of its spread. `say` hears
    how many trajectories that takes, on every rank. Raises Stopped where a signal asks for it.
    """
    names = [(name, k) for name, wide in start.columns.items() for k in range(wide)]
    columns = [s for s, (name, _) in enumerate(names) if name in FREE]
    places = [(n, s) for n in range(len(start.unit)) for s in columns]
    if not places:
        return start.unit
    gauss = start.unit.new_zeros(1 + len(places), *start.unit.shape)
    for i, (n, s) in enumerate(places, 1):
        name, k = names[s]
        at_end = name == "r" and start.table.r[n, k].item() + NUDGE > 1  # r is 1 at most
        gauss[i, n, s] = -NUDGE if at_end else NUDGE
    count = NUDGED * len(gauss)
    say(f"sampling {count} times, undecoded, to see what each of {len(places)} free numbers does")
    undecoded = replace(task.backend, decode=lambda latents: latents)
    jobs = [Job(noise_seed(task.seed, f"effect/{i}"), task.prompts[0]) for i in range(NUDGED)]
    still = {name: a / a.sum(-1, keepdim=True) for name, a in start.alpha.items()}
    many = {name: rows.expand(len(gauss) * NUDGED, *rows.shape) for name, rows in still.items()}
    sampler = start.sampler_of(Draws(many, gauss.repeat_interleave(NUDGED, 0)))
    clock = Stopwatch(task.backend.device)
    bare = replace(task, backend=undecoded)
    parts = [x for _, x, _ in batches(bare, sampler, jobs * len(gauss), clock, stop)]
    ends = torch.cat(parts).double().cpu().reshape(len(gauss), -1)
    moved = (ends[1:] - ends[:1]).square().mean(1).sqrt() / NUDGE
    unit = start.unit.clone()
    for (n, s), by in zip(places, (effect * ends[0].std() / moved).tolist(), strict=True):
        unit[n, s] = min(by, LARGEST) / WIDTH if math.isfinite(by) else 0.0
    return unit


def score_jobs(
    task: Task,
    sampler: Sampler,
    jobs: Sequence[Job],
    scorings: Mapping[str, Scoring],
    stop: Stop,
) -> Scored:
    """All jobs' scores, on every rank; each rank makes every n-th image.

    A scoring that fails costs no other one its scores; why it did is kept under its name. Raises
    Stopped, on all ranks, where a signal asks for it.
    """
    own, mine = rows_of(sampler, slice(ranks.rank(), None, ranks.world_size())), ranks.share(jobs)
    clock, first = Stopwatch(task.backend.device), 0
    columns: Columns = []
    reasons: list[tuple[str, str]] = []
    for part, _, images in batches(task, own, mine, clock, stop):
        with clock.on("reward"):
            columns.append((first, WHOLE, images.flatten(1).isfinite().all(1)))
            shown = images.nan_to_num(0.0, 0.0, 0.0)
            for name, scoring in scorings.items():
                columns += singly(name, scoring, shown, part, first, reasons)
        first += len(part)
    stop.agree()
    gathered = ranks.of_each_rank((on_host(columns, len(mine), reasons), clock.seconds()))
    why = tuple(reason for (_, some), _ in gathered for reason in some)
    scores: dict[str, Tensor] = {}
    for rank, ((part, _), _) in enumerate(gathered):
        for name, values in part.items():
            empty = values.new_full((len(jobs), *values.shape[1:]), math.nan)
            scores.setdefault(name, empty)[rank :: len(gathered)] = values
    slowest = {part: max(seconds[part] for _, seconds in gathered) for part in PARTS}
    return Scored(scores, why, slowest)


def singly(
    name: str,
    scoring: Scoring,
    images: Tensor,
    jobs: Sequence[Job],
    first: int,
    reasons: list[tuple[str, str]],
) -> Columns:
    """The scores of images from row `first` on; where all at once have none, of each alone."""
    try:
        return [(first, column, values) for column, values in scoring(images, jobs).items()]
    except ValueError as error:
        if len(images) == 1:
            reasons.append((name, str(error)))
            return []
    ones = ((slice(i, i + 1), first + i) for i in range(len(jobs)))
    parts = (singly(name, scoring, images[one], jobs[one], row, reasons) for one, row in ones)
    return [column for part in parts for column in part]


def on_host(
    columns: Columns, count: int, reasons: list[tuple[str, str]]
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The scores of `count` images on the CPU in float64: a rollout's one wait for a GPU.

    NaN where an image is none, or has no score; why not is added to the reasons.
    """
    if not columns:  # fewer images than ranks
        return {}, reasons
    block = torch.cat([values.flatten().float() for *_, values in columns]).cpu().double()
    pieces = block.split([values.numel() for *_, values in columns])
    scores: dict[str, Tensor] = {}
    whole = torch.zeros(count, dtype=torch.bool)
    for (first, name, like), piece in zip(columns, pieces, strict=True):
        rows, values = slice(first, first + len(like)), piece.reshape(like.shape)
        finite = piece.reshape(len(like), -1).isfinite().all(1)
        if name == WHOLE:
            whole[rows] = piece > 0
            continue
        bad = values[whole[rows] & ~finite].reshape(-1, values[0].numel())
        reasons += [(name, f"{name} gave {v:g}") for v in bad[:, 0].tolist()]
        empty = piece.new_full((count, *like.shape[1:]), math.nan)
        good = (whole[rows] & finite).reshape(-1, *[1] * (like.ndim - 1))
        scores.setdefault(name, empty)[rows] = values.where(good, math.nan)
    why = "the image holds NaN or infinity: try dtype float32"
    reasons += [(WHOLE, why)] * int((~whole).sum())
    return scores, reasons


# --- evaluations --------------------------------------------------------------------------


def by_prompt(scorer: Scorer) -> Scoring:
    """A scorer of texts as one of jobs."""

    def scoring(images: Tensor, jobs: Sequence[Job]) -> Mapping[str, Tensor]:
        texts = ["" if job.prompt is None else str(job.prompt) for job in jobs]
        return scorer(images.expand(-1, 3, -1, -1), texts)

    return scoring


@torch.no_grad()
def seen(task: Task, images: Tensor) -> Tensor:
    """The features [B, F] of images; ValueError where they are of another shape, or no floats."""
    features = task.features(images)
    shape = list(features.shape) if isinstance(features, Tensor) else [type(features).__name__]
    if len(shape) != 2 or shape[0] != len(images) or not shape[1]:
        said = f"must return [{len(images)}, F], not {shape}"
        raise ValueError(f"the function of ppo.features {said}")
    if not features.is_floating_point():
        raise ValueError(f"the function of ppo.features must return floats, not {features.dtype}")
    return features.to(images.device)


@torch.no_grad()
def check_features(task: Task) -> None:
    """ValueError where a function of features cannot look at what the model decodes to."""
    backend = task.backend
    dtype = torch.promote_types(backend.dtype, torch.float32)
    images = backend.decode(torch.zeros(2, *backend.shape, device=backend.device, dtype=dtype))
    with looking("ppo.features", images):
        seen(task, images)


def pull_to_fine(task: Task) -> Scoring:
    """`pull`, how far images are in features from the fine solution; ValueError as `seen` has."""

    def pull(images: Tensor, jobs: Sequence[Job]) -> Mapping[str, Tensor]:
        distinct = list(dict.fromkeys(jobs))
        fine = seen(task, images_of(task, fine_sampler(task.sampler), distinct))
        target = fine[[distinct.index(job) for job in jobs]]
        return {"pull": (seen(task, images) - target).square().mean(1).sqrt()}

    return pull


def fine_sampler(sampler: Sampler) -> Sampler:
    """The fine solution: Heun on the grid with FINE steps, even in log sigma, in each interval."""
    levels = [level for level in sampler.sigmas if level > 0]
    between = [a * (b / a) ** (i / FINE) for a, b in pairwise(levels) for i in range(FINE)]
    rate = sampler.guidance_rate
    return Sampler(Heun(), (*between, levels[-1]), sampler.process, guidance_rate=rate)


def features_scoring(task: Task) -> Scoring:
    """`features` [B, F] of images; ValueError as `seen` has."""
    return lambda images, _jobs: {"features": seen(task, images)}


def features_of(task: Task, sampler: Sampler, jobs: Sequence[Job], stop: Stop) -> Tensor:
    """The features [E, F] of images by one sampler, on every rank; ValueError if none has any."""
    scorings = {"features": features_scoring(task)}
    return score_jobs(task, sampler, jobs, scorings, stop).needed("features")["features"]


def held_out_scores(
    task: Task,
    sampler: Sampler,
    jobs: Sequence[Job],
    stop: Stop,
    fine: Tensor | None = None,
    watched: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The scores [E] of held-out images by one sampler, on every rank, by reward.

    With the features `fine` [E, F] of the fine solution's also `diversity` [E], how far an image
    is in features from the others of its prompt, and `frechet` [1], the distance of the sets.
    Also why rewards and judges have no score of any image, by their names.

    Raises ValueError where no image has the reward that is trained on, or the one `watched`.
    """
    needed = [task.reward, watched or task.reward]
    scorers = {task.reward: task.score, **task.judges}
    scorings = {name: by_prompt(scorer) for name, scorer in scorers.items()}
    if fine is not None:
        scorings["features"] = features_scoring(task)
        needed.append("features")
    scored = score_jobs(task, sampler, jobs, scorings, stop)
    scores, lacking = scored.needed(*needed), scored.lacking(*scorers)
    if fine is None:
        return scores, lacking
    points = scores.pop("features")
    spread = diversity(points, [job.prompt for job in jobs])
    return scores | {"diversity": spread, "frechet": frechet(points, fine)[None]}, lacking


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
