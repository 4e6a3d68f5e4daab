"""What is distilled, and how: one set of settings for the command and for Python.

Each field says its range and its help; `train_distill.py` makes its options of them. None is
"the usual one", which `resolved` fills in for a model.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click

from solvers.predictor import find_predictor, load_predictor
from solvers.recipe import BASES, FLOW_BACKENDS, Recipe, check_recipe
from solvers.sampler import SOLVERS, make_solver, parse_name
from solvers.schedules import NO_EXPONENT, one_of
from src.files import nearest
from src.options import DTYPES, Number
from training.distances import FIT_NAMES, NAMES, OF_SETS, parse_terms

METHODS = ("fit", "gradient")
OBJECTIVES = ("per-step", "final", "end-to-end")
BACKENDS = ("auto", "edm", "analytic", "ldm", "sd3", "flux")
TEACHERS = ("heun", "dpm2", "euler", "ipndm", "dpmpp", "edm")
PUBLISHED: dict[Any, str] = {("teacher", "dpm"): "dpm2", ("solver", "ipndm"): "epd-ipndm"}
"""What the published code calls a setting's value."""
VE_SCHEDULES = ("time_uniform", "polynomial", "logsnr", "discrete")
FLOW_SCHEDULES = ("flowmatch",)
"""The first is the usual one."""
GRADIENT_ALONE = ("objective", "lr", "coslr", "checkpointing", "published_loss")
FIT_ALONE = ("rounds", "robust")
MANY, SMALL = 1 << 26, 1 << 10
"""Numbers of latents, squared, to learn from; of a latent that is small."""
COUNT = click.IntRange(1)
POSITIVE = Number(0, min_open=True)
REACH = Number(0, 1)
TEXT = click.STRING
FEW_CALLS = 7
"""Up to so many, looks count: measured at 3 to 5 calls, beyond that as published."""
FEW_STEPS = 6
"""Below so many grid points, published pixel models learn from the end alone."""


def setting(default: Any, kind: click.ParamType, about: str, *names: str) -> Any:
    """A field with its default, its range, its help, and its option where that is another."""
    return dataclasses.field(
        default=default, metadata={"kind": kind, "help": about, "names": names}
    )


def convert(values: Any) -> None:
    """Bring the fields to their types; ValueError, naming it, for one that is none."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value is None and field.default is None:
            continue
        try:
            value = PUBLISHED.get((field.name, value), value)
            typed = field.metadata["kind"].convert(value, None, None)
            if isinstance(value, float) and typed != value:  # click cuts 3.9 to 3
                raise TypeError
        except (click.UsageError, TypeError) as error:
            said = error.message if isinstance(error, click.UsageError) else "it is no such value"
            raise ValueError(f"{field.name} {value} is out of range: {said}") from error
        object.__setattr__(values, field.name, typed)


@dataclass(frozen=True)
class Backbone:
    """The network that a command distils, what it is told, and what looks at its samples."""

    preset: str | None = setting(None, TEXT, "A published predictor's settings (cifar10-5nfe).")
    model: str = setting("fashion-mnist-32", TEXT, "Folder, EDM .pkl, or a shipped name.")
    backend: str = setting("auto", click.Choice(BACKENDS), "What it must be.")
    prompts: str | None = setting(
        None, TEXT, "A text file, one prompt a line.", "--prompts", "--prompt_path"
    )
    negative_prompt: str | None = setting(None, TEXT, "What guidance leads away from.")
    resolution: int | None = setting(None, COUNT, "Of text-to-image models, in pixels.")
    model_config: str | None = setting(None, TEXT, "Diffusers folder with what a file lacks.")
    label: int | None = setting(
        None, click.IntRange(0), "Class; else drawn by the seed.", "--class"
    )
    features: str | None = setting(
        None, TEXT, "efficientnet-lite0, fashion-judge, clip, dinov2, a file, module:function."
    )
    reward: str | None = setting(
        None, TEXT, "Of its distance: a name of rewards/, or module:function."
    )
    dtype: str = setting("float32", click.Choice(list(DTYPES)), "")

    def __post_init__(self) -> None:
        convert(self)


@dataclass(frozen=True)
class Settings:
    """What to distil, and from how much; the defaults are what measured best.

    Raises ValueError, naming the setting, for a value out of its range.
    """

    nfe: int | None = setting(None, COUNT, "Sequential calls, for num_steps.")
    num_steps: int | None = setting(None, click.IntRange(2), "Grid points; usual: 4.")
    points: int | None = setting(
        None, click.IntRange(1, 8), "K, parallel points; usual: of --init, or 2.", "--num_points"
    )
    solver: str | None = setting(
        None, TEXT, "epd, epd-BASE or epd-multistep; usual: epd, by nfe epd-multistep.",
        "--solver", "--sampler_stu",
    )  # fmt: skip
    max_order: int | None = setting(None, click.IntRange(1, 4), "Of the base.")
    predict_x0: bool = setting(True, click.BOOL, "Data prediction of a dpmpp base.")
    lower_order_final: bool = setting(True, click.BOOL, "Lower orders at the end of that base.")
    afs: bool | None = setting(None, click.BOOL, "Analytic first step; usual for EPD on VE.")
    scale_dir: float | None = setting(None, REACH, "How far direction scales go; fit: free.")
    scale_time: float | None = setting(None, REACH, "How far time scales go; fit: free.")
    scale_time_ends: float | None = setting(None, REACH, "The same at both ends of the grid.")
    fcn: bool = setting(False, click.BOOL, "No direction scale in the last interval.")
    schedule: str | None = setting(None, TEXT, "How the grid is spaced.", "--schedule_type")
    schedule_rho: float | None = setting(None, POSITIVE, "Its exponent.")
    sigma_min: float | None = setting(None, POSITIVE, "Last noise level; usual: the model's.")
    sigma_max: float | None = setting(None, POSITIVE, "First noise level; usual: the model's.")
    guidance_rate: float | None = setting(None, Number(0), "1 is none; default: of --init, or 1.")
    teacher: str = setting(
        "heun", click.Choice([*TEACHERS, "dpm"]), "", "--teacher", "--sampler_tea"
    )
    M: int | None = setting(None, click.IntRange(0), "Points it adds in an interval.", "--M")
    teacher_substeps: int = setting(1, COUNT, "Steps between its points.")
    fine_steps: int | None = setting(None, click.IntRange(3), "Grid points of the fine solution.")
    method: str | None = setting(None, click.Choice(METHODS), "Usual: fit; with lr: gradient.")
    distance: str | None = setting(
        None, TEXT, "Usual: l2; with features, at few calls, distribution; or l2+0.1*features."
    )
    last_distance: str | None = setting(None, TEXT, "At the end; else the same.")
    alpha: float = setting(10.0, Number(0), "Weight of features in a gradient.")
    published_loss: bool = setting(False, click.BOOL, "Weigh them as the published code does.")
    samples: int | None = setting(None, COUNT, "Trajectories to learn from; or --total_kimg.")
    judges: int | None = setting(None, COUNT, "Others to choose by; usual: half as many.")
    validation: int = setting(32, COUNT, "Others that only measure.")
    batch: int | None = setting(None, COUNT, "Trajectories at once, over all processes.")
    batch_gpu: int | None = setting(
        None, COUNT, "At once in a process.", "--batch_gpu", "--batch-gpu"
    )
    positions: int = setting(17, click.IntRange(2, 129), "G, places that a fit tries.")
    learn_grid: bool | None = setting(None, click.BOOL, "The noise levels as well; usual in fits.")
    rounds: int | None = setting(None, click.IntRange(0), "Of a fit's refinement.")
    robust: bool | None = setting(None, click.BOOL, "Refine also by a loss for stray samples.")
    init: str | None = setting(
        None, TEXT, "A predictor, or a solver by name, to start from in place of a fit."
    )
    objective: str | None = setting(None, click.Choice(OBJECTIVES), "What a gradient is of.")
    lr: float | None = setting(None, POSITIVE, "Of Adam; usual: 0.2.")
    coslr: bool | None = setting(None, click.BOOL, "Cosine decay of it; usual.")
    checkpointing: bool = setting(False, click.BOOL, "Gradients in less memory, more time.")
    tick: float = setting(1.0, POSITIVE, "Thousands of a gradient between checkpoints.")
    seed: int = setting(0, click.IntRange(0), "")
    device: str = setting("cpu", TEXT, "")
    name: str = setting("unknown", TEXT, "Of the data, for the recipe.", "--dataset_name")

    def __post_init__(self) -> None:
        convert(self)

    @property
    def multistep(self) -> bool:
        """Whether the student is parallel multistep."""
        return self.solver == "epd-multistep"

    @property
    def base(self) -> tuple[str, int | None]:
        """The solver that EPD stands on, and its order if the name has one.

        Raises ValueError for a name that is none, and for one that EPD cannot stand on.
        """
        if self.solver in ("epd", "epd-multistep", None):
            return "euler", None
        if not self.solver.startswith("epd-"):
            raise ValueError(f"unknown solver {self.solver!r}: epd, epd-multistep or epd-BASE")
        base, order = parse_name(self.solver.removeprefix("epd-"))
        one_of("base", base, BASES)
        return base, order

    @property
    def every(self) -> int:
        """The teacher's intervals in each of the student's, where M says so; else 0."""
        return 0 if self.M is None else (self.M + 1) * self.teacher_substeps


def resolved(
    settings: Settings, *, flow: bool, shape: Sequence[int] = (), features: bool = False
) -> Settings:
    """The settings with the usual ones filled in, for a VE or a flow model, and checked.

    `shape` is that of a latent, where it is known: of fewer numbers, more trajectories. Where
    there is a network of features, few calls are fitted to the distribution of samples.

    Raises ValueError in one line where they contradict each other or the model.
    """
    s = with_usual(adopted(settings), {"guidance_rate": 1.0, "points": 2})
    s = replace(s, solver=s.solver or ("epd-multistep" if s.nfe else "epd"))
    s = with_usual(s, usual_grid(s, flow))
    assert s.num_steps
    calls = 1 if s.multistep else 1 + SOLVERS[s.base[0]].calls
    nfe = calls * (s.num_steps - 1) - bool(s.afs)
    gradient = s.method == "gradient"
    by_looks = features and not gradient and nfe <= FEW_CALLS
    distance = s.distance or ("distribution" if by_looks else "l2")
    s = replace(s, nfe=nfe, distance=distance, last_distance=s.last_distance or distance)
    if gradient and not s.multistep:  # a little from 1, or as far as the predictor's own
        reach = {"scale_dir": 0.05, "scale_time": 0.05}
        if s.init and not hand_made(s.init):
            recipe = load_predictor(find_predictor(s.init)).recipe
            reach = {name: max(usual, getattr(recipe, name)) for name, usual in reach.items()}
        s = with_usual(s, reach)
    s = with_usual(s, PUBLISHED_WAY if gradient else usual_fit(s, shape))
    assert s.batch
    assert s.samples
    batch = min(s.batch, s.samples)
    samples = max(1, round(s.samples / batch)) * batch
    judges = s.judges or (s.validation if gradient else samples // 2 or 1)
    s = replace(s, batch=batch, samples=samples, judges=judges)
    check(s, flow)
    return s


def with_usual(settings: Settings, usual: dict[str, Any]) -> Settings:
    """The settings with the usual values where there is none."""
    return replace(settings, **{n: v for n, v in usual.items() if getattr(settings, n) is None})


def hand_made(init: str) -> bool:
    """Whether tables start from a hand-made solver of this name ("unipc-2"), not from a file.

    Raises ValueError for an order that it lacks, and where it makes two calls a step.
    """
    base, _, order = init.partition("-")
    if base not in SOLVERS or (order and not order.isdecimal()):
        return False
    make_solver(init)
    if SOLVERS[base].calls != 1:
        raise ValueError(f"init {init} makes {SOLVERS[base].calls} calls a step, and a table one")
    return True


def adopted(settings: Settings) -> Settings:
    """The settings with those of the predictor, or of the solver, that they start from.

    Raises ValueError where they are for another solver or grid than that predictor.
    """
    if settings.init is None:
        return settings
    own: dict[str, Any] = {"solver": "epd-multistep", "afs": False}
    if hand_made(settings.init):
        own["afs"] = bool(settings.afs)
        base, order = parse_name(settings.init)
        own["max_order"] = order or settings.max_order or SOLVERS[base].default_order
    else:
        predictor = load_predictor(find_predictor(settings.init))
        recipe = predictor.recipe
        if predictor.table.guidance is not None:
            raise ValueError(
                f"init {settings.init} has rates of guidance in its table: tune it by ppo"
            )
        settings = with_usual(settings, {"points": recipe.num_points})
        assert settings.points
        if settings.points < recipe.num_points:
            raise ValueError(f"points {settings.points}: {settings.init} has {recipe.num_points}")
        solver = recipe.solver if recipe.base == "euler" else f"epd-{recipe.base}"
        own = {"solver": solver, "num_steps": recipe.num_steps, "afs": recipe.afs}
        own |= {"max_order": recipe.max_order}
        usual = {"schedule": (VE_SCHEDULES[0], FLOW_SCHEDULES[0]), "schedule_rho": (1.0,)}
        for name in ("schedule", "schedule_rho", "sigma_min", "sigma_max"):
            if (value := getattr(settings, name)) not in (None, *usual.get(name, ())):
                said = f"{settings.init} has its own noise levels, leave it out"
                raise ValueError(f"{name} {value}: {said}")
        for name in ("predict_x0", "lower_order_final"):
            own[name] = getattr(recipe, name)
            if not getattr(settings, name) and own[name]:
                raise ValueError(f"{name} False: {settings.init} has True")
            settings = replace(settings, **{name: own[name]})
        settings = with_usual(settings, {"guidance_rate": recipe.guidance_rate})
    for name, value in own.items():
        if getattr(settings, name) not in (None, value):
            raise ValueError(f"{name} {getattr(settings, name)}: {settings.init} has {value}")
    return replace(settings, **own)


def usual_grid(settings: Settings, flow: bool) -> dict[str, Any]:
    """Grid points, schedule, AFS, order and method where they were not given.

    Raises ValueError for a number of calls that the solver cannot make.
    """
    s, (base, order) = settings, settings.base
    schedule = s.schedule or (FLOW_SCHEDULES if flow else VE_SCHEDULES)[0]
    afs, num_steps = s.afs, s.num_steps or 4
    if s.nfe and s.multistep:
        num_steps = s.nfe + 1 + bool(afs)
    elif s.nfe:
        calls = 1 + SOLVERS[base].calls
        choices = [False, bool(afs)] if flow else [True, False]
        fitting = [a for a in choices if afs in (None, a) and not (s.nfe + a) % calls]
        if not fitting or s.nfe + fitting[0] < calls:
            raise ValueError(f"{s.solver} cannot make {s.nfe} calls: change nfe by 1")
        afs = fitting[0]
        num_steps = (s.nfe + afs) // calls + 1
    if s.nfe and s.num_steps not in (None, num_steps):
        whose = f"{s.init} has {s.num_steps}" if s.init else "give one of them"
        raise ValueError(f"nfe {s.nfe} needs num_steps {num_steps}: {whose}")
    several = len(SOLVERS[base].orders) > 1
    return {
        "num_steps": num_steps,
        "schedule": schedule,
        "schedule_rho": {"polynomial": 7.0}.get(schedule, 1.0),
        "afs": not flow and not s.multistep if afs is None else afs,
        "max_order": order or (SOLVERS[base].default_order if several else 3),
        "method": "gradient" if s.lr or s.objective else "fit",
    }


PUBLISHED_WAY = {"samples": 10_000, "batch": 32, "fine_steps": 33, "M": 3, "objective": "per-step"}
PUBLISHED_WAY |= {"lr": 0.2, "coslr": True, "learn_grid": False}
"""Of a gradient, where nothing else is given."""


def usual_fit(settings: Settings, shape: Sequence[int]) -> dict[str, Any]:
    """How much work a fit is given, by the numbers of a latent.

    Small latents need many trajectories and rounds: their error lies in the few samples that
    pass near a fork of the flow, and those are what a table that generalises must have seen
    enough of. Large ones need few, whose numbers are many and whose evaluations are dear; sets
    of samples are compared by some more.
    """
    numbers = math.prod(shape) or 1
    small, squares = numbers < SMALL, settings.distance == "l2"
    return {
        "samples": max(64 if squares else 96, min(MANY // numbers**2, 4096)),
        "batch": max(16, min(1 << 15 >> (numbers - 1).bit_length(), 1024)),
        "fine_steps": 49 if small else 33,
        "rounds": 15 if small else 2,
        "robust": small,
        "learn_grid": True,
    }


def check(settings: Settings, flow: bool) -> None:
    """ValueError for what cannot be served, before any work."""
    s, (_, order), fits = settings, settings.base, settings.method == "fit"
    schedules = FLOW_SCHEDULES if flow else VE_SCHEDULES
    if s.schedule in FLOW_SCHEDULES and not flow:
        raise ValueError(f"schedule {s.schedule} is not for a VE model: take {schedules[0]}")
    one_of("schedule", s.schedule or "", schedules)
    calls, student = SOLVERS[s.teacher].calls * s.every, 1 if s.multistep else 2
    no_afs = "afs is for VE models: flow matching has no analytic first step"
    finer = f"{s.teacher} with M {s.M} makes {calls} calls an interval, the student {student}: "
    greedy, k = fits and not s.init, s.points or 0
    clashes = {
        f"{s.solver} and max_order {s.max_order} disagree": order and order != s.max_order,
        no_afs: s.afs and flow,
        "schedule discrete has the model's own ends: leave out sigma_min and sigma_max": (
            s.schedule == "discrete" and (s.sigma_min or s.sigma_max)
        ),
        f"schedule_rho {s.schedule_rho} does nothing on {s.schedule}: leave it out": (
            s.schedule in NO_EXPONENT and s.schedule_rho not in (None, 1)
        ),
        f"teacher_substeps {s.teacher_substeps} does nothing without M": s.M is None
        and s.teacher_substeps != Settings.teacher_substeps,
        f"{s.solver} has free scales: leave out fcn, scale_dir and ends": s.multistep
        and (s.fcn or s.scale_dir or s.scale_time_ends),
        "fcn is for --method gradient: a fit has free weights there": fits and s.fcn,
        f"alpha {s.alpha} is for --method gradient: weigh as in l2+0.1*features": fits
        and s.alpha != Settings.alpha,
        f"positions {s.positions} are tried in a fit without init alone": not greedy
        and s.positions != Settings.positions,
        f"tick {s.tick:g} is of a gradient: a fit writes after each round": fits
        and s.tick != Settings.tick,
        "learn_grid needs a fit: a gradient does not reach the time grid": not fits
        and s.learn_grid,
        f"sigma_max {s.sigma_max} is out of range: flow matching starts at 1 or below": flow
        and (s.sigma_max or 0) > 1,
        f"points {k} is out of range: a fit tries all sets of 1 to 4": greedy and k > 4,
        f"positions {s.positions} must be above points {k}": greedy and s.positions <= k,
        f"last_distance {s.last_distance} does nothing in a fit: leave it out": fits
        and s.last_distance != s.distance,
        f"{finer}raise --M, the teacher must be finer": s.every and calls <= student,
        f"distance {s.distance} compares sets: give 2 samples or more": fits
        and s.samples == 1
        and any(name in (s.distance or "") for name in OF_SETS),
    }
    for said, clash in clashes.items():
        if clash:
            raise ValueError(said)
    for name in GRADIENT_ALONE if fits else FIT_ALONE:
        if getattr(s, name) not in (None, False):
            raise ValueError(f"{name} {getattr(s, name)} does nothing in --method {s.method}")
    if fits:
        parse_terms(s.distance or "l2")
    else:
        for name in (s.distance, s.last_distance):
            if name in FIT_NAMES and name not in NAMES:
                raise ValueError(f"distance {name} has no gradient here: give --method fit")
            one_of("distance", name or "l2", NAMES)
    check_recipe(replace(recipe_of(s), process="flow" if flow else "ve"))


def at_once(settings: Settings, ranks: int) -> int:
    """The samples that a rank takes at once; ValueError where the batch does not divide."""
    assert settings.batch
    if settings.batch % ranks:
        raise ValueError(f"batch {settings.batch} does not divide by {ranks} ranks")
    mine = settings.batch // ranks
    count = min(settings.batch_gpu or mine, mine)
    if mine % count:
        said = f"batch {settings.batch} over {ranks} ranks is {mine} each"
        raise ValueError(f"{said}, which batch_gpu {count} does not divide")
    return count


def recipe_of(settings: Settings) -> Recipe:
    """The recipe of a predictor that is learned so, but for what only the model knows."""
    s = settings
    assert s.num_steps
    assert s.points
    assert s.schedule
    assert s.guidance_rate is not None
    free = s.scale_dir is None
    return Recipe(
        num_steps=s.num_steps,
        num_points=s.points,
        schedule_type=s.schedule,
        schedule_rho=s.schedule_rho or 1.0,
        dataset_name=s.name,
        solver="epd-multistep" if s.multistep else "epd",
        base=s.base[0],
        max_order=s.max_order or 3,
        predict_x0=s.predict_x0,
        lower_order_final=s.lower_order_final,
        guidance_type="cfg" if s.guidance_rate != 1 else None,
        guidance_rate=s.guidance_rate,
        afs=bool(s.afs),
        scale_dir=1.0 if free and not s.multistep else s.scale_dir or 0.0,
        scale_time=s.scale_time or 0.0,
        fcn=s.fcn,
        teacher=s.teacher,
        M=s.M,
        alpha=s.alpha if s.method == "gradient" else None,
        training={n: v for n, v in vars(s).items() if v is not None},
    )


@cache
def preset_names() -> list[str]:
    """The names of all presets: those of the shipped predictors that the papers' authors made."""
    names = []
    for path in (Path(__file__).resolve().parent.parent / "exps").glob("*/[!.]*.pkl"):
        with suppress(ValueError):  # a file that is none, or of a run that was killed
            names += [path.stem] * ("metadata" in load_predictor(path).recipe.training)
    return sorted(names)


def preset(name: str) -> dict[str, Any]:
    """The settings, by their names, that repeat a published predictor, and its `backend`.

    They are read off its recipe; what its file does not say is stated here, from the papers
    (EPD-Solver, arXiv:2507.14797, Sec. 4 and its released runs).

    Raises ValueError, with the nearest name, for an unknown one.
    """
    names = preset_names()
    if name not in names:
        name = name[:200]
        raise ValueError(f"unknown preset {name!r}: did you mean {nearest(name, names)}?")
    recipe = load_predictor(find_predictor(name)).recipe
    pixels = recipe.backend == "edm"
    same = ("num_steps", "max_order", "teacher", "M", "afs", "fcn", "scale_dir", "scale_time")
    return {n: getattr(recipe, n) for n in (*same, "guidance_rate", "schedule_rho", "backend")} | {
        "method": "gradient",
        "points": recipe.num_points,
        "solver": "epd" if recipe.base == "euler" else f"epd-{recipe.base}",
        "teacher_substeps": 2,
        "schedule": recipe.schedule_type,
        "resolution": recipe.img_resolution if recipe.backend in FLOW_BACKENDS else None,
        "alpha": 10.0 if recipe.alpha is None else recipe.alpha,
        "last_distance": "inception" if pixels else "l2",
        "published_loss": True,
        "objective": "final" if pixels and recipe.num_steps < FEW_STEPS else "per-step",
        "samples": 10_000,
        "batch": 32 if pixels else 8,  # the released runs made 313 to 1,250 updates
        "lr": 0.2,
        "coslr": True,
    }
