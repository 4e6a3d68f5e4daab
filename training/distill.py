"""Distillation: a denoiser in, a predictor of few sequential calls out.

Shapes: B samples, N intervals, K points, P free numbers, * one latent, x [B, *].
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Guide, classifier_free
from solvers import schedules
from solvers.classic import Heun
from solvers.epd import EPD, ParallelMultistep, Table
from solvers.field import Condition, Denoiser, Field
from solvers.integrate import levels as as_levels
from solvers.predictor import Predictor, find_predictor, load_predictor, validate
from solvers.process import FLOW, Process, process_named
from solvers.sampler import Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels
from src import ranks
from src.seeds import randn
from training.descend import DescendOptions, Lens, Reward, descend
from training.distances import OF_FEATURES, Network, distance_named, parse_terms
from training.fit import HISTORY, FitOptions, fit
from training.gradient import GradientOptions, Learner, checkpointed
from training.refine import ROBUST, RefineOptions, enough, gauss_newton
from training.settings import FLOW_SCHEDULES, VE_SCHEDULES, Settings, at_once, recipe_of, resolved
from training.student import Batch, Reduce, Student, rmse
from training.table import Form, FreeForm, MultistepForm, PublishedForm, even_table, widened
from training.teacher import Batches, Cache, Teacher, in_parts

Conditions: TypeAlias = Callable[[Sequence[int]], Condition | None]
"""(numbers of samples) -> what the network is told of them, B rows."""
ROBUSTLY, BY = "refine, robust first", "refine by "
"""What a fit calls its refinements."""
Tick: TypeAlias = tuple[str, dict[str, float]]
"""What was done, and its figures by name."""
OWN = "denoiser"
"""The backend of recipes where the network is the caller's own."""
PARTS = (-0.9, -0.45, 0.0, 0.45, 0.9)
"""Of their reach, where a fit tries time scales."""


def distill(
    denoiser: Denoiser,
    levels: NoiseLevels | Process | str,
    *,
    shape: Sequence[int],
    conditions: Conditions = lambda _numbers: None,
    settings: Settings | None = None,
    features: Network | None = None,
    reward: Reward | None = None,
    report: Callable[[str, float], object] = lambda _what, _error: None,
) -> Predictor:
    """A predictor that samples `denoiser` in a few sequential calls.

    `denoiser(x [B, *shape], sigma [B], cond)` estimates the clean sample. `levels` are the noise
    levels that it knows, or "ve" (x0 + sigma eps, 0.002 to 80) or "flow" ((1 - sigma) x0 +
    sigma eps, as x - sigma v of a velocity v, 0.001 to 1). `conditions` makes what it is told as
    `cond`, and with guidance also what "nothing" is. `features` (latents [B, *], to be decoded
    first where a decoder stands behind them -> [B, F]) and `reward` (latents [B, *] and the
    samples' numbers -> [B], more is better) are for the distances that need them.

    By default every schedule is fitted greedily (Gram matrices over positions, no gradient), the
    best is refined end to end with its levels, and all choices are made on noises of their own.
    `report("fit time_uniform", error)` hears of the way; errors are root mean squares to a Heun
    solution of `fine_steps` levels.

    Raises ValueError for settings that cannot be served, and for a network that gives NaN.
    """
    settings = settings or Settings()
    model = Model(denoiser, named_levels(levels), tuple(shape), conditions, device=settings.device)
    problem = make_problem(replace(model, features=features, reward=reward), settings)
    state: dict[str, Any] = {}
    for what, metrics in learn(problem, state):
        report(what, metrics.get("rmse_judged", math.nan))
    return predictor_of(problem, state)


@torch.no_grad()
def sample(
    predictor: Predictor, denoiser: Denoiser, noise: Tensor, cond: Condition | None = None
) -> Tensor:
    """Samples [B, *] of a predictor from `distill`, from standard normal noise [B, *].

    Raises ValueError for a predictor without levels of its own.
    """
    recipe = predictor.recipe
    if recipe.sigmas is None:
        raise ValueError("this predictor's levels are those of its backend: use sample.py")
    levels = named_levels(recipe.process or "ve")
    field = Field(classifier_free(denoiser, recipe.guidance_rate, cond), cond)
    *_, end = predictor.sampler(levels).states(field, noise * recipe.sigmas[0])
    return end


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
    process = process_named(levels) if isinstance(levels, str) else levels
    ends = (0.001, 1.0) if process == FLOW else (0.002, 80.0)
    return NoiseLevels(process, *ends)


def make_problem(model: Model, settings: Settings) -> Problem:
    """The problem of some settings, these resolved; nothing is computed yet but one small call.

    Raises ValueError where settings, schedule, guidance or network do not fit each other.
    """
    if not model.shape or min(model.shape) < 1:
        raise ValueError(f"shape {model.shape} is of no latent: give its sizes, as (4, 64, 64)")
    settings = resolved(settings, flow=model.levels.process == FLOW, shape=model.shape)
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
        grid = levels.grid(name, count, rho=rho, sigma_min=low, sigma_max=high)
        return tuple(grid.tolist())
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


# --- learning -----------------------------------------------------------------------------


def learn(problem: Problem, state: dict[str, Any]) -> Iterator[Tick]:
    """Yield what was done and its figures, tick by tick, until all is learned.

    `state` holds, at every yield, what `predictor_of` reads and what another call needs to go
    on from there: tensors and plain values.
    """
    by_gradient = problem.settings.method == "gradient"
    yield from (learn_by_gradient if by_gradient else learn_by_fit)(problem, state)


def learn_by_fit(problem: Problem, state: dict[str, Any]) -> Iterator[Tick]:
    """A greedy fit for each schedule to be tried, then refinements of the best one, end to end.

    The state's candidates are [what was done, schedule, error on the judges, theta]; nothing is
    back-propagated.
    """
    settings, students = problem.settings, problem.students
    candidates, plan = state.setdefault("candidates", []), plan_of(problem)
    for what in plan[len(candidates) :]:
        metrics: dict[str, float] = {"trajectories": settings.samples or 0}
        verb, _, schedule = what.partition(" ")
        if verb == "fit":
            student = students[schedule]
            start = start_of(student, settings) if settings.init else greedy(problem, student)
            theta = student.encode(start)
        elif what.startswith(BY):
            _, schedule, _, theta = best_of(candidates)
            theta, metrics["objective"] = descended(problem, students[schedule], theta)
        else:
            _, schedule, _, theta = best_of(candidates[: len(students)])
            phase = ROBUST if what == ROBUSTLY else ()
            theta = refined(problem, students[schedule], theta, phase)
        error = rmse(students[schedule].sampler(theta), problem.judges, problem.model.reduce)
        candidates.append([what, schedule, error, theta])
        yield what, {**metrics, "rmse_judged": error}


def plan_of(problem: Problem) -> list[str]:
    """What a fit does, step by step."""
    s, fits = problem.settings, [f"fit {schedule}" for schedule in problem.students]
    others = any(name != "l2" for _, name in terms_of(s))
    squares = ["refine", ROBUSTLY][: 1 + bool(s.robust)] if s.rounds else []
    squares = [] if others and s.init else squares
    return [*fits, *squares, *([BY + s.distance] if others else [])]


def greedy(problem: Problem, student: Student) -> Table:
    """The greedy fit of a student."""
    s = problem.settings
    batches = problem.learned if s.every else at(problem.learned, student.sigmas[1:])
    ends = None if s.scale_time_ends is None else scales(s.scale_time_ends)
    options = FitOptions(
        s.points, s.positions, s.scale_dir, scales(s.scale_time), ends, problem.model.reduce
    )
    return fit(student, batches, options)


def scales(reach: float | None) -> tuple[float, ...]:
    """The time scales to try within a reach."""
    return tuple(1 + reach * part for part in PARTS) if reach else (1.0,)


def refined(problem: Problem, student: Student, theta: Tensor, phase: tuple[float, ...]) -> Tensor:
    """All numbers together, end to end; judged on other noise as well."""
    s, model = problem.settings, problem.model
    assert s.samples
    assert s.batch
    ends = problem.learned if s.every else at(problem.learned, student.sigmas[-1:])
    parts = len(ends) * s.batch // s.samples  # of a batch on this rank
    needed = -(-enough(ends) // ranks.world_size())
    options = RefineOptions(
        rounds=s.rounds or 0,
        reduce=model.reduce,
        robust=phase,
        per_round=-(-needed // parts) * parts,
    )
    judges = [*ends, *problem.judges]
    return gauss_newton(student, theta, ends, options, judges=judges)


def descended(problem: Problem, student: Student, theta: Tensor) -> tuple[Tensor, float]:
    """The vector after a refinement by the settings' distance, and that in units of the start."""
    s, model = problem.settings, problem.model
    ends = problem.learned if s.every else at(problem.learned, student.sigmas[-1:])
    names, values = {name for _, name in terms_of(s)}, [math.nan]
    lens = Lens(
        model.features if names & OF_FEATURES else None,
        model.reward if "reward" in names else None,
    )
    options = DescendOptions(s.rounds or 4, reduce=model.reduce)
    judges = [*ends, *problem.judges]
    theta = descend(student, theta, ends, judges, terms_of(s), lens, options, values.append)
    return theta, values[-1]


def at(batches: Batches, sigmas: tuple[float, ...]) -> Batches:
    """The same batches, sharing what is kept, with targets at these levels."""
    return replace(batches, levels=sigmas)


def best_of(candidates: Sequence[Any]) -> Any:
    """The candidate with the least error, or one by another aim, which began from that.

    Raises ValueError where none has an error that is a number.
    """
    best = min(candidates, key=lambda each: each[2])
    if best[2] == math.inf:
        raise ValueError("no table was learned: the network gives numbers that are not finite")
    return candidates[-1] if candidates[-1][0].startswith(BY) else best


def learn_by_gradient(problem: Problem, state: dict[str, Any]) -> Iterator[Tick]:
    """Adam, a tick of so many trajectories at a time; the state is the learner's."""
    s, model = problem.settings, problem.model
    assert s.samples
    assert s.batch
    distance, last = (
        distance_named(name, model.features, alpha=s.alpha, as_published=s.published_loss)
        for name in (s.distance, s.last_distance or s.distance)
    )
    options = GradientOptions(
        s.lr or 0.2, bool(s.coslr), s.objective or "per-step", distance, last, reduce=model.reduce
    )
    student = replace(problem.student, grid=False)
    theta = student.encode(start_of(student, s))
    learner = Learner(student, options, s.samples, theta)
    if "learner" in state:
        learner.load(state["learner"])
    levels = student.sigmas[-1:] if s.objective == "final" else student.sigmas[1:]
    batches = problem.learned if s.every else at(problem.learned, levels)
    count = len(batches) * s.batch // s.samples
    size = max(1, round(s.tick * 1000 / s.batch)) * s.batch
    while learner.seen < s.samples:
        losses, until = [], min((learner.seen // size + 1) * size, s.samples)
        while learner.seen < until:
            first = learner.seen // s.batch * count
            parts: list[Batch] = batches[first : first + count]
            parts = [checkpointed(part) for part in parts] if s.checkpointing else parts
            losses.append(learner.learn(parts, s.batch))
        learner.judge(problem.reference)
        state["learner"] = learner.state()
        good = [loss for loss in losses if math.isfinite(loss)]
        metrics = {"loss": sum(good) / len(good)} if good else {}
        metrics |= {"trajectories": learner.seen, "skipped": learner.skipped, "lr": learner.lr}
        yield "gradient", metrics


def best_sampler(problem: Problem, state: Mapping[str, Any]) -> Sampler:
    """The best of what was learned so far."""
    if "learner" in state:
        return replace(problem.student, grid=False).sampler(state["learner"]["best"])
    _, schedule, _, theta = best_of(state["candidates"])
    return problem.students[schedule].sampler(theta)


def predictor_of(problem: Problem, state: Mapping[str, Any]) -> Predictor:
    """The predictor of the best so far.

    Its levels stand in its recipe unless they are a schedule by name on the model's own levels,
    and that model is one of a backend.
    """
    s, recipe = problem.settings, recipe_of(problem.settings)
    sampler, training = best_sampler(problem, state), {**recipe.training, **problem.model.training}
    if "candidates" in state:
        _, schedule, error, _ = best_of(state["candidates"])
        training |= {"schedule": schedule, "rmse": error}
    if {name for _, name in terms_of(s)} & {*OF_FEATURES, "reward"}:
        training["fitted_on"] = list(problem.model.fitted_on)
    recipe = replace(
        recipe, process=sampler.process.name, training=training, **problem.model.recipe
    )
    named = not s.init and s.schedule != "logit" and recipe.backend != OWN
    if not named or sampler.sigmas != problem.student.sigmas:
        recipe = replace(recipe, schedule_type="custom", sigmas=sampler.sigmas)
    assert isinstance(sampler.solver, EPD | ParallelMultistep)
    tensors = (t.detach().double().cpu() for t in sampler.solver.table.tensors())
    return validate(Predictor(type(sampler.solver.table)(*tensors), recipe))
