"""The predictors that the papers' authors published, and their raw parameters.

A published file is a pickle {"model": predictor} or {"model": predictor, "loss_fn": loss}: the
predictor has its settings as attributes and four parameters [num_steps - 1, K]. The formulas
are those of EPD-Solver (Zhu et al. 2025, arXiv:2507.14797, Sec. 3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from solvers.epd import Directions
from solvers.persistence import Persistent
from solvers.recipe import Recipe, plain, recipe_from_plain

PARAMETERS = ("r_params", "weight_s", "scale_dir_params", "scale_time_params")
BASES_BY_STUDENT = {"epd": "euler", "ipndm": "ipndm"}
TEACHERS = {"dpm": "dpm2"}
PIXEL_RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}  # of the EDM networks


def decode(
    raw: Mapping[str, Tensor],
    *,
    scale_dir: float = 0.0,
    scale_time: float = 0.0,
    fcn: bool = False,
) -> Directions:
    """Raw parameters [N, K] -> the table they stand for, in float64.

    r = sigmoid(r_params), weight = softmax(weight_s) over K, and each scale is
    2 sigmoid(p / 2) reach + 1 - reach, so within (1 - reach, 1 + reach). `scale_dir` and
    `scale_time` are the reaches, 0 switches a scale off; `fcn` does so for the direction
    scale of the last interval. Raises ValueError for missing or misshapen parameters.
    """
    wide = {name: raw[name].detach().double().cpu() for name in PARAMETERS if name in raw}
    if "r_params" not in wide:
        raise ValueError("the predictor has no parameter r_params")
    shape = wide["r_params"].shape
    reaches = {"weight_s": int(shape[-1] > 1) if shape else 1}
    reaches |= {"scale_dir_params": scale_dir, "scale_time_params": scale_time}
    for name, reach in reaches.items():
        if name not in wide and reach:
            raise ValueError(f"the predictor has no parameter {name}")
        if name not in wide:
            wide[name] = torch.zeros(shape, dtype=torch.float64)
        if wide[name].shape != shape or len(shape) != 2:
            found = f"{list(wide[name].shape)} beside r_params {list(shape)}"
            raise ValueError(f"{name} has the shape {found}: both must be [num_steps - 1, K]")
    dir_scale = around_one(wide["scale_dir_params"], scale_dir)
    if fcn:
        dir_scale[-1] = 1
    return Directions(
        r=wide["r_params"].sigmoid(),
        weight=wide["weight_s"].softmax(-1),
        time_scale=around_one(wide["scale_time_params"], scale_time),
        dir_scale=dir_scale,
    )


def around_one(raw: Tensor, reach: float) -> Tensor:
    """1 at raw 0, within (1 - reach, 1 + reach)."""
    return 2 * torch.sigmoid(raw / 2) * reach + 1 - reach


def encode(
    table: Directions, *, scale_dir: float = 0.0, scale_time: float = 0.0, fcn: bool = False
) -> dict[str, Tensor]:
    """The raw parameters [N, K] in float64 whose `decode` is `table`.

    Raises ValueError for a value that no finite parameter reaches, by its place: r of 0 or 1, a
    weight of 0 or weights that do not sum to 1, a scale at or beyond 1 -/+ its reach, or other
    than 1 where it is off; and for known slopes, which the published solver does not have.
    """
    if table.history:
        raise ValueError(f"known slopes: the table has {table.history}, a published one has none")
    r, weight, time_scale, dir_scale = (t.detach().double().cpu() for t in table.tensors())
    require("r", r, (r > 0) & (r < 1), "must lie inside (0, 1)")
    require("weight", weight, weight > 0, "must be above 0")
    total = weight.sum(-1)
    require("sum of weight", total, (total - 1).abs() <= 1e-4, "must be 1")
    last = dir_scale[-1:]
    if fcn:
        require("dir_scale", last, last == 1, "must be 1 in the last interval under fcn")
        dir_scale = dir_scale[:-1]
    raw_dir = inverse_of_around_one("dir_scale", dir_scale, scale_dir)
    if fcn:
        raw_dir = torch.cat([raw_dir, torch.zeros_like(last)])
    return {
        "r_params": torch.logit(r),
        "weight_s": weight.log(),
        "scale_dir_params": raw_dir,
        "scale_time_params": inverse_of_around_one("time_scale", time_scale, scale_time),
    }


def inverse_of_around_one(name: str, scale: Tensor, reach: float) -> Tensor:
    """The p with 2 sigmoid(p / 2) reach + 1 - reach = scale."""
    if reach == 0:
        require(name, scale, scale == 1, "must be 1, as its reach is 0")
        return torch.zeros_like(scale)
    inside = (scale - 1).abs() < reach
    require(name, scale, inside, f"must lie inside ({1 - reach:g}, {1 + reach:g})")
    return 2 * torch.logit((scale - 1) / (2 * reach) + 0.5)


def require(name: str, values: Tensor, good: Tensor, reason: str) -> None:
    """ValueError with the place and the value of the first entry that is not good."""
    bad = (~good).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise ValueError(f"{name}{list(place)} is {values[place].item():.9g}: it {reason}")


def from_published(content: Mapping[Any, Any]) -> tuple[Directions, Recipe]:
    """The table and recipe of the content of a published file.

    Raises ValueError where it is not that of a published predictor, or a setting is unknown.
    """
    model = content.get("model")
    if not isinstance(model, Persistent):
        raise ValueError('it has no predictor object under "model"')
    raw = model.state.get("_parameters")
    if not isinstance(raw, dict):
        raise ValueError(f"its {model.class_name} has no parameters")
    settings = {
        name: value
        for name, value in model.state.items()
        if isinstance(name, str) and not name.startswith("_") and name != "training"
    }
    return translate(settings, {n: v for n, v in raw.items() if isinstance(v, Tensor)})


def translate(settings: Mapping[str, Any], raw: Mapping[str, Tensor]) -> tuple[Directions, Recipe]:
    """Published settings and raw parameters -> our table and recipe.

    Students become bases (`epd`: euler), the teacher `dpm` is our dpm2, and a guidance_type of
    None is a guidance_rate of 1. What the file says word for word stays in
    `recipe.training["metadata"]`.
    """
    metadata = {name: value for name, value in settings.items() if is_plain(value)}
    known = {f.name for f in dataclasses.fields(Recipe)}
    entries = {n: v for n, v in metadata.items() if n in known and v is not None}
    for name in ("num_steps", "schedule_type"):
        if name not in entries:
            raise ValueError(f"the predictor does not say its {name}")
    table = decode(
        raw,
        scale_dir=number("scale_dir", entries.get("scale_dir", 0.0)),
        scale_time=number("scale_time", entries.get("scale_time", 0.0)),
        fcn=entries.get("fcn") is True,
    )
    entries |= names(metadata) | levels(metadata)
    entries.setdefault("num_points", table.r.shape[1])
    if metadata.get("guidance_type") is None:
        entries["guidance_rate"] = 1.0
    entries["training"] = {"metadata": metadata}
    entries["source"] = "a published EPD predictor"
    return table, recipe_from_plain(entries)


def number(name: str, value: Any) -> float:
    """The value as a float; ValueError for anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {str(value)[:80]!r}, where a number belongs")
    return float(value)


def is_plain(value: object) -> bool:
    """Whether a setting can be kept as it is."""
    try:
        plain("setting", value)
    except ValueError:
        return False
    return True


def names(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Solver, base, teacher and backend in our names."""
    student = str(metadata.get("sampler_stu", "epd"))
    if student not in BASES_BY_STUDENT:
        raise ValueError(f"sampler_stu {student[:80]!r} is unknown: epd or ipndm")
    teacher = metadata.get("sampler_tea")
    dataset = metadata.get("dataset_name") or "unknown"
    is_latent = str(dataset).endswith("_ldm") or dataset == "ms_coco"
    return {
        "solver": "epd",
        "base": BASES_BY_STUDENT[student],
        "teacher": TEACHERS.get(str(teacher), teacher),
        "dataset_name": dataset,
        "backend": metadata.get("backend") or ("ldm" if is_latent else "edm"),
        "backend_config": metadata.get("backend_config") or {},
    }


def levels(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The range of levels: its own, else its backend's, else that of the EDM networks."""
    config = metadata.get("backend_config")
    layers = [metadata, config if isinstance(config, dict) else {}]
    found = {
        name: next((layer[name] for layer in layers if layer.get(name) is not None), None)
        for name in ("sigma_min", "sigma_max", "flowmatch_shift", "flowmatch_mu")
    }
    if names(metadata)["backend"] == "edm":
        found |= {n: v for n, v in PIXEL_RANGE.items() if found[n] is None}
    return found
