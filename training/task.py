"""From the options and a backend to what is learned, from what, and how it is judged.

Shapes: B samples, N intervals, * one latent, x [B, *].
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels, Prompt
from solvers import schedules
from solvers.catalog import SOLVERS, SolverOptions, make_solver
from solvers.classic import Heun
from solvers.epd import EPD
from solvers.field import Condition, Denoiser, Field
from solvers.integrate import Solver
from solvers.recipe import Recipe
from src.seeds import randint, randn
from training.distill import Plan
from training.fit import HISTORY
from training.refine import Student
from training.settings import Config, recipe_of
from training.table import Form, FreeForm, MultistepForm, PublishedForm
from training.teacher import Batches, Cache, Source, Teacher, in_parts

REFERENCE_RHO = 7.0


@dataclass(frozen=True)
class Task:
    """A student, batches to learn from, and batches to judge by, on this rank."""

    config: Config
    students: tuple[Student, ...]  # one for each schedule to be tried
    recipe: Recipe
    source: Source
    validation: Batches  # ends by the teacher
    reference: Batches  # the same noise, ends by the fine solution
    judges: Batches  # other noise, to choose by; ends by the fine solution

    @property
    def student(self) -> Student:
        """The usual one."""
        return self.students[0]


@dataclass(frozen=True)
class Polled:
    """A denoiser that polls before a call."""

    denoiser: Denoiser
    poll: Callable[[], object]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> x0 [B, *]."""
        self.poll()
        return self.denoiser(x, sigma, cond)


@dataclass(frozen=True)
class Surroundings:
    """What a task is given besides its options."""

    backend: Backend
    fingerprint: str = ""  # of the model, for the cache
    cache: Cache | None = None
    prompts: tuple[str, ...] = ()  # to draw from by seed
    rank: int = 0
    ranks: int = 1
    poll: Callable[[], object] = lambda: None  # called before each batch


def make_task(config: Config, around: Surroundings) -> Task:
    """The task of a resolved configuration.

    Raises ValueError where schedule, guidance or prompts do not fit the model.
    """
    levels = around.backend.levels
    plans = [make_plan(config, levels, name) for name in config.schedules]
    sigmas = plans[0].sigmas
    reference = Teacher(Heun(), fine_grid(config, levels, sigmas), sigmas[-1:])
    solver = make_solver(config.teacher, SolverOptions(process=levels.process))
    teacher = make_teacher(config, levels, solver, plans)
    last = dataclasses.replace(teacher, stops=teacher.stops[-1:])
    check_guidance(config, around)
    learned, judged, chosen = (f"{n}/{config.seed}" for n in ("distill", "validation", "judge"))
    form, grid = form_of(config), bool(config.learn_grid)
    parts = in_parts(range(around.rank, config.validation, around.ranks), config.batch)
    validation = Batches(source(config, around, last, judged), parts)
    fine = validation
    if config.every or config.teacher != "heun":
        fine = Batches(source(config, around, reference, judged), parts)
    judges = range(around.rank, max(config.batch, config.trajectories // 2), around.ranks)
    return Task(
        config,
        tuple(Student(plan, form, grid and plan.intervals > 1) for plan in plans),
        recipe_on(config, around.backend),
        source(config, around, teacher, learned),
        validation,
        fine,
        Batches(source(config, around, reference, chosen), in_parts(judges, config.batch)),
    )


def make_teacher(
    config: Config, levels: NoiseLevels, solver: Solver, plans: Sequence[Plan]
) -> Teacher:
    """The teacher of all plans at once.

    With M its grid refines that of the student (EPD-Solver, arXiv:2507.14797, Sec. 3.3), else it
    is that of the fine solution with the levels of all plans besides.
    """
    sigmas = plans[0].sigmas
    if config.every:
        assert config.schedule_type is not None
        count = config.every * (len(sigmas) - 1) + 1
        fine = schedule(config, levels, config.schedule_type, count)
        return Teacher(solver, fine, fine[config.every :: config.every])
    stops = {level for plan in plans for level in plan.sigmas[1:]}
    union = {*fine_grid(config, levels, sigmas), *stops}
    return Teacher(solver, falling(union), falling(stops))


def falling(levels: set[float]) -> tuple[float, ...]:
    """The levels in order."""
    return tuple(sorted(levels, reverse=True))


def schedule(config: Config, levels: NoiseLevels, name: str, num_steps: int) -> tuple[float, ...]:
    """A grid by name; the configured exponent is that of the configured type."""
    rho = config.schedule_rho if name == config.schedule_type else None
    return tuple(levels.grid(name, num_steps, rho=rho).tolist())


def fine_grid(config: Config, levels: NoiseLevels, sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """The grid of the fine solution between the same ends: polynomial 7, or the flow's own."""
    if levels.process.name == "flow":
        grid = levels.grid("flowmatch", config.fine_steps)
        return (sigmas[0], *grid.tolist()[1:-1], sigmas[-1])
    grid = schedules.polynomial(config.fine_steps, sigmas[-1], sigmas[0], REFERENCE_RHO)
    return tuple(grid.tolist())


def make_plan(config: Config, levels: NoiseLevels, schedule_name: str) -> Plan:
    """The student but for its table; ValueError for a base that EPD cannot stand on."""
    sigmas = schedule(config, levels, schedule_name, config.num_steps)
    if config.multistep:
        return Plan(sigmas, levels.process)
    name, _ = config.base
    order = config.max_order if name not in ("euler", "heun", "dpm2") else None
    base = make_solver(name, SolverOptions(order=order, process=levels.process))
    plan = Plan(sigmas, levels.process, base, bool(config.afs))
    blank = torch.ones(1, 1)
    EPD(PublishedForm(1, 1).decode(torch.cat([blank, blank]).flatten()), base)
    return plan


def form_of(config: Config) -> Form:
    """How the table is written as free numbers."""
    shape = config.num_steps - 1, config.num_points
    if config.multistep:
        return MultistepForm(*shape, HISTORY, time=config.scale_time != 0)
    if config.scale_dir is None:
        calls, afs = SOLVERS[config.base[0]].calls, bool(config.afs)
        return FreeForm(*shape, config.scale_time != 0, config.known, calls, afs)
    return PublishedForm(*shape, config.scale_dir, config.scale_time or 0.0, config.fcn)


def recipe_on(config: Config, backend: Backend) -> Recipe:
    """The recipe with what the model knows: levels, resolution, and how it was trained."""
    levels = backend.levels
    plain = {n: v for n, v in dataclasses.asdict(config).items() if v is not None}
    flow = levels.process.name == "flow"
    return dataclasses.replace(
        recipe_of(config),
        dataset_name=config.model.rstrip("/").rpartition("/")[2] or "unknown",
        img_resolution=round(math.sqrt(math.prod(backend.image_size))),
        process=levels.process.name,
        sigma_min=levels.sigma_min,
        sigma_max=levels.sigma_max,
        flowmatch_shift=levels.shift if flow else None,
        flowmatch_mu=levels.mu if flow else None,
        training=plain,
        source="train_distill.py",
    )


def source(config: Config, around: Surroundings, teacher: Teacher, stream: str) -> Source:
    """Batches by seed; classes and prompts are drawn by the seed as sample.py draws them."""
    backend, first = around.backend, teacher.sigmas[0]
    dtype = torch.promote_types(backend.dtype, torch.float32)

    def start(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        around.poll()
        cond = backend.encode([prompt_of(config, around, seed) for seed in seeds])
        noise = randn(
            seeds, backend.latent_shape, stream=stream, device=backend.device, dtype=dtype
        )
        polled = Polled(backend.guided(config.guidance_rate, cond), around.poll)
        return Field(polled, cond), noise * first

    return Source(start, teacher, key_of(config, around, teacher, stream), around.cache)


def prompt_of(config: Config, around: Surroundings, seed: int) -> Prompt:
    """What a trajectory is of."""
    if around.prompts:
        return around.prompts[int(randint([seed], len(around.prompts), stream="prompt"))]
    return around.backend.usual_prompt(seed) if config.label is None else config.label


def key_of(config: Config, around: Surroundings, teacher: Teacher, stream: str) -> dict[str, Any]:
    """Everything that a trajectory depends on, but its seeds."""
    return {
        "model": around.fingerprint,
        "dtype": str(around.backend.dtype),
        "teacher": repr(teacher),
        "stream": stream,
        "class": config.label,
        "prompts": list(around.prompts),
        "guidance_rate": config.guidance_rate,
        "negative_prompt": config.negative_prompt,
        "shape": list(around.backend.latent_shape),
    }


def check_guidance(config: Config, around: Surroundings) -> None:
    """ValueError for classes or prompts that the model does not take, or guidance without."""
    cond = around.backend.encode([prompt_of(config, around, 0)])
    around.backend.guided(config.guidance_rate, cond)
