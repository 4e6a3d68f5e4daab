"""What a student learns from: a teacher's trajectories, made once per batch of seeds.

They are kept in memory or in a cache on the disk. `make_problem` makes student, teacher and
batches of a model and settings. Shapes: B samples, N intervals of the student,
* one sample, x [B, *]. The state is float32 at least, whatever the network's own dtype.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Backend
from rewards.base import looking
from solvers.classic import Heun
from solvers.field import Condition, Field
from solvers.process import FLOW
from solvers.sampler import Sampler, SolverOptions, make_solver
from src import ranks
from src.runs import read_sealed, write_sealed
from src.seeds import randn
from training.distances import OF_FEATURES, Network, parse_terms
from training.refine import Reward
from training.settings import Settings, at_once, resolved
from training.start import fine_grid, grid_of, make_student
from training.student import Reduce, Student, Trajectories

DENOISER = "the denoiser, called with x, sigma and cond,"
SCALES = (1.0, 0.1, 0.01)  # of noises that features must tell apart, at one of these
ENTRY = re.compile(r"[0-9a-f]{40}\.pt")


@dataclass(frozen=True)
class Teacher:
    """A sampler on a fine grid, and the levels of that grid whose states are targets."""

    sampler: Sampler
    stops: tuple[float, ...]

    @torch.no_grad()
    def targets(self, slope: Field, x: Tensor) -> tuple[Tensor, ...]:
        """The states [B, *] at the stops, on the CPU, from x at the first level; no graph."""
        trajectory = self.sampler.states(slope, x)
        by_level = zip(self.sampler.sigmas[1:], trajectory, strict=True)
        kept = [state for level, state in by_level if level in self.stops]
        return torch.stack(kept).cpu().unbind()  # a GPU is waited for once


@dataclass(frozen=True)
class Cache:
    """Trajectories on the disk: one sealed file each, the oldest going when there are too many.

    What a trajectory depends on is its key and lies in the file as well. `say` hears of every
    file that is damaged, and made again. Raises ValueError where the folder cannot be used.
    """

    folder: Path
    max_bytes: int = 4 << 30
    say: Callable[[str], object] = lambda _text: None

    def __post_init__(self) -> None:
        probe = self.folder / ".writable.pt"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the teacher cache {self.folder} is a file: give a folder")
        write_sealed(probe, {})
        probe.unlink(missing_ok=True)

    def get(
        self, about: Mapping[str, Any], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The trajectory of this key, from the disk or made now; on the CPU."""
        key = json.dumps(about, sort_keys=True, allow_nan=False)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.pt"
        if path.exists():
            try:
                content = read_sealed(path)
                if content.get("key") == key and isinstance(content.get("states"), list):
                    with contextlib.suppress(FileNotFoundError):  # it may just have been dropped
                        os.utime(path)
                    return tuple(content["states"])
                self.say(f"{path} is of another run: making it again")
            except ValueError as error:
                self.say(f"{error}: making it again")
        targets = make()
        write_sealed(path, {"key": key, "states": list(targets)})
        self.evict()
        return targets

    def evict(self) -> None:
        """Drop what was not used for longest until the rest fits."""
        entries = []
        for path in self.folder.glob("*.pt"):
            if not ENTRY.fullmatch(path.name):  # half written by another rank, or not ours
                continue
            with contextlib.suppress(FileNotFoundError):  # another rank's work
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        size = sum(entry[1] for entry in entries)
        for _, bytes_, path in sorted(entries):
            if size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


@dataclass(frozen=True)
class Batches(Sequence[Trajectories]):
    """Batches by their seeds, with where the teacher takes them.

    Targets are made when first asked for, then kept in the CPU's memory; with a cache they are
    read from the disk each time instead, and take no memory. `levels` are those of the
    teacher's stops that are wanted, if not all.
    """

    start: Callable[[Sequence[int]], tuple[Field, Tensor]]  # seeds -> field, x [B, *]
    teacher: Teacher
    parts: tuple[tuple[int, ...], ...]
    about: Mapping[str, Any] = field(default_factory=dict)  # what a target depends on but seeds
    cache: Cache | None = None
    levels: tuple[float, ...] | None = None
    once: bool = False  # whether each is asked for once, and need not be kept
    kept: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.one(part) for part in self.parts[index]]
        return self.one(self.parts[index])

    def __iter__(self) -> Iterator[Trajectories]:
        return map(self.one, self.parts)

    def one(self, seeds: tuple[int, ...]) -> Trajectories:
        """The batch of some seeds, its targets on the device of x."""
        slope, x = self.start(seeds)
        if self.cache:
            about = {**self.about, "seeds": list(seeds)}
            targets = self.cache.get(about, lambda: self.teacher.targets(slope, x))
        elif self.once:
            targets = self.teacher.targets(slope, x)
        else:
            if seeds not in self.kept:
                self.kept[seeds] = self.teacher.targets(slope, x)
            targets = self.kept[seeds]
        if self.levels is not None:
            at = dict(zip(self.teacher.stops, targets, strict=True))
            targets = tuple(at[level] for level in self.levels)
        return Trajectories(slope, x, torch.stack(targets).to(x.device).unbind(), seeds)


def in_parts(seeds: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Seeds in runs of at most `size`."""
    return tuple(tuple(seeds[i : i + size]) for i in range(0, len(seeds), size))


def fingerprint(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names."""
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        total.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
        total.update(digest.digest())
    return total.hexdigest()


# --- the problem --------------------------------------------------------------------------

Conditions: TypeAlias = Callable[[Sequence[int]], Condition | None]
"""(numbers of samples) -> what the network is told of them, B rows."""


@dataclass(frozen=True)
class Model:
    """What is distilled: a network, what it is told, and what looks at its samples."""

    backend: Backend
    conditions: Conditions = lambda _numbers: None
    features: Network | None = None  # latents [B, *] -> [B, F], of what they decode to
    reward: Reward | None = None  # latents [B, *] and the samples' numbers -> [B]
    fitted_on: tuple[str, str] = ("", "")  # names of the features and of the reward
    cache: Cache | None = None
    about: Mapping[str, Any] = field(default_factory=dict)  # for the cache's key
    training: Mapping[str, Any] = field(default_factory=dict)  # more for the recipe
    reduce: Reduce = ranks.all_reduce_sum
    poll: Callable[[], object] = lambda: None  # called before each call of the network


@dataclass(frozen=True)
class Problem:
    """A student to learn, batches to learn from, and batches to judge by, on this rank."""

    settings: Settings
    model: Model
    student: Student
    learned: Batches
    validation: Batches  # ends by the teacher
    reference: Batches  # the same noise, ends by the fine solution
    judges: Batches  # other noise, to choose by; ends by the fine solution


def make_problem(model: Model, settings: Settings) -> Problem:
    """The problem of some settings, these resolved; nothing is computed yet but one small call.

    Raises ValueError where settings, schedule, guidance or network do not fit each other.
    """
    # what looks at samples may work in place: it is given copies
    looking_at = {n: on_copies(getattr(model, n)) for n in ("features", "reward")}
    model = replace(model, **looking_at)
    shape, levels = model.backend.shape, model.backend.levels
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {shape} is of no latent: give its sizes, as (4, 64, 64)")
    flow, looks = levels.process == FLOW, model.features is not None
    s = resolved(settings, flow=flow, shape=shape, features=looks)
    assert s.batch
    assert s.samples
    assert s.judges
    student = make_student(levels, s)
    sigmas, process = student.sigmas, levels.process
    finest = fine_grid(levels, s, sigmas)
    fine = Teacher(Sampler(Heun(), finest, process), sigmas[-1:])
    if not s.every:
        grid = tuple(sorted({*finest, *sigmas[1:]}, reverse=True))
    else:  # refines the student's own (EPD-Solver, arXiv:2507.14797, Sec. 3.3)
        grid = grid_of(levels, s, s.every * (len(sigmas) - 1) + 1)
        met = zip(grid[:: s.every], sigmas, strict=True)
        if s.init or not all(math.isclose(a, b, rel_tol=1e-5) for a, b in met):
            # those levels are no schedule's, or one that does not refine itself
            between = (
                a * (b / a) ** (i / s.every) for a, b in pairwise(sigmas) for i in range(s.every)
            )
            grid = (*between, sigmas[-1])
    stops = grid[s.every :: s.every] if s.every else sigmas[1:]
    solver = make_solver(s.teacher, SolverOptions(process=process))
    teacher = Teacher(Sampler(solver, grid, process), stops)
    rank, world = ranks.rank(), ranks.world_size()
    size, mine = at_once(s, world), s.batch // world

    def batches(stream: str, by: Teacher, count: int) -> Batches:
        return make_batches(model, s, stream, by, in_parts(range(rank, count, world), size))

    last = replace(teacher, stops=teacher.stops[-1:])
    validation = reference = batches("validation", last, s.validation)
    if s.every or s.teacher != "heun":
        reference = batches("validation", fine, s.validation)
    judges = batches("judge", fine, s.judges)
    firsts = range(rank * mine, s.samples, s.batch)
    parts = tuple(part for i in firsts for part in in_parts(range(i, i + mine), size))
    learned = make_batches(model, s, "distill", teacher, parts)
    learned = replace(learned, once=s.method == "gradient")
    check_answer(learned, model, s)
    return Problem(s, model, student, learned, validation, reference, judges)


def on_copies(function: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    """The same function of a copy of its first argument."""
    return function and (lambda x, *rest: function(x.clone(), *rest))


def make_batches(
    model: Model,
    settings: Settings,
    purpose: str,
    teacher: Teacher,
    parts: tuple[tuple[int, ...], ...],
) -> Batches:
    """Batches by seed, of a noise stream for each purpose; ValueError for wrong conditions."""
    backend, stream = model.backend, f"{purpose}/{settings.seed}"
    rate, shape = settings.guidance_rate, backend.shape
    assert rate is not None
    dtype = torch.promote_types(backend.dtype, torch.float32)

    def start(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        model.poll()
        cond = model.conditions(seeds)
        if not isinstance(cond, Condition | None):
            what = f"a {type(cond).__name__}, not a solvers.field.Condition or None"
            raise ValueError(f"conditions give {what}")
        pairs = [*cond.given.items(), *(cond.null or {}).items()] if cond else []
        for name, rows in pairs:
            if not isinstance(rows, Tensor) or rows.shape[:1] != (len(seeds),):
                got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(f"conditions give {name} of {got}: {len(seeds)} samples need "
                                 "as many rows")  # fmt: skip
        guided = backend.guided(rate, cond)

        def polled(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            model.poll()
            return guided(x, sigma, cond)

        noise = randn(seeds, shape, stream=stream, device=backend.device, dtype=dtype)
        return Field(polled, cond), noise * teacher.sampler.sigmas[0]

    about = {"teacher": repr(teacher), "stream": stream, "guidance_rate": rate}
    about |= {"shape": list(shape), **model.about}
    return Batches(start, teacher, parts, about, model.cache)


@torch.no_grad()
def check_answer(batches: Batches, model: Model, settings: Settings) -> None:
    """ValueError for a network, features or a reward that do not answer as they should."""
    numbers = batches.parts[0][:2]
    slope, x = batches.start(numbers)
    level = x.new_full((len(x),), batches.teacher.sampler.sigmas[0])
    before = x.clone()
    with looking(DENOISER, x):
        answer = slope.denoiser(x, level, slope.cond)
    check_finite("the denoiser", answer, tuple(x.shape))
    if not torch.equal(before, x):
        raise ValueError("the denoiser changes its x: let it work on x.clone()")
    if settings.method == "gradient":
        with torch.enable_grad(), looking(DENOISER, x):
            some = x[:1].detach().clone().requires_grad_()
            alone, _ = batches.start(numbers[:1])
            cut = not alone.denoiser(some, level[:1], alone.cond).requires_grad
        if cut:
            raise ValueError("the denoiser has no gradient (no_grad?): take --method fit")
    answer = answer.to(torch.promote_types(answer.dtype, torch.float32))  # as states are
    names = {name for _, name in terms_of(settings)}
    if names & OF_FEATURES:
        if model.features is None:
            raise ValueError(f"distance {settings.distance!r} needs its network of features")
        with looking("the network of features", answer):
            seen = [(model.features(some), len(some)) for some in (answer, answer[:1])]
            noises = [model.features(x / x.std() * scale) for scale in SCALES]
        for features, count in seen:
            check_finite("the network of features", features, (count, None))
        if len(x) > 1 and all(torch.equal(noise[0], noise[1]) for noise in noises):
            raise ValueError("the network of features gives the same for any sample")
        if settings.method == "gradient":
            check_gradient(model.features, answer)
    if "reward" in names:
        if model.reward is None:
            raise ValueError(f"distance {settings.distance!r} needs its reward")
        with looking("the reward", answer):
            scores = model.reward(answer, numbers)
        check_finite("the reward", scores, (len(x),))
        with looking("the reward", answer[:1]):
            check_finite("the reward", model.reward(answer[:1], numbers[:1]), (1,))


def check_gradient(features: Network, x: Tensor) -> None:
    """ValueError for features that carry no gradient to the samples."""
    slope, said = None, "no_grad?"
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        try:
            seen = features(x)
            if seen.requires_grad:
                (slope,) = torch.autograd.grad(seen.sum(), x, allow_unused=True)
        except (RuntimeError, TypeError) as error:  # numpy's, say
            said = str(error).splitlines()[0]
    if slope is None or not bool(slope.isfinite().all() and slope.any()):
        raise ValueError(f"the network of features has no gradient ({said}): take --method fit")


@torch.no_grad()
def check_ends(batches: Batches, judges: Batches, model: Model, settings: Settings) -> None:
    """ValueError for features or a reward that cannot look at the teacher's samples.

    Those are made here and kept for later. One sample is looked at alone where a batch has one.
    """
    names = {name for _, name in terms_of(settings)}
    alone, all_scores = 1 in {len(part) for part in (*batches.parts, *judges.parts)}, []
    for batch in (*batches, *judges) if names != {"l2"} else ():
        end, who = batch.targets[-1], f"of samples {batch.numbers[0]} to {batch.numbers[-1]}"
        if names & OF_FEATURES:
            assert model.features
            for part in (end, end[:1])[: 1 + alone]:
                with looking("the network of features", part):
                    seen = model.features(part)
                check_finite(f"the network of features, {who},", seen, (len(part), None))
        if "reward" in names:
            assert model.reward
            with looking("the reward", end):
                scores = model.reward(end, batch.numbers)
            check_finite(f"the reward, {who},", scores, (len(end),))
            all_scores.append(scores)
    if names == {"reward"}:
        every = torch.cat(all_scores)
        if len(every) > 1 and bool((every == every[0]).all()):
            raise ValueError("the reward gives the same for every sample: nothing to gain")


def check_shape(what: str, answer: object, shape: tuple[int | None, ...]) -> None:
    """ValueError for an answer that is no tensor of floats of that shape, None being any."""
    seen = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    fits = len(seen) == len(shape) and all(
        a in (b, None) for a, b in zip(shape, seen, strict=True)
    )
    if not isinstance(answer, Tensor) or not fits:
        wanted = str(shape).replace("None", "F")
        raise ValueError(f"{what} gives {seen} for {shape[0]} samples, not {wanted}")
    if not answer.is_floating_point():
        raise ValueError(f"{what} gives {answer.dtype}, which is not of floats")


def check_finite(what: str, answer: Any, shape: tuple[int | None, ...]) -> None:
    """ValueError for such an answer, and for one that is empty or has NaN."""
    check_shape(what, answer, shape)
    if not answer.numel():
        seen = tuple(answer.shape)
        raise ValueError(f"{what} gives {seen}: there is nothing in it to compare")
    if not bool(answer.isfinite().all()):
        raise ValueError(f"{what} gives numbers that are not finite")


def terms_of(settings: Settings) -> tuple[tuple[float, str], ...]:
    """The weights and names of what is to be made small."""
    assert settings.distance
    if settings.method == "gradient":
        return (1.0, settings.distance), (1.0, settings.last_distance or settings.distance)
    return parse_terms(settings.distance)
