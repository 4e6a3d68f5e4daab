"""The predictors that others published: EPD-Solver's and DyWeight's, from the inert data of files.

A file is a pickle {"model": predictor} or {"predictor": predictor}, perhaps with a loss beside it;
the predictor, an nn.Module, has its settings as attributes. The formulas are those of EPD-Solver
(Zhu et al. 2025, arXiv:2507.14797, Sec. 3) and of DyWeight (arXiv:2603.11607).
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from solvers.epd import Directions, MultistepTable, Table
from solvers.integrate import MAX_SLOPES
from solvers.process import VE
from solvers.schedules import NoiseLevels
from src.pickles import Inert, module_tensors

PARAMETERS = ("r_params", "weight_s", "scale_dir_params", "scale_time_params")
SETTINGS = (
    *("img_resolution", "num_steps", "num_points", "schedule_type", "schedule_rho", "afs", "M"),
    *("guidance_type", "guidance_rate", "scale_dir", "scale_time", "fcn", "max_order", "alpha"),
    *("predict_x0", "lower_order_final"),
)
"""What published predictors and our recipes call by one name."""
BASES_BY_STUDENT = {"epd": "euler", "ipndm": "ipndm"}
TEACHERS = {"dpm": "dpm2"}
LEVELS = ("sigma_min", "sigma_max", "flowmatch_shift", "flowmatch_mu")
PIXEL_RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}  # of the EDM networks


def from_published(content: Mapping[Any, Any]) -> tuple[Table, dict[str, Any]]:
    """The table of a published file's content, and the entries of its recipe.

    Raises ValueError where it is not that of a published predictor, or a setting cannot be served.
    """
    model = content.get("model", content.get("predictor"))
    if not isinstance(model, Inert):
        raise ValueError('it is neither a predictor of ours nor a published one with a "model"')
    raw = module_tensors(model)
    metadata = {
        name: value
        for name, value in model.state.items()
        if isinstance(name, str) and name[:1] != "_" and name != "training" and is_plain(value)
    }
    if "hybrid_weights" in raw:
        return from_dyweight(metadata, raw)
    if "r_params" not in raw:
        raise ValueError(f"its {model.class_name} has no parameters of EPD-Solver or DyWeight")
    return translate(metadata, raw)


def translate(
    metadata: Mapping[str, Any], raw: Mapping[str, Tensor]
) -> tuple[Directions, dict[str, Any]]:
    """EPD-Solver's settings and raw parameters -> our table and the entries of its recipe.

    Students become bases (`epd`: euler), the teacher `dpm` is our dpm2, and a guidance_type of
    None is a guidance_rate of 1. What the file says word for word stays in "training".
    """
    entries = entries_of(metadata)
    for name in ("num_steps", "schedule_type"):
        if name not in entries:
            raise ValueError(f"the predictor does not say its {name}")
    student = str(metadata.get("sampler_stu", "epd"))
    if student not in BASES_BY_STUDENT:
        raise ValueError(f"sampler_stu {student[:80]!r} is unknown: epd or ipndm")
    table = decode(
        raw,
        scale_dir=number("scale_dir", entries.get("scale_dir", 0.0)),
        scale_time=number("scale_time", entries.get("scale_time", 0.0)),
        fcn=entries.get("fcn") is True,
    )
    entries |= {"solver": "epd", "base": BASES_BY_STUDENT[student]}
    entries.setdefault("num_points", table.r.shape[1])
    return table, entries | {"source": "a published EPD predictor"}


def decode(
    raw: Mapping[str, Tensor],
    *,
    scale_dir: float = 0.0,
    scale_time: float = 0.0,
    fcn: bool = False,
) -> Directions:
    """The table that EPD-Solver's raw parameters [N, K] stand for, in float64.

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
        values = wide.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        if values.shape != shape or len(shape) != 2:
            shapes = f"{list(values.shape)} beside r_params {list(shape)}"
            raise ValueError(f"{name} has the shape {shapes}: both must be [num_steps - 1, K]")
    dir_scale = around_one(wide["scale_dir_params"], scale_dir)
    if fcn:
        dir_scale[-1] = 1
    time_scale = around_one(wide["scale_time_params"], scale_time)
    return Directions(
        wide["r_params"].sigmoid(), wide["weight_s"].softmax(-1), time_scale, dir_scale
    )


def around_one(raw: Tensor, reach: float) -> Tensor:
    """1 at raw 0, within (1 - reach, 1 + reach)."""
    return 2 * torch.sigmoid(raw / 2) * reach + 1 - reach


def from_dyweight(
    metadata: Mapping[str, Any], raw: Mapping[str, Tensor]
) -> tuple[MultistepTable, dict[str, Any]]:
    """DyWeight's weights [N, N] and time scales [N - 1] -> parallel multistep, K = 1, with AFS.

    With d_0 the analytic slope at t_0, tau_0 = t_0 and S_i = sum_j w_ij, its steps are

        d_i = (x_i - D(x_i, t_scale_{i-1} tau_i)) / tau_i
        x_{i+1} = x_i + (t_{i+1} - tau_i) sum_{j<=i} w_ij d_j
        tau_{i+1} = tau_i + S_i (t_{i+1} - tau_i)

    Our loop keeps no d_0: later steps make it of x and of the slopes since then.
    """
    w = (raw["hybrid_weights"].double() * raw.get("mask", torch.ones(1))).cpu().tril()
    n = len(w)
    told = raw.get("t_scale", torch.ones(n - 1)).double().cpu()
    if w.shape != (n, n) or n < 2 or told.shape != (n - 1,) or metadata.get("afs") is False:
        raise ValueError("DyWeight has hybrid_weights [N, N], t_scale [N - 1], and afs on")
    entries = entries_of(metadata)
    if entries.get("num_steps", n + 1) != n + 1:
        raise ValueError(f"num_steps {entries['num_steps']} is not that of {n} rows of weights")
    low, high = (number(name, entries.get(name)) for name in ("sigma_min", "sigma_max"))
    schedule, rho = str(entries.get("schedule_type", "polynomial")), entries.get("schedule_rho")
    t = NoiseLevels(VE, low, high).grid(schedule, n + 1, rho=rho)
    tau = t.clone()
    for i in range(n - 1):
        tau[i + 1] = tau[i] + w[i].sum() * (t[i + 1] - tau[i])
    free, spent = (1 + t[0] ** 2).sqrt(), w.new_zeros(n)  # x_i = free d_0 + sum_j spent_j d_j
    weight, b = w.new_zeros(n, 1), w.new_zeros(n, n)
    for i in range(n):
        moved, h = (t[i + 1] - tau[i]) * w[i], tau[i + 1] - tau[i]
        of_x = moved[0] / free
        slopes = (moved - of_x * spent)[1 : i + 1].flip(0) / h  # newest first
        b[i, 0] = of_x * (1 + tau[i] ** 2).sqrt() / h
        b[i, 1:i], weight[i, 0] = slopes[1:], slopes[:1].sum()
        free, spent = free + moved[0], spent + moved
    if b[:, 1 + MAX_SLOPES :].any():
        raise ValueError(f"its steps use more than {MAX_SLOPES} earlier slopes")
    b, zeros = b[:, : 1 + MAX_SLOPES], torch.zeros_like(weight)
    time_scale = torch.cat([told.new_ones(1), told]).unsqueeze(1)
    kind = {"solver": "epd-multistep", "num_points": 1, "afs": True, "num_steps": n + 1}
    grid = {"schedule_type": "custom", "sigmas": tau.tolist()}
    about = {"source": "a published DyWeight predictor"}
    table = MultistepTable(torch.zeros_like(b), zeros, weight, b, time_scale)
    return table, entries | kind | grid | about


def entries_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a recipe in our names: settings, backend, teacher and range of levels.

    The range is the predictor's own, else its backend's, else that of the EDM networks. What the
    file says word for word stays in "training".
    """
    entries = {n: metadata[n] for n in SETTINGS if metadata.get(n) is not None}
    teacher, dataset = metadata.get("sampler_tea"), str(metadata.get("dataset_name") or "unknown")
    is_latent = dataset.endswith("_ldm") or dataset == "ms_coco"
    backend = metadata.get("backend") or ("ldm" if is_latent else "edm")
    config = metadata.get("backend_config") or {}
    ranges = {**PIXEL_RANGE} if backend == "edm" else {}
    for source in (config if isinstance(config, dict) else {}, metadata):
        ranges |= {name: source[name] for name in LEVELS if source.get(name) is not None}
    if metadata.get("guidance_type") is None:
        entries["guidance_rate"] = 1.0
    names = {"dataset_name": dataset, "teacher": TEACHERS.get(str(teacher), teacher)}
    names |= {"backend": backend, "backend_config": config, "training": {"metadata": metadata}}
    return entries | names | ranges


def number(name: str, value: Any) -> float:
    """The value as a float; ValueError for anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {str(value)[:80]!r}, where a number belongs")
    return float(value)


def is_plain(value: object, depth: int = 3) -> bool:
    """Whether a setting can be kept as it is: numbers, text, and small lists and dicts of them."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 64 and all(is_plain(v, depth - 1) for v in value)
    return (
        value is None
        or isinstance(value, bool | int | str)
        or (isinstance(value, float) and isfinite(value))
    )


def require(name: str, values: Tensor, good: Tensor, reason: str) -> None:
    """ValueError with the place and the value of the first entry that is not good."""
    bad = (~good).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise ValueError(f"{name}{list(place)} is {values[place].item():.9g}: it {reason}")
