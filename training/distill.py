"""Distillation: a denoiser in, a predictor of few sequential calls out.

Shapes: B samples, N intervals, K points, P free numbers, * one latent, x [B, *].
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import classifier_free
from solvers.epd import EPD, ParallelMultistep, Table
from solvers.field import Condition, Denoiser, Field
from solvers.predictor import Predictor, validate
from solvers.process import Process
from solvers.sampler import Sampler
from solvers.schedules import NoiseLevels
from src import ranks
from training.descend import Lens, Reward, descend
from training.distances import OF_FEATURES, Network, distance_named
from training.fit import FitOptions, fit
from training.gradient import GradientOptions, Learner, checkpointed
from training.problem import (
    OWN,
    Conditions,
    Model,
    Problem,
    make_problem,
    named_levels,
    start_of,
    terms_of,
)
from training.refine import ROBUST, RefineOptions, enough, gauss_newton
from training.settings import SMALL, Settings, recipe_of
from training.student import Batch, Student, rmse
from training.teacher import Batches

ROBUSTLY, BY = "refine, robust first", "refine by "
"""What a fit calls its refinements."""
Tick: TypeAlias = tuple[str, dict[str, float]]
"""What was done, and its figures by name."""
PARTS = (-0.9, -0.45, 0.0, 0.45, 0.9)
"""Of their reach, where a fit tries time scales."""


def distill(
    denoiser: Denoiser,
    levels: NoiseLevels | Process | str,
    *,
    shape: Sequence[int],
    conditions: Conditions | None = None,
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
    told = conditions or (lambda _numbers: None)
    model = Model(denoiser, named_levels(levels), tuple(shape), told, device=settings.device)
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
    large = math.prod(problem.model.shape) >= SMALL  # whose evaluations are dear
    squares = [] if others and (s.init or large) else squares
    return [*fits, *squares, *([f"{BY}{s.distance}"] if others else [])]


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
    return gauss_newton(student, theta, ends, options, judges=judges, report=model.report)


def descended(problem: Problem, student: Student, theta: Tensor) -> tuple[Tensor, float]:
    """The vector after a refinement by the settings' distance, and that in units of the start."""
    s, model = problem.settings, problem.model
    ends = problem.learned if s.every else at(problem.learned, student.sigmas[-1:])
    names, values = {name for _, name in terms_of(s)}, [math.nan]

    def heard(value: float) -> None:
        values.append(value)
        model.report(value)

    lens = Lens(
        model.features if names & OF_FEATURES else None,
        model.reward if "reward" in names else None,
    )
    theta = descend(
        student,
        theta,
        ends,
        [*ends, *problem.judges],
        terms_of(s),
        lens,
        rounds=s.rounds or 0,
        reduce=model.reduce,
        report=heard,
    )
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
        for name in (s.distance or "l2", s.last_distance or "l2")
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
