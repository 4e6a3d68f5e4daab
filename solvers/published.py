"""The predictors that others published: EPD-Solver's and DyWeight's, from the inert data of files.

A file is a pickle {"model": predictor} or {"predictor": predictor}, perhaps with a loss beside it;
the predictor, an nn.Module, has its settings as attributes. The formulas are those of EPD-Solver
(Zhu et al. 2025, arXiv:2507.14797, Sec. 3) and of DyWeight (arXiv:2603.11607).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solvers.epd import Directions, MultistepTable, Table
from solvers.integrate import MAX_SLOPES
from solvers.process import VE
from solvers.recipe import MOST_VALUES, Recipe, plain, recipe_from_plain
from solvers.schedules import NoiseLevels
from src.inert import Inert, quoted
from src.pickles import module_tensors

SETTINGS = (
    *("img_resolution", "num_steps", "num_points", "schedule_type", "schedule_rho", "afs", "M"),
    *("guidance_type", "guidance_rate", "scale_dir", "scale_time", "fcn", "max_order", "alpha"),
    *("predict_x0", "lower_order_final"),
)
"""What published predictors and our recipes call by one name."""
LEVELS = ("sigma_min", "sigma_max", "flowmatch_shift", "flowmatch_mu")
PIXEL_RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}  # of the EDM networks


def from_published(content: Mapping[Any, Any]) -> tuple[Table, Recipe]:
    """The table and the recipe of a published file's content.

    Students become bases (`epd`: euler), the teacher `dpm` is our dpm2, and a guidance_type of
    None is a guidance_rate of 1; what the file says word for word stays in "training". Raises
    ValueError where it is no published predictor, or a setting cannot be served.
    """
    model = content.get("model", content.get("predictor"))
    if not isinstance(model, Inert):
        raise ValueError('it is neither a predictor of ours nor a published one with a "model"')
    raw, metadata, room = module_tensors(model), {}, [MOST_VALUES]
    for name, value in model.state.items():
        if isinstance(name, str) and name[:1] != "_" and name != "training":
            try:
                metadata[name] = plain(name, value, 3, room)
            except ValueError:
                if name in (*SETTINGS, *LEVELS):
                    raise
                # else a fork added it, and no recipe can hold it
    if "hybrid_weights" in raw:
        return from_dyweight(metadata, raw)
    if "r_params" not in raw:
        kind = quoted(model.class_name)
        raise ValueError(f"its {kind} has no parameters of EPD-Solver or DyWeight")
    student = str(metadata.get("sampler_stu", "epd"))
    if student not in ("epd", "ipndm"):
        raise ValueError(f"sampler_stu {student[:80]!r} is unknown: epd or ipndm")
    if metadata.get("schedule_type") is None:
        raise ValueError("the predictor does not say its schedule_type")
    entries = {"num_points": raw["r_params"].shape[-1:].numel()} | entries_of(metadata)
    entries |= {"base": student.replace("epd", "euler"), "source": "a published EPD predictor"}
    recipe = recipe_from_plain(entries)
    reaches = {"scale_dir": recipe.scale_dir, "scale_time": recipe.scale_time}
    return decode(raw, **reaches, fcn=recipe.fcn), recipe


def decode(
    raw: Mapping[str, Tensor], *, scale_dir: float = 0, scale_time: float = 0, fcn: bool = False
) -> Directions:
    """The table that EPD-Solver's raw parameters [N, K] stand for, in float64.

    r = sigmoid(r_params), weight = softmax(weight_s) over K, and each scale is
    2 sigmoid(p / 2) reach + 1 - reach; `scale_dir` and `scale_time` are the reaches, 0 switching
    a scale off, and `fcn` leaves the last interval without a direction scale. Raises ValueError
    for missing or misshapen parameters.
    """
    shape = raw["r_params"].shape
    needed = {"r_params": 1, "weight_s": shape[-1] - 1 if shape else 1}
    needed |= {"scale_dir_params": scale_dir, "scale_time_params": scale_time}
    wide = []
    for name, need in needed.items():
        if need and name not in raw:
            raise ValueError(f"the predictor has no parameter {name}")
        own = raw.get(name, torch.zeros(shape))
        if own.shape != shape or len(shape) != 2 or 0 in shape or own.is_complex():
            shapes = f"{list(own.shape)} beside r_params {list(shape)}"
            raise ValueError(f"{name} has the shape {shapes}: both are real [num_steps - 1, K]")
        wide.append(own.detach().double().cpu())
    dir_scale, time_scale = (
        2 * torch.sigmoid(p / 2) * reach + 1 - reach
        for p, reach in zip(wide[2:], (scale_dir, scale_time), strict=True)
    )
    if fcn:
        dir_scale[-1] = 1
    return Directions(wide[0].sigmoid(), wide[1].softmax(-1), time_scale, dir_scale)


def from_dyweight(
    metadata: Mapping[str, Any], raw: Mapping[str, Tensor]
) -> tuple[MultistepTable, Recipe]:
    """Parallel multistep, K = 1 with AFS, for DyWeight's weights [N, N] and time scales [N - 1].

    With d_0 the analytic slope at t_0, tau_0 = t_0 and S_i = sum_j w_ij, its steps are

        d_i = (x_i - D(x_i, t_scale_{i-1} tau_i)) / tau_i
        x_{i+1} = x_i + (t_{i+1} - tau_i) sum_{j<=i} w_ij d_j
        tau_{i+1} = tau_i + S_i (t_{i+1} - tau_i)

    Our loop keeps no d_0: later steps make it of x and of the slopes since then. Raises ValueError
    for shapes that are not these, no AFS, no range of levels, or more than 4 earlier slopes.
    """
    w = raw["hybrid_weights"]
    n = w.shape[:1].numel()
    mask = raw.get("mask", torch.ones_like(w))
    scales = raw.get("t_scale", torch.ones(max(n - 1, 0)))
    shapes = w.shape == mask.shape == (n, n) and n >= 2 and scales.shape == (n - 1,)
    starts = metadata.get("afs") in (None, True)
    if not shapes or not starts or w.is_complex() or scales.is_complex():
        raise ValueError("DyWeight has hybrid_weights [N, N], t_scale [N - 1], and afs on")
    w, scales = (w.double() * mask).cpu().tril(), scales.double().cpu()
    kind = {"solver": "epd-multistep", "num_points": 1, "afs": True}
    entries = {"num_steps": n + 1, "schedule_type": "polynomial"} | entries_of(metadata) | kind
    recipe = recipe_from_plain(entries | {"source": "a published DyWeight predictor"})
    if recipe.num_steps != n + 1:
        raise ValueError(f"num_steps {recipe.num_steps} is not that of {n} rows of weights")
    if recipe.sigma_min is None or recipe.sigma_max is None:
        raise ValueError("the predictor does not say its sigma_min and sigma_max")
    rho = recipe.schedule_rho if "schedule_rho" in entries else None
    levels = NoiseLevels(VE, recipe.sigma_min, recipe.sigma_max)
    t = levels.grid(recipe.schedule_type, n + 1, rho=rho)
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
    time_scale = torch.cat([scales.new_ones(1), scales]).unsqueeze(1)
    table = MultistepTable(torch.zeros_like(b), zeros, weight, b, time_scale)
    return table, replace(recipe, schedule_type="custom", sigmas=tuple(tau.tolist()))


def entries_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's entries in our names; levels are its own, its backend's, or EDM's."""
    entries = {n: metadata[n] for n in SETTINGS if metadata.get(n) is not None}
    dataset = str(metadata.get("dataset_name") or "unknown")
    config = metadata.get("backend_config")
    is_latent = dataset.endswith("_ldm") or dataset == "ms_coco"
    backend = metadata.get("backend") or ("ldm" if is_latent else "edm")
    for source in (PIXEL_RANGE if backend == "edm" else {}, config, metadata):
        source = source if isinstance(source, Mapping) else {}
        entries |= {name: source[name] for name in LEVELS if source.get(name) is not None}
    if metadata.get("guidance_type") is None:
        entries["guidance_rate"] = 1.0
    teacher = metadata.get("sampler_tea")
    entries |= {"dataset_name": dataset, "teacher": "dpm2" if teacher == "dpm" else teacher}
    return entries | {
        "backend": backend,
        "backend_config": config or {},
        "training": {"metadata": dict(metadata)},
    }
