"""Recipes: the settings that a table was learned for, which sampling with it needs."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from solvers.sampler import SOLVERS
from solvers.schedules import SCHEDULES, custom

FORMAT_VERSION = 2
KINDS = ("epd", "epd-multistep")
BASES = tuple(name for name in SOLVERS if name not in ("edm", "unipc"))
"""The solvers that EPD can stand on."""
FLOW_BACKENDS = ("sd3", "flux")
PLAIN_DEPTH = 8


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
    scale_dir: float = 0.0  # reach of the direction scales around 1, 0 is off
    scale_time: float = 0.0
    fcn: bool = False  # no direction scale in the last interval
    teacher: str | None = None
    M: int | None = None  # grid points that the teacher adds in every interval
    alpha: float | None = None  # weight of the feature loss
    training: dict[str, Any] = field(default_factory=dict)  # how it was trained, plain values
    source: str = ""
    format_version: int = 1


def for_flow(recipe: Recipe) -> bool:
    """Whether the predictor is for flow matching."""
    by_kind = recipe.schedule_type == "flowmatch" or recipe.backend in FLOW_BACKENDS
    return by_kind if recipe.process is None else recipe.process == "flow"


def check_recipe(recipe: Recipe) -> None:
    """ValueError, with the setting's name, its value and what would do, for what cannot be."""
    if not 1 <= recipe.format_version <= FORMAT_VERSION:
        reads = f"this code knows up to {FORMAT_VERSION}"
        raise ValueError(f"format_version {recipe.format_version} is unknown: {reads}")
    one_of("solver", recipe.solver, KINDS)
    one_of("base", recipe.base, BASES)
    one_of("process", recipe.process or "ve", ("ve", "flow"))
    one_of("schedule_type", recipe.schedule_type, (*SCHEDULES, "custom"))
    orders, order = SOLVERS[recipe.base].orders, recipe.max_order
    if order < 1 or (len(orders) > 1 and order not in orders):
        raise ValueError(f"max_order {order} is unknown: {recipe.base} has {orders}")
    positive, reach = "above 0", "0 to 1"
    bounds: tuple[tuple[str, bool, str], ...] = (
        ("num_steps", recipe.num_steps >= 2, "too small, a grid has 2 points or more"),
        ("num_points", recipe.num_points >= 1, "too small, 1 or more"),
        ("schedule_rho", is_positive(recipe.schedule_rho), positive),
        ("flowmatch_shift", is_positive(recipe.flowmatch_shift), positive),
        ("flowmatch_mu", math.isfinite(recipe.flowmatch_mu or 0), "a number"),
        ("sigma_min", is_positive(recipe.sigma_min), positive),
        ("sigma_max", is_positive(recipe.sigma_max), positive),
        ("scale_dir", 0 <= recipe.scale_dir <= 1, reach),
        ("scale_time", 0 <= recipe.scale_time <= 1, reach),
        ("guidance_rate", math.isfinite(recipe.guidance_rate), "a number"),
    )
    for name, is_good, wanted in bounds:
        if not is_good:
            raise ValueError(f"{name} {getattr(recipe, name)} is out of range: {wanted}")
    low, high = recipe.sigma_min, recipe.sigma_max
    if low is not None and high is not None and low >= high:
        raise ValueError(f"sigma_min {low} is not below sigma_max {high}")
    if recipe.afs and for_flow(recipe):
        reason = "flow matching has no analytic first step"
        raise ValueError(f"afs is on for {recipe.backend}, {recipe.schedule_type}: {reason}")
    if (recipe.schedule_type == "custom") != (recipe.sigmas is not None):
        raise ValueError("the custom schedule, and it alone, needs its list of sigmas")
    if recipe.sigmas is not None:
        custom(recipe.sigmas)
        if len(recipe.sigmas) != recipe.num_steps:
            levels = f"{len(recipe.sigmas)} levels"
            raise ValueError(f"sigmas has {levels} for num_steps {recipe.num_steps}")
    plain("backend_config", recipe.backend_config)
    plain("training", recipe.training)


def is_positive(value: float | None) -> bool:
    """Whether a setting is above 0 and finite, or is not there."""
    return value is None or 0 < value < math.inf


def one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError with the choices and the nearest of them."""
    if value not in choices:
        near = get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices)}"
        raise ValueError(f"unknown {what} {value[:80]!r}: {hint}")


def recipe_to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as numbers, text, lists and dicts, in the order of its fields."""
    return {f.name: plain(f.name, getattr(recipe, f.name)) for f in dataclasses.fields(Recipe)}


def plain(name: str, value: object, depth: int = PLAIN_DEPTH) -> Any:
    """The value with tuples as lists, if it is plain: numbers, text, lists, dicts by text.

    Raises ValueError where it holds anything else, a number that is not finite, or is nested too
    deeply.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth and isinstance(value, list | tuple):
        return [plain(name, v, depth - 1) for v in value]
    if depth and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(f"{name}.{k}"[:80], v, depth - 1) for k, v in value.items()}
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
    return Recipe(**{name: typed(name, v, kinds[name]) for name, v in entries.items()})


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value as the type of its field, ints as floats where floats belong."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if float in kinds and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if tuple in kinds and isinstance(value, list | tuple):
        return tuple(typed(name, v, float) for v in value)
    if dict in kinds and isinstance(value, dict):
        return plain(name, value)
    if isinstance(value, bool) is (bool in kinds) and isinstance(value, kinds):
        return value
    wanted = " or ".join(k.__name__.replace("NoneType", "nothing") for k in kinds)
    raise ValueError(f"{name} is {str(value)[:80]!r}, where {wanted} belongs")
