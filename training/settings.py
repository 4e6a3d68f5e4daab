"""What a distillation is told, and what it may be told: plain values, checked before any work."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from solvers.catalog import SOLVERS, parse_name
from solvers.recipe import BASES, Recipe, check_recipe
from training.distances import NAMES as DISTANCES
from training.gradient import OBJECTIVES
from training.search import HISTORY

METHODS = ("gradient", "fit", "fit+gradient")
TEACHERS = ("heun", "dpm2", "euler", "ipndm", "dpmpp", "edm")
BACKENDS = ("auto", "edm", "analytic", "ldm", "sd3", "flux")
DEFAULT_METHOD = "fit"
"""The one that measures best."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "gradient": {"total_kimg": 10.0, "M": 3, "scale_dir": 0.05, "scale_time": 0.05},
    "fit": {"learn_grid": True, "rounds": 2},
    "fit+gradient": {"total_kimg": 2.0, "learn_grid": True, "lr": 0.01, "objective": "final"},
}
"""By method, of the options that were not given."""
FIT_NUMBERS, FIT_LEAST, FIT_MOST = 1 << 15, 32, 4096
"""A fit learns from trajectories of so many numbers, within bounds: two minutes on a CPU."""
COMMON: dict[str, Any] = {
    **{"learn_grid": False, "lr": 0.2, "objective": "per-step", "rounds": 6},
    "try_schedules": False,
}
IDLE = {
    "fit": ("objective", "lr", "lbfgs", "checkpointing", "features", "published_loss"),
    "gradient": ("rounds", "robust"),
}
"""By method, the options that it has no use for."""
VE_SCHEDULES = ("time_uniform", "polynomial", "logsnr")
"""The first is the usual one; a fit tries all of them."""


@dataclass(frozen=True)
class Config:
    """The options of train_distill.py under their names; None is "the usual one"."""

    model: str = "fashion-mnist-32"
    backend: str = "auto"
    preset: str | None = None
    num_steps: int = 4
    num_points: int = 2
    solver: str = "epd"
    max_order: int | None = None
    teacher: str = "heun"
    M: int | None = None
    teacher_substeps: int = 1
    schedule_type: str | None = None
    schedule_rho: float | None = None
    afs: bool | None = None
    scale_dir: float | None = None
    scale_time: float | None = None
    fcn: bool = False
    known: int = 0
    guidance_rate: float = 1.0
    prompts: str | None = None
    label: int | None = None
    negative_prompt: str | None = None
    resolution: int | None = None
    model_config: str | None = None
    method: str = DEFAULT_METHOD
    objective: str | None = None
    distance: str = "l2"
    last_distance: str | None = None
    features: str | None = None
    published_loss: bool = False
    alpha: float = 10.0
    total_kimg: float | None = None
    batch: int = 32
    batch_gpu: int | None = None
    lr: float | None = None
    coslr: bool = True
    lbfgs: int = 0
    rounds: int | None = None
    learn_grid: bool | None = None
    try_schedules: bool | None = None
    robust: bool = False
    checkpointing: bool = False
    validation: int = 32
    fine_steps: int = 33
    tick: float = 1.0
    seed: int = 0
    dtype: str = "float32"

    @property
    def multistep(self) -> bool:
        """Whether the student is parallel multistep."""
        return self.solver == "epd-multistep"

    @property
    def base(self) -> tuple[str, int | None]:
        """The solver that EPD stands on, and its order if the name has one.

        Raises ValueError for a name that is none, and for one that EPD cannot stand on.
        """
        if self.solver == "epd" or self.multistep:
            return "euler", None
        if not self.solver.startswith("epd-"):
            raise ValueError(
                f"unknown student {self.solver!r}: epd, epd-multistep or epd-BASE (epd-ipndm, say)"
            )
        base, order = parse_name(self.solver.removeprefix("epd-"))
        if base not in BASES:
            raise ValueError(f"EPD cannot stand on {base}: choose from {', '.join(BASES)}")
        return base, order

    @property
    def every(self) -> int:
        """The teacher's intervals in each of the student's, where M says so; else 0."""
        return 0 if self.M is None else (self.M + 1) * self.teacher_substeps

    @property
    def schedules(self) -> tuple[str, ...]:
        """The names of those to be tried, the usual one first."""
        assert self.schedule_type is not None
        return VE_SCHEDULES if self.try_schedules else (self.schedule_type,)

    @property
    def trajectories(self) -> int:
        """How many there are to learn from, whole batches."""
        assert self.total_kimg is not None
        return max(1, round(self.total_kimg * 1000 / self.batch)) * self.batch

    @property
    def uses_gradient(self) -> bool:
        """Whether anything is back-propagated."""
        return "gradient" in self.method


def resolved(config: Config, *, is_flow: bool, shape: Sequence[int] = ()) -> Config:
    """The options with the usual ones filled in, for a VE or a flow model, and checked.

    A fit learns from the more trajectories the fewer numbers a latent of `shape` has.

    Raises ValueError in one line where they contradict each other or the model.
    """
    one_of("method", config.method, METHODS)
    enough = FIT_NUMBERS // math.prod(shape or (FIT_NUMBERS,))
    filled: dict[str, Any] = {"total_kimg": max(FIT_LEAST, min(FIT_MOST, enough)) / 1000}
    filled |= {**COMMON, **DEFAULTS[config.method], **usual_grid(config, is_flow)}
    filled["last_distance"] = config.distance
    if config.multistep:
        filled.pop("scale_dir", None)
    given = {n: v for n, v in dataclasses.asdict(config).items() if v is not None}
    config = dataclasses.replace(config, **{n: v for n, v in filled.items() if n not in given})
    check_student(config, is_flow)
    check_teacher(config)
    check_known(config)
    check_method(config)
    check_idle(config)
    return config


def usual_grid(config: Config, is_flow: bool) -> dict[str, Any]:
    """Schedule, AFS and order where they were not given."""
    base, order = config.base
    schedule = config.schedule_type or ("flowmatch" if is_flow else VE_SCHEDULES[0])
    orders = SOLVERS[base].orders
    return {
        "schedule_type": schedule,
        "schedule_rho": {"polynomial": 7.0}.get(schedule, 1.0),
        "afs": not is_flow and not config.multistep,
        "max_order": order or (SOLVERS[base].default_order if len(orders) > 1 else 3),
        "batch_gpu": config.batch,
    }


def check_student(config: Config, is_flow: bool) -> None:
    """ValueError for a student that cannot be, before anything is loaded."""
    _, order = config.base
    if order and order != config.max_order:
        raise ValueError(f"{config.solver} and max_order {config.max_order} disagree: give one")
    if config.afs and is_flow:
        raise ValueError("afs is for VE models: flow matching has no analytic first step")
    if config.afs and config.multistep:
        raise ValueError("epd-multistep needs no afs: its first call places itself")
    if config.schedule_type == "flowmatch" and not is_flow:
        fitting = "take time_uniform, polynomial or logsnr"
        raise ValueError(f"schedule_type flowmatch is not for a VE model: {fitting}")
    if config.multistep and (config.fcn or config.scale_dir):
        raise ValueError("epd-multistep has no direction scales: leave out fcn and scale_dir")
    process = "flow" if is_flow else "ve"
    check_recipe(dataclasses.replace(recipe_of(config), process=process))


def check_teacher(config: Config) -> None:
    """ValueError for a teacher that is unknown, or no finer than its student."""
    one_of("teacher", config.teacher, TEACHERS)
    calls = SOLVERS[config.teacher].calls * config.every
    student = 1 if config.multistep else 2
    if config.every and calls <= student:
        said = f"{config.teacher} with M {config.M} makes {calls} calls an interval"
        raise ValueError(f"{said}, the student {student}: raise --M, the teacher must be finer")


def check_known(config: Config) -> None:
    """ValueError where known slopes cannot join the mixture."""
    most = 0 if config.multistep else HISTORY  # parallel multistep has them anyway
    if not 0 <= config.known <= most:
        raise ValueError(
            f"known {config.known} is out of range: 0 to {most} slopes join {config.solver}"
        )
    if config.known and (config.fcn or config.scale_dir is not None):
        raise ValueError(f"known {config.known} needs free weights: no gradient, scale_dir or fcn")


def check_idle(config: Config) -> None:
    """ValueError for an option that the method has no use for."""
    usual = {f.name: f.default for f in dataclasses.fields(Config)}
    usual |= COMMON | DEFAULTS[config.method]
    for name in IDLE.get(config.method, ()):
        value = getattr(config, name)
        if value != usual[name]:
            raise ValueError(f"{name} {value} does nothing in --method {config.method}: leave it")


def check_method(config: Config) -> None:
    """ValueError for what a method cannot serve."""
    one_of("objective", str(config.objective), OBJECTIVES)
    for name in (config.distance, config.last_distance or config.distance):
        one_of("distance", name, DISTANCES)
        if not config.uses_gradient and name != "l2":
            raise ValueError(f"fit minimises squares: --distance {name} needs a gradient method")
    if config.try_schedules and (config.M is not None or config.schedule_type == "flowmatch"):
        raise ValueError("try_schedules is for VE models, and has a teacher without M")
    if config.method == "gradient" and (config.learn_grid or config.try_schedules):
        raise ValueError("learn_grid needs a fit: a gradient does not reach the time grid")
    if config.learn_grid and config.objective != "final" and config.uses_gradient:
        raise ValueError(f"objective {config.objective} needs --no-learn_grid: its states move")
    if config.fcn and config.method != "gradient":
        raise ValueError(f"fcn is for --method gradient: {config.method} has free weights there")
    if config.label is not None and config.prompts is not None:
        raise ValueError("give either classes or prompts, not both")


def check_batch(config: Config, ranks: int) -> int:
    """The samples that a rank takes at once; ValueError where the batch does not divide."""
    if config.batch % ranks:
        raise ValueError(f"batch {config.batch} does not divide by {ranks} ranks")
    mine = config.batch // ranks
    at_once = min(config.batch_gpu or mine, mine)
    if mine % at_once:
        said = f"batch {config.batch} over {ranks} ranks is {mine} each"
        raise ValueError(f"{said}, which batch_gpu {at_once} does not divide")
    return at_once


def calls_and_rows(config: Config) -> tuple[int, int]:
    """Network calls one after another, and rows, for an image of the student."""
    n = config.num_steps - 1
    if config.multistep:
        return n, n * config.num_points
    base = SOLVERS[config.base[0]].calls
    afs = int(bool(config.afs))
    return (1 + base) * n - afs, (1 + config.num_points * base) * n - afs


def one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError with the choices."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")


def recipe_of(config: Config) -> Recipe:
    """The recipe of a predictor that is learned so, but for what only the model knows."""
    assert config.schedule_type is not None
    free = config.scale_dir is None
    return Recipe(
        num_steps=config.num_steps,
        num_points=config.num_points,
        schedule_type=config.schedule_type,
        schedule_rho=config.schedule_rho or 1.0,
        backend="edm" if config.backend == "auto" else config.backend,
        solver="epd-multistep" if config.multistep else "epd",
        base=config.base[0],
        max_order=config.max_order or 3,
        guidance_type="cfg" if config.guidance_rate != 1 else None,
        guidance_rate=config.guidance_rate,
        afs=bool(config.afs),
        scale_dir=1.0 if free and not config.multistep else config.scale_dir or 0.0,
        scale_time=config.scale_time or 0.0,
        fcn=config.fcn,
        teacher=config.teacher,
        M=config.M,
        alpha=config.alpha if config.uses_gradient else None,
    )
