"""The problem of a distillation: a model and settings -> students, teachers, batches.

Shapes: B samples, N intervals, * one latent, x [B, *].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Backend
from solvers import schedules
from solvers.classic import Heun
from solvers.epd import Table
from solvers.field import Condition, Field
from solvers.integrate import levels as as_levels
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW
from solvers.sampler import Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels
from src import ranks
from src.seeds import randn
from training.descend import Reward
from training.distances import OF_FEATURES, Network, parse_terms
from training.settings import FLOW_SCHEDULES, VE_SCHEDULES, Settings, at_once, resolved
from training.student import Reduce, Student
from training.table import FreeForm, MultistepForm, PublishedForm, widened
from training.teacher import Batches, Cache, Teacher, in_parts

Conditions: TypeAlias = Callable[[Sequence[int]], Condition | None]
"""(numbers of samples) -> what the network is told of them, B rows."""


@dataclass(frozen=True)
class Model:
    """What is distilled: a network, what it is told, and what looks at its samples."""

    backend: Backend
    conditions: Conditions = lambda _numbers: None
    features: Network | None = None  # latents [B, *] -> [B, F], of what they decode to
    reward: Reward | None = None  # latents [B, *] and the samples' numbers -> [B]
    fitted_on: tuple[str, ...] = ("features",)  # names of the features and the reward
    cache: Cache | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the cache's key
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more for the recipe
    reduce: Reduce = ranks.all_reduce_sum
    poll: Callable[[], object] = lambda: None  # called before each call of the network


@dataclass(frozen=True)
class Problem:
    """Students to learn, batches to learn from, and batches to judge by, on this rank."""

    settings: Settings
    model: Model
    students: Mapping[str, Student]  # by the name of their schedule, the usual one first
    learned: Batches
    validation: Batches  # ends by the teacher
    reference: Batches  # the same noise, ends by the fine solution
    judges: Batches  # other noise, to choose by; ends by the fine solution

    @property
    def student(self) -> Student:
        """The usual one."""
        return next(iter(self.students.values()))


def make_problem(model: Model, settings: Settings) -> Problem:
    """The problem of some settings, these resolved; nothing is computed yet but one small call.

    Raises ValueError where settings, schedule, guidance or network do not fit each other.
    """
    shape, levels = model.backend.shape, model.backend.levels
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {shape} is of no latent: give its sizes, as (4, 64, 64)")
    flow, looks = levels.process == FLOW, model.features is not None
    s = resolved(settings, flow=flow, shape=shape, features=looks)
    assert s.batch
    assert s.samples
    assert s.judges
    students = make_students(levels, s)
    teacher = make_teacher(levels, s, list(students.values()))
    sigmas = next(iter(students.values())).sigmas
    fine = Teacher(Sampler(Heun(), fine_grid(levels, s, sigmas), levels.process), sigmas[-1:])
    rank, world = ranks.rank(), ranks.world_size()

    def batches(stream: str, by: Teacher, count: int, size: int = s.batch) -> Batches:
        return make_batches(model, s, stream, by, in_parts(range(rank, count, world), size))

    last = replace(teacher, stops=teacher.stops[-1:])
    validation = reference = batches("validation", last, s.validation)
    if s.every or s.teacher != "heun":
        reference = batches("validation", fine, s.validation)
    judges = batches("judge", fine, s.judges)
    size, mine = at_once(s, world), s.batch // world
    firsts = range(rank * mine, s.samples, s.batch)
    parts = tuple(part for i in firsts for part in in_parts(range(i, i + mine), size))
    learned = make_batches(model, s, "distill", teacher, parts)
    check_answer(learned, model, s)
    return Problem(s, model, students, learned, validation, reference, judges)


def make_batches(
    model: Model,
    settings: Settings,
    purpose: str,
    teacher: Teacher,
    parts: tuple[tuple[int, ...], ...],
) -> Batches:
    """Batches by seed, their noise from a stream of its own for each purpose."""
    backend, stream = model.backend, f"{purpose}/{settings.seed}"
    rate, shape = settings.guidance_rate, backend.shape
    dtype = torch.promote_types(backend.dtype, torch.float32)

    def start(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        model.poll()
        cond = model.conditions(seeds)
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
    answer = slope.denoiser(x, level, slope.cond)
    check_finite("the denoiser", answer, tuple(x.shape))
    names = {name for _, name in terms_of(settings)}
    try:
        if names & OF_FEATURES:
            if model.features is None:
                raise ValueError(f"distance {settings.distance!r} needs its network of features")
            check_finite("the network of features", model.features(answer), (len(x), None))
        if "reward" in names:
            if model.reward is None:
                raise ValueError(f"distance {settings.distance!r} needs its reward")
            check_finite("the reward", model.reward(answer, numbers), (len(x),))
    except (RuntimeError, TypeError, IndexError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"features or reward cannot look at {tuple(x.shape)}: {said}") from error


def check_finite(what: str, answer: object, shape: tuple[int | None, ...]) -> None:
    """ValueError for an answer that is no tensor of that shape, None being any, or has NaN."""
    seen = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    fits = len(seen) == len(shape) and all(
        a in (b, None) for a, b in zip(shape, seen, strict=True)
    )
    if not isinstance(answer, Tensor) or not fits:
        wanted = str(shape).replace("None", "F")
        raise ValueError(f"{what} gives {seen} for {shape[0]} samples, not {wanted}")
    if not bool(answer.isfinite().all()):
        raise ValueError(f"{what} gives numbers that are not finite")


def terms_of(settings: Settings) -> tuple[tuple[float, str], ...]:
    """The weights and names of what is to be made small."""
    assert settings.distance
    if settings.method == "gradient":
        return (1.0, settings.distance), (1.0, settings.last_distance or settings.distance)
    return parse_terms(settings.distance)


# --- students and teachers ----------------------------------------------------------------


def grid_of(levels: NoiseLevels, settings: Settings, name: str, count: int) -> tuple[float, ...]:
    """A grid [count] by name; the exponent is that of the settings' own schedule."""
    low, high = settings.sigma_min, settings.sigma_max
    rho = settings.schedule_rho if name == settings.schedule else None
    if levels.process != FLOW:
        ends = {"sigma_min": low or levels.sigma_min, "sigma_max": high or levels.sigma_max}
        return tuple(replace(levels, **ends).grid(name, count, rho=rho).tolist())
    first, *inner, last = levels.grid("flowmatch", count).tolist()
    low, high = last if low is None else low, first if high is None else high
    if name == "logit":
        ends = torch.tensor([min(high, 1 - low), low], dtype=torch.float64).logit()
        way = torch.linspace(0, 1, count, dtype=torch.float64)[1:-1]
        inner = torch.lerp(ends[0], ends[1], way).sigmoid().tolist()
    elif (low, high) != (last, first):
        inner = [low + (s - last) / (first - last) * (high - low) for s in inner]
    return (high, *inner, low)


def fine_grid(
    levels: NoiseLevels, settings: Settings, sigmas: tuple[float, ...]
) -> tuple[float, ...]:
    """The grid of the fine solution between the same ends: polynomial 7, or the flow's own."""
    assert settings.fine_steps
    if levels.process == FLOW:
        grid = levels.grid("flowmatch", settings.fine_steps).tolist()
        return (sigmas[0], *grid[1:-1], sigmas[-1])
    return tuple(schedules.polynomial(settings.fine_steps, sigmas[-1], sigmas[0]).tolist())


def make_students(levels: NoiseLevels, settings: Settings) -> dict[str, Student]:
    """A student for every schedule to be tried; ValueError for a base that cannot serve."""
    s, (name, _), base = settings, settings.base, None
    assert s.schedule
    assert s.num_steps
    shape, time = (s.num_steps - 1, s.points), s.scale_time != 0
    if s.multistep:
        form = MultistepForm(*shape, time, bool(s.afs))
    else:
        order = s.max_order if name not in ("euler", "heun", "dpm2") else None
        options = SolverOptions(order, levels.process, s.predict_x0, s.lower_order_final)
        base = make_solver(name, options)
        form = FreeForm(*shape, time)
        if s.scale_dir is not None:
            reach = s.scale_dir, s.scale_time or 0.0
            form = PublishedForm(*shape, *reach, s.fcn, s.scale_time_ends)
    several = FLOW_SCHEDULES if levels.process == FLOW else VE_SCHEDULES
    students = {}
    for schedule in several if s.try_schedules else (s.schedule,):
        sigmas = as_levels(grid_of(levels, s, schedule, s.num_steps))
        if s.init:
            sigmas = load_predictor(find_predictor(s.init)).sampler(levels).sigmas
        grid = bool(s.learn_grid) and s.num_steps > 2
        student = Student(sigmas, form, base, levels.process, bool(s.afs), grid)
        student.holding(start_of(student, s))  # EPD refuses what cannot be its base
        students[schedule] = student
    return students


def start_of(student: Student, settings: Settings) -> Table:
    """The table that a gradient starts from: one by hand, or that of another predictor."""
    if settings.init:
        return widened(load_predictor(find_predictor(settings.init)).table, settings.points)
    return student.even_table()


def make_teacher(levels: NoiseLevels, settings: Settings, students: Sequence[Student]) -> Teacher:
    """The teacher of all students at once.

    With M its grid refines that of the student (EPD-Solver, arXiv:2507.14797, Sec. 3.3), else it
    is that of the fine solution with the levels of all students besides.
    """
    solver = make_solver(settings.teacher, SolverOptions(process=levels.process))
    sigmas, every = students[0].sigmas, settings.every
    if every:
        assert settings.schedule
        fine = grid_of(levels, settings, settings.schedule, every * (len(sigmas) - 1) + 1)
        stops = fine[every::every]
    else:
        own = {level for student in students for level in student.sigmas[1:]}
        fine = {*fine_grid(levels, settings, sigmas), *own}
        fine, stops = (tuple(sorted(grid, reverse=True)) for grid in (fine, own))
    return Teacher(Sampler(solver, fine, levels.process), stops)
