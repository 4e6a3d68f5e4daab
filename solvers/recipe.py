"""Recipes: the settings that a table was learned for, which sampling with it needs."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from solvers.integrate import levels
from solvers.sampler import SOLVERS
from solvers.schedules import SCHEDULES, one_of

KINDS = ("epd", "epd-multistep")
BASES = tuple(name for name in SOLVERS if name not in ("edm", "unipc"))
"""The solvers that EPD can stand on."""
FLOW_BACKENDS = ("sd3", "flux")
MOST_VALUES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """All but the table that sampling with a predictor needs, and where the predictor comes from.

    Grid sizes are num_steps points, so num_steps - 1 intervals; guidance_rate 1 is no guidance.
    """

    num_steps: int  # grid points, both ends counted
    num_points: int  # K
    schedule_type: str = "time_uniform"
    schedule_rho: float = 1.0
    dataset_name: str = "unknown"
    img_resolution: int | None = None
    backend: str = "edm"
    backend_config: dict[str, Any] = field(default_factory=dict)
    process: str | None = None  # ve or flow; None: by the schedule and the backend
    solver: str = "epd"
    base: str = "euler"
    max_order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    sigma_min: float | None = None  # None: the backend's own range
    sigma_max: float | None = None
    sigmas: tuple[float, ...] | None = None  # of the custom schedule
    flowmatch_shift: float | None = None
    flowmatch_mu: float | None = None
    guidance_type: str | None = None
    guidance_rate: float = 1.0
    afs: bool = False
    scale_dir: float = 0.0  # how far direction scales could go from 1, 0 is off; free ones: 1
    scale_time: float = 0.0  # the same; free ones: 0
    fcn: bool = False  # no direction scale in the last interval
    teacher: str | None = None
    M: int | None = None  # grid points that the teacher adds in every interval
    alpha: float | None = None  # weight of the feature loss
    training: dict[str, Any] = field(default_factory=dict)  # how it was trained, plain values
    source: str = ""
    format_version: int = 1


ON_INCEPTION = ("cifar10", "ffhq", "afhqv2", "imagenet64")
"""Data sets whose published predictors were trained on Inception's features at their ends."""


def fitted_on(training: Mapping[str, Any]) -> list[str]:
    """The networks and rewards whose numbers a table was fitted to, in stage 1 and in stage 2.

    training: what a recipe says of it.
    """
    tuned = training.get("ppo")
    reward = [tuned["reward"]] if isinstance(tuned, dict) and tuned.get("reward") else []
    published = training.get("metadata")
    pixels = isinstance(published, dict) and published.get("dataset_name") in ON_INCEPTION
    own = training.get("fitted_on") or ["inception"] * pixels
    return list(dict.fromkeys([*own, *reward]))


def for_flow(recipe: Recipe) -> bool:
    """Whether the predictor is for flow matching."""
    by_kind = recipe.schedule_type == "flowmatch" or recipe.backend in FLOW_BACKENDS
    return by_kind if recipe.process is None else recipe.process == "flow"


def check_recipe(recipe: Recipe) -> None:
    """ValueError, with the setting, its value and what would do, unless it can be served."""
    one_of("solver", recipe.solver, KINDS)
    one_of("base", recipe.base, BASES)
    one_of("process", recipe.process or "ve", ("ve", "flow"))
    one_of("schedule_type", recipe.schedule_type, (*SCHEDULES, "custom"))
    orders, order = SOLVERS[recipe.base].orders, recipe.max_order
    low, high, sigmas, n = recipe.sigma_min, recipe.sigma_max, recipe.sigmas, recipe.num_steps
    custom = (recipe.schedule_type == "custom") == (sigmas is not None)
    positive = ("schedule_rho", "flowmatch_shift", "sigma_min", "sigma_max")
    given = {name: getattr(recipe, name) for name in positive}
    rules: list[tuple[str, bool, str]] = [
        ("format_version", 1 <= recipe.format_version <= 2, "1 or 2"),
        ("max_order", order >= 1 and (len(orders) == 1 or order in orders), f"one of {orders}"),
        ("num_steps", n >= 2, "2 grid points or more"),
        ("num_points", recipe.num_points >= 1, "1 or more"),
        ("flowmatch_mu", math.isfinite(recipe.flowmatch_mu or 0), "a number"),
        ("guidance_rate", math.isfinite(recipe.guidance_rate), "a number"),
        ("scale_dir", 0 <= recipe.scale_dir <= 1, "0 to 1"),
        ("scale_time", 0 <= recipe.scale_time <= 1, "0 to 1"),
        *((n, 0 < (1 if v is None else v) < math.inf, "above 0") for n, v in given.items()),
        ("sigma_min", not low or not high or low < high, f"below sigma_max {high}"),
        ("afs", not (recipe.afs and for_flow(recipe)), "off, as flow matching has no such step"),
        ("sigmas", custom, "a list for the custom schedule, and for it alone"),
        ("sigmas", sigmas is None or len(sigmas) == n, f"{n} levels"),
    ]
    for name, is_good, wanted in rules:
        if not is_good:
            value = f"{name} {getattr(recipe, name)}"
            raise ValueError(f"{value} is out of range: it must be {wanted}")
    if sigmas is not None and levels(sigmas)[-1] == 0:
        raise ValueError(f"sigmas {sigmas} must end above 0")
    plain("recipe", vars(recipe))


def plain(name: str, value: object, depth: int = 9, room: list[int] | None = None) -> Any:
    """The value with tuples as lists; ValueError unless numbers, text, lists and dicts are all.

    `room` counts what is copied, over several values where it is given: lists of one file may
    share lists, and be more than memory holds.
    """
    room = [MOST_VALUES] if room is None else room
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple | dict):
        room[0] -= len(value)
        if room[0] < 0:
            raise ValueError(f"{name} holds more than {MOST_VALUES} values")
    if depth and isinstance(value, list | tuple):
        return [plain(name, v, depth - 1, room) for v in value]
    if depth and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(f"{name}.{k}"[:80], v, depth - 1, room) for k, v in value.items()}
    what = str(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise ValueError(f"{name} holds {what}, which is not a plain value")


def recipe_from_plain(entries: Mapping[str, Any]) -> Recipe:
    """The recipe of a file; ValueError for entries missing, unknown or of another type."""
    kinds = typing.get_type_hints(Recipe)
    for name in entries:
        one_of("entry of the recipe", str(name), tuple(kinds))
    for name in ("num_steps", "num_points"):
        if name not in entries:
            raise ValueError(f"the recipe has no {name}")
    return Recipe(**{n: typed(n, v, kinds[n]) for n, v in plain("recipe", entries).items()})


def typed(name: str, value: Any, kind: Any) -> Any:
    """The plain value as the type of its field, ints as floats; ValueError for another type."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kinds = [typing.get_origin(option) or option for option in options]
    if float in kinds and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(typed(name, v, float) for v in value)
    if type(value) in kinds:
        return value
    wanted = " or ".join(k.__name__.replace("NoneType", "nothing") for k in kinds)
    raise ValueError(f"{name} is {str(value)[:80]!r}, where {wanted} belongs")
