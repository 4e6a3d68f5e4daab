"""Distillation for anyone's own network: a denoiser in, a predictor out.

    def denoiser(x, sigma, cond):          # x [B, *], sigma [B] -> the clean estimate [B, *]
        return network(x, sigma)

    predictor = distill(denoiser, "ve", shape=(4, 64, 64), settings=Settings(nfe=5))
    x = sample(predictor, denoiser, noise)  # standard normal noise [B, 4, 64, 64]

Nothing is back-propagated, so any network that can be sampled can be distilled, and latents may
have any shape: vectors, audio [C, T], images, video [C, T, H, W].
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.catalog import SOLVERS, parse_name
from solvers.field import Condition, Denoiser, Field, Guided
from solvers.integrate import integrate
from solvers.predictor import Predictor, validate
from solvers.process import Process, process_named
from solvers.recipe import Recipe
from training.distill import Plan, Table, table_rmse
from training.fit import HISTORY, FitOptions, fit
from training.known import (
    Conditions,
    Effort,
    Settings,
    Source,
    Views,
    effort,
    fine_grid,
    plans,
)
from training.refine import RefineOptions, Student, enough, gauss_newton
from training.table import Form, FreeForm, MultistepForm

ROBUST = (16.0, 256.0)
"""Scales of a loss that stray samples steer little, before the plain one; measured best."""
__all__ = ["Settings", "distill", "sample"]

Report = Callable[[str, float], object]
"""Hears of the way: what was done, the error after it."""


@dataclass(frozen=True)
class Found:
    """A student, its numbers and its error to the fine solution."""

    student: Student
    theta: Tensor
    schedule: str
    error: float


def distill(
    denoiser: Denoiser,
    process: Process | str,
    *,
    shape: Sequence[int],
    settings: Settings | None = None,
    conditions: Conditions | None = None,
    report: Report = lambda _what, _error: None,
) -> Predictor:
    """A predictor that samples `denoiser` in settings.nfe sequential calls.

    `denoiser(x [B, *shape], sigma [B], cond)` estimates the clean sample; `process` is "ve"
    (x0 + sigma eps) or "flow" ((1 - sigma) x0 + sigma eps, as x - sigma v of a velocity v);
    `conditions` makes what it is told as `cond`, and with guidance also what "nothing" is.

    Every schedule is fitted greedily (method: Gram matrices over positions, no gradient), the
    best is refined end to end with its levels, and all choices are made on noises of their own.
    `report("fit time_uniform", error)` hears of the way; errors are root mean squares to a
    Heun solution of `fine_steps` intervals.

    Raises ValueError for settings that cannot be served, and for a network that gives NaN.
    """
    settings, process = settings or Settings(), named(process)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)} is of no latent: give its sizes, as (4, 64, 64)")
    fine = fine_grid(settings, process)
    candidates = plans(settings, process)
    guided = Guided(denoiser, settings.guidance_rate)
    work = effort(settings, shape)
    source = Source(guided, tuple(shape), conditions, settings, work.batch, fine[0])
    grids = [plan.sigmas for plan in candidates.values()]
    learned = source.batches("distill", work.samples, fine, grids)
    ends = [(grid[0], grid[-1]) for grid in grids]
    judges = source.batches("judge", work.judges, fine, ends)
    found = []
    for i, (schedule, plan) in enumerate(candidates.items()):
        options = FitOptions(settings.points, settings.positions, known=settings.known)
        table = fit(plan, Views(learned, i), options)
        error = table_rmse(plan, table, Views(judges, i))
        report(f"fit {schedule}", error)
        student = Student(plan, form_of(plan, settings), grid=plan.intervals > 1)
        found.append(Found(student, student.encode(table), schedule, error))
    finite = [each for each in found if math.isfinite(each.error)]
    if not finite:
        raise ValueError("no table was found: the network gives numbers that are not finite")
    best = min(finite, key=lambda each: each.error)
    last = Views(learned, 0), Views(judges, 0)  # all plans end alike
    best = refined(best, last, work, report)
    return predictor_of(best, process, settings)


def refined(start: Found, ends: tuple[Views, Views], work: Effort, report: Report) -> Found:
    """The best of refinements from the same start, by what loss they begin with, on the judges."""
    batches, judges = ends
    found = [start]
    for phases in ((), ROBUST)[: 1 + work.robust] if work.rounds else ():
        theta = gauss_newton(
            start.student,
            start.theta,
            batches,
            RefineOptions(rounds=work.rounds, robust=phases, per_round=enough(batches)),
            judges=Views([*batches.known, *judges.known], 0),
        )
        plan, table = start.student.decode(theta)
        error = table_rmse(plan, table, judges)
        report("refine, robust first" if phases else "refine", error)
        found.append(dataclasses.replace(start, theta=theta, error=error))
    return min((f for f in found if math.isfinite(f.error)), key=lambda each: each.error)


@torch.no_grad()
def sample(
    predictor: Predictor,
    denoiser: Denoiser,
    noise: Tensor,
    cond: Condition | None = None,
) -> Tensor:
    """Samples [B, *] of a predictor from `distill`, from standard normal noise [B, *].

    Raises ValueError for a predictor without levels of its own.
    """
    recipe = predictor.recipe
    if recipe.sigmas is None:
        raise ValueError("this predictor's levels are those of its backend: use sample.py")
    process = process_named(recipe.process or "ve")
    field = Field(Guided(denoiser, recipe.guidance_rate), cond)
    table = predictor.table.to(noise)
    solver = dataclasses.replace(predictor, table=table).solver(process)
    first = process.first_slope if recipe.afs else None
    x = noise * recipe.sigmas[0]
    *_, end = integrate(solver, field, x, recipe.sigmas, first_slope=first)
    return end


def named(process: Process | str) -> Process:
    """A process by its name, or as it is."""
    return process_named(process) if isinstance(process, str) else process


def form_of(plan: Plan, settings: Settings) -> Form:
    """How the table is written as free numbers."""
    shape = plan.intervals, settings.points
    if settings.base is None:
        return MultistepForm(*shape, HISTORY)
    calls = SOLVERS[parse_name(settings.base)[0]].calls
    return FreeForm(*shape, history=settings.known, calls=calls, afs=plan.afs)


def predictor_of(found: Found, process: Process, settings: Settings) -> Predictor:
    """The predictor of what was found, its levels in its recipe."""
    plan, table = found.student.decode(found.theta)
    recipe = Recipe(
        num_steps=len(plan.sigmas),
        num_points=settings.points,
        schedule_type="custom",
        sigmas=plan.sigmas,
        dataset_name=settings.name,
        backend="denoiser",
        process=process.name,
        solver="epd-multistep" if plan.base is None else "epd",
        base=parse_name(settings.base or "euler")[0],
        max_order=order_of(settings.base or "euler"),
        guidance_type="cfg" if settings.guidance_rate != 1 else None,
        guidance_rate=settings.guidance_rate,
        afs=plan.afs,
        scale_dir=0.0 if plan.base is None else 1.0,
        teacher="heun",
        training={
            "schedule": found.schedule,
            "rmse": found.error,
            **dataclasses.asdict(settings),
        },
        source="training.api.distill",
    )
    return validate(Predictor(stripped(table), recipe))


def stripped(table: Table) -> Table:
    """The table on the CPU without a graph."""
    return type(table)(*(t.detach().cpu() for t in table.tensors()))


def order_of(base: str) -> int:
    """The order of a base by its name."""
    name, order = parse_name(base)
    return order or max(3 if SOLVERS[name].default_order == 1 else SOLVERS[name].default_order, 1)
