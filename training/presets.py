"""The published settings by name: one preset for each published predictor, read off its recipe.

`cifar10-5nfe` and so on are the names of the shipped predictors. What their files do not say
is stated here, from the papers (EPD-Solver, arXiv:2507.14797, Sec. 4 and its released runs).
"""

from pathlib import Path
from typing import Any

from solvers.predictor import find_predictor, load_predictor
from solvers.recipe import FLOW_BACKENDS, Recipe
from src.files import nearest

EXPS = Path(__file__).resolve().parent.parent / "exps"
PIXELS = ("edm",)
FEW_STEPS = 6
"""Below so many grid points, pixel models learn from the end of the trajectory alone."""
BATCH = {"edm": 32}
OTHER_BATCH = 8
"""The released runs made 313 to 1,250 updates of 10,000 trajectories: 32 to 8 at a time."""


def preset_names() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in EXPS.glob("*/*.pkl") if is_published(path))


def is_published(path: Path) -> bool:
    """Whether a predictor is one that the papers' authors made."""
    return "metadata" in load_predictor(path).recipe.training


def preset(name: str) -> dict[str, Any]:
    """The options of `train_distill.py` that repeat a published predictor, by their names.

    Raises ValueError, with the nearest name, for an unknown one.
    """
    path = None
    if "/" not in name and "\\" not in name:
        path = next(iter(EXPS.glob("*/*.pkl")), None) and shipped(name)
    if path is None or not is_published(path):
        near = nearest(name[:200], preset_names())
        raise ValueError(f"unknown preset {name[:200]!r}: did you mean {near}?")
    return options(load_predictor(path).recipe)


def shipped(name: str) -> Path | None:
    """The shipped file of that bare name."""
    try:
        path = find_predictor(name)
    except ValueError:
        return None
    return path if EXPS in path.parents else None


def options(recipe: Recipe) -> dict[str, Any]:
    """A recipe, and what the papers say besides, as options."""
    pixels = recipe.backend in PIXELS
    return {
        "method": "gradient",
        "backend": recipe.backend,
        "num_steps": recipe.num_steps,
        "num_points": recipe.num_points,
        "solver": "epd" if recipe.base == "euler" else f"epd-{recipe.base}",
        "max_order": recipe.max_order,
        "teacher": recipe.teacher,
        "M": recipe.M,
        "teacher_substeps": 2,
        "schedule_type": recipe.schedule_type,
        "schedule_rho": recipe.schedule_rho,
        "afs": recipe.afs,
        "scale_dir": recipe.scale_dir,
        "scale_time": recipe.scale_time,
        "fcn": recipe.fcn,
        "guidance_rate": recipe.guidance_rate,
        "resolution": recipe.img_resolution if recipe.backend in FLOW_BACKENDS else None,
        "alpha": recipe.alpha,
        "distance": "l2",
        "last_distance": "inception" if pixels else "l2",
        "published_loss": True,
        "objective": "final" if pixels and recipe.num_steps < FEW_STEPS else "per-step",
        "total_kimg": 10.0,
        "batch": BATCH.get(recipe.backend, OTHER_BATCH),
        "lr": 0.2,
        "coslr": True,
    }
