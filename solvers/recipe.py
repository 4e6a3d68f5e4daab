"""What a table needs besides its numbers: the settings under which it was learned.

Grid sizes are num_steps points, so num_steps - 1 intervals; guidance_rate 1 is no guidance.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from solvers.sampler import SOLVERS

FORMAT_VERSION = 2
"""Of files with guidance in their table; those without are written as version 1."""
KINDS = ("epd", "epd-multistep")
BASES = tuple(name for name in SOLVERS if name not in ("edm", "unipc"))
"""The solvers that EPD can stand on."""
SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch", "custom")
FLOW_BACKENDS = ("sd3", "flux")
PLAIN_DEPTH = 8


@dataclass(frozen=True)
class Recipe:
    """Everything but the table that sampling with a predictor needs, and where it comes from."""

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
    """Refuse settings that no sampling run can serve.

    Raises ValueError in one line with the name of the setting, its value and what would do.
    """
    check_names(recipe)
    check_grid(recipe)
    check_levels(recipe)
    check_reach(recipe)
    plain("backend_config", recipe.backend_config)
    plain("training", recipe.training)


def check_names(recipe: Recipe) -> None:
    """ValueError for an unknown solver, base or schedule, and for a version of the future."""
    if recipe.format_version > FORMAT_VERSION or recipe.format_version < 1:
        known = f"this code knows up to {FORMAT_VERSION}"
        raise ValueError(f"format_version {recipe.format_version} is unknown: {known}")
    one_of("solver", recipe.solver, KINDS)
    one_of("base", recipe.base, BASES)
    one_of("process", recipe.process or "ve", ("ve", "flow"))
    one_of("schedule_type", recipe.schedule_type, SCHEDULES)
    orders = SOLVERS[recipe.base].orders
    if recipe.max_order < 1 or (len(orders) > 1 and recipe.max_order not in orders):
        raise ValueError(f"max_order {recipe.max_order} is unknown: {recipe.base} has {orders}")


def check_grid(recipe: Recipe) -> None:
    """ValueError for a grid without intervals, no points, or an exponent that is not positive."""
    if recipe.num_steps < 2:
        raise ValueError(f"num_steps {recipe.num_steps} is too small: a grid has 2 points or more")
    if recipe.num_points < 1:
        raise ValueError(f"num_points {recipe.num_points} is too small: 1 or more")
    if not 0 < recipe.schedule_rho < math.inf:
        raise ValueError(f"schedule_rho {recipe.schedule_rho} is out of range: above 0")
    shift = recipe.flowmatch_shift
    if shift is not None and not 0 < shift < math.inf:
        raise ValueError(f"flowmatch_shift {shift} is out of range: above 0")
    if recipe.flowmatch_mu is not None and not math.isfinite(recipe.flowmatch_mu):
        raise ValueError(f"flowmatch_mu {recipe.flowmatch_mu} is not a number")


def check_levels(recipe: Recipe) -> None:
    """ValueError for a range of levels that does not fall, or AFS on a flow model."""
    low, high = recipe.sigma_min, recipe.sigma_max
    for name, level in (("sigma_min", low), ("sigma_max", high)):
        if level is not None and not 0 < level < math.inf:
            raise ValueError(f"{name} {level} is out of range: above 0")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"sigma_min {low} is not below sigma_max {high}")
    if recipe.afs and for_flow(recipe):
        reason = "flow matching has no analytic first step"
        raise ValueError(f"afs is on for {recipe.backend}, {recipe.schedule_type}: {reason}")
    if (recipe.schedule_type == "custom") != (recipe.sigmas is not None):
        raise ValueError("the custom schedule, and it alone, needs its list of sigmas")
    if recipe.sigmas is not None:
        check_sigmas(recipe.sigmas, recipe.num_steps)


def check_sigmas(sigmas: tuple[float, ...], num_steps: int) -> None:
    """ValueError unless the levels are num_steps many, positive and falling."""
    if len(sigmas) != num_steps:
        raise ValueError(f"sigmas has {len(sigmas)} levels for num_steps {num_steps}")
    ends = zip((math.inf, *sigmas), (*sigmas, 0.0), strict=True)
    if not all(a > b for a, b in ends):
        raise ValueError(f"sigmas must fall and stay above 0, not {list(sigmas)}")


def check_reach(recipe: Recipe) -> None:
    """ValueError for a scale's reach outside of [0, 1], and for guidance that is no number."""
    for name, reach in (("scale_dir", recipe.scale_dir), ("scale_time", recipe.scale_time)):
        if not 0 <= reach <= 1:
            raise ValueError(f"{name} {reach} is out of range: 0 to 1")
    if not math.isfinite(recipe.guidance_rate):
        raise ValueError(f"guidance_rate {recipe.guidance_rate} is not a number")


def one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError with the choices and the nearest of them."""
    if value not in choices:
        near = get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices)}"
        raise ValueError(f"unknown {what} {value[:80]!r}: {hint}")


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


def recipe_to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as numbers, text, lists and dicts, in the order of its fields."""
    return {f.name: plain(f.name, getattr(recipe, f.name)) for f in dataclasses.fields(Recipe)}


def recipe_from_plain(entries: Mapping[str, Any]) -> Recipe:
    """The recipe of a file.

    Raises ValueError where an entry is missing, unknown, or of the wrong type, by name.
    """
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    for name in entries:
        one_of("entry of the recipe", str(name), tuple(fields))
    for name in ("num_steps", "num_points"):
        if name not in entries:
            raise ValueError(f"the recipe has no {name}")
    kinds = typing.get_type_hints(Recipe)
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
