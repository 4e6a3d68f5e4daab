"""The problem of a distillation: a model and settings -> students, teachers, batches.

Shapes: B samples, N intervals, * one latent, x [B, *].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Guide, classifier_free
from solvers import schedules
from solvers.classic import Heun
from solvers.epd import Table
from solvers.field import Condition, Denoiser, Field
from solvers.integrate import levels as as_levels
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW, Process
from solvers.sampler import Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels
from src import ranks
from src.seeds import randn
from training.descend import Reward
from training.distances import OF_FEATURES, Network, parse_terms
from training.fit import HISTORY
from training.settings import FLOW_SCHEDULES, VE_SCHEDULES, Settings, at_once, resolved
from training.student import Reduce, Student
from training.table import Form, FreeForm, MultistepForm, PublishedForm, even_table, widened
from training.teacher import Batches, Cache, Teacher, in_parts

Conditions: TypeAlias = Callable[[Sequence[int]], Condition | None]
"""(numbers of samples) -> what the network is told of them, B rows."""
OWN = "denoiser"
"""The backend of recipes where the network is the caller's own."""


@dataclass(frozen=True)
class Model:
    """What is distilled: a denoiser, what it is told, and where it is."""

    denoise: Denoiser
    levels: NoiseLevels
    shape: tuple[int, ...]  # * of one latent
    conditions: Conditions = lambda _numbers: None
    guide: Guide = classifier_free
    features: Network | None = None  # latents [B, *] -> [B, F], of what they decode to
    reward: Reward | None = None  # latents [B, *] and the samples' numbers -> [B]
    fitted_on: tuple[str, ...] = ("features",)  # names of the features and the reward
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32  # the network's; the state is float32 at least
    cache: Cache | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the cache's key
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"backend": OWN})
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more for the recipe
    reduce: Reduce = ranks.all_reduce_sum
    poll: Callable[[], object] = lambda: None  # called before each call of the network
    report: Callable[[float], object] = lambda _value: None  # hears what a refinement makes small


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


def named_levels(levels: NoiseLevels | Process | str) -> NoiseLevels:
    """The noise levels of a process by its name, or as they are."""
    if isinstance(levels, NoiseLevels):
        return levels
    process = Process(levels) if isinstance(levels, str) else levels
    ends = (0.001, 1.0) if process == FLOW else (0.002, 80.0)
    return NoiseLevels(process, *ends)


def make_problem(model: Model, settings: Settings) -> Problem:
    """The problem of some settings, these resolved; nothing is computed yet but one small call.

    Raises ValueError where settings, schedule, guidance or network do not fit each other.
    """
    if not model.shape or min(model.shape) < 1:
        raise ValueError(f"shape {model.shape} is of no latent: give its sizes, as (4, 64, 64)")
    flow, looks = model.levels.process == FLOW, model.features is not None
    settings = resolved(settings, flow=flow, shape=model.shape, features=looks)
    students = make_students(model.levels, settings)
    learned = make_teacher(model.levels, settings, list(students.values()))
    sigmas = next(iter(students.values())).sigmas
    fine = Sampler(Heun(), fine_grid(model.levels, settings, sigmas), model.levels.process)
    reference = Teacher(fine, sigmas[-1:])
    last = replace(learned, stops=learned.stops[-1:])
    rank, world = ranks.rank(), ranks.world_size()

    def batches(stream: str, teacher: Teacher, seeds: range) -> Batches:
        assert settings.batch
        return make_batches(model, settings, stream, teacher, in_parts(seeds, settings.batch))

    assert settings.judges
    seen = range(rank, settings.validation, world)
    validation = batches("validation", last, seen)
    if settings.every or settings.teacher != "heun":
        measured = batches("validation", reference, seen)
    else:
        measured = validation
    judges = batches("judge", reference, range(rank, settings.judges, world))
    learned = make_batches(model, settings, "distill", learned, my_parts(settings))
    check_answer(learned, model, settings)
    return Problem(settings, model, students, learned, validation, measured, judges)


def my_parts(settings: Settings) -> tuple[tuple[int, ...], ...]:
    """The seeds of this rank's share of every batch, in runs of what fits at once."""
    assert settings.batch
    assert settings.samples
    size, mine = at_once(settings, ranks.world_size()), settings.batch // ranks.world_size()
    starts = range(ranks.rank() * mine, settings.samples, settings.batch)
    return tuple(part for s in starts for part in in_parts(range(s, s + mine), size))


def make_batches(
    model: Model,
    settings: Settings,
    purpose: str,
    teacher: Teacher,
    parts: tuple[tuple[int, ...], ...],
) -> Batches:
    """Batches by seed, their noise from a stream of its own for each purpose."""
    stream, rate = f"{purpose}/{settings.seed}", settings.guidance_rate
    dtype = torch.promote_types(model.dtype, torch.float32)

    def start(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        model.poll()
        cond = model.conditions(seeds)
        guided = model.guide(model.denoise, rate, cond)

        def polled(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            model.poll()
            return guided(x, sigma, cond)

        noise = randn(seeds, model.shape, stream=stream, device=model.device, dtype=dtype)
        return Field(polled, cond), noise * teacher.sampler.sigmas[0]

    about = {"teacher": repr(teacher), "stream": stream, "guidance_rate": rate}
    about |= {"shape": list(model.shape), **model.about}
    return Batches(start, teacher, parts, about, model.cache)


@torch.no_grad()
def check_answer(batches: Batches, model: Model, settings: Settings) -> None:
    """ValueError for a network, features or a reward that do not answer as they should."""
    numbers = batches.parts[0][:2]
    slope, x = batches.start(numbers)
    answer = slope.denoiser(
        x, x.new_full((len(x),), batches.teacher.sampler.sigmas[0]), slope.cond
    )
    check_finite("the denoiser", answer, tuple(x.shape))
    names = {name for _, name in terms_of(settings)}
    if names & OF_FEATURES:
        if model.features is None:
            raise ValueError(f"the distance {settings.distance!r} needs its network of features")
        check_finite("the network of features", looked(model.features, answer), (len(x), None))
    if "reward" in names:
        if model.reward is None:
            raise ValueError(f"the distance {settings.distance!r} needs its reward")
        check_finite("the reward", looked(model.reward, answer, numbers), (len(x),))


def looked(look: Callable[..., Tensor], x: Tensor, *more: Sequence[int]) -> Tensor:
    """What features or a reward make of latents; ValueError where they cannot look at them."""
    try:
        return look(x, *more)
    except (RuntimeError, TypeError, IndexError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"features or reward cannot look at {tuple(x.shape)}: {said}") from error


def check_finite(what: str, answer: object, shape: tuple[int | None, ...]) -> None:
    """ValueError for an answer that is no tensor of that shape, None being any, or has NaN."""
    seen = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    fits = isinstance(seen, tuple) and len(seen) == len(shape)
    if not fits or any(a not in (b, None) for a, b in zip(shape, seen, strict=True)):
        wanted = str(shape).replace("None", "F")
        raise ValueError(f"{what} gives {seen} for {shape[0]} samples, not {wanted}")
    assert isinstance(answer, Tensor)
    if not bool(answer.isfinite().all()):
        raise ValueError(f"{what} gives numbers that are not finite")


def terms_of(settings: Settings) -> tuple[tuple[float, str], ...]:
    """The weights and names of what a fit is to make small."""
    assert settings.distance
    names = (settings.distance, settings.last_distance or settings.distance)
    if settings.method == "gradient":
        return tuple((1.0, name) for name in names)
    return parse_terms(settings.distance)


# --- students and teachers ----------------------------------------------------------------


def grid_of(levels: NoiseLevels, settings: Settings, name: str, count: int) -> tuple[float, ...]:
    """A grid [count] by name; the exponent is that of the settings' own schedule."""
    low, high, flow = settings.sigma_min, settings.sigma_max, levels.process == FLOW
    rho = settings.schedule_rho if name == settings.schedule else None
    if not flow:
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
    s, flow = settings, levels.process == FLOW
    assert s.schedule
    assert s.num_steps
    several = FLOW_SCHEDULES if flow else VE_SCHEDULES
    base, (name, _) = None, s.base
    if not s.multistep:
        order = s.max_order if name not in ("euler", "heun", "dpm2") else None
        options = SolverOptions(order, levels.process, s.predict_x0, s.lower_order_final)
        base = make_solver(name, options)
    students = {}
    for schedule in several if s.try_schedules else (s.schedule,):
        sigmas = as_levels(grid_of(levels, s, schedule, s.num_steps))
        if s.init:
            sigmas = load_predictor(find_predictor(s.init)).sampler(levels).sigmas
        grid = bool(s.learn_grid) and s.num_steps > 2
        student = Student(sigmas, form_of(s), base, levels.process, bool(s.afs), grid)
        student.holding(start_of(student, s))  # EPD refuses what cannot be its base
        students[schedule] = student
    return students


def form_of(settings: Settings) -> Form:
    """How the table is written as free numbers."""
    s = settings
    assert s.num_steps
    shape, time = (s.num_steps - 1, s.points), s.scale_time != 0
    if s.multistep:
        return MultistepForm(*shape, HISTORY, time, bool(s.afs))
    if s.scale_dir is None:
        return FreeForm(*shape, time)
    return PublishedForm(*shape, s.scale_dir, s.scale_time or 0.0, s.fcn, s.scale_time_ends)


def start_of(student: Student, settings: Settings) -> Table:
    """The table that a gradient starts from: one by hand, or that of another predictor."""
    if settings.init:
        return widened(load_predictor(find_predictor(settings.init)).table, settings.points)
    history = HISTORY if student.base is None else 0
    return even_table(student.intervals, settings.points, history)


def make_teacher(levels: NoiseLevels, settings: Settings, students: Sequence[Student]) -> Teacher:
    """The teacher of all students at once.

    With M its grid refines that of the student (EPD-Solver, arXiv:2507.14797, Sec. 3.3), else it
    is that of the fine solution with the levels of all students besides.
    """
    solver = make_solver(settings.teacher, SolverOptions(process=levels.process))
    sigmas = students[0].sigmas
    if settings.every:
        assert settings.schedule
        count = settings.every * (len(sigmas) - 1) + 1
        fine = grid_of(levels, settings, settings.schedule, count)
        stops = fine[settings.every :: settings.every]
    else:
        levels_of_all = {level for student in students for level in student.sigmas[1:]}
        fine = (*fine_grid(levels, settings, sigmas), *levels_of_all)
        fine, stops = (tuple(sorted({*g}, reverse=True)) for g in (fine, levels_of_all))
    return Teacher(Sampler(solver, fine, levels.process), stops)
