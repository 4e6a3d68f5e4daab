"""The one way to load a backend: a path, a shipped model, or a name on the hub."""

import math
import re
from pathlib import Path

import torch

from backends.base import Backend, ModelOptions
from backends.edm import load_pixels
from backends.mixture import CPU, load_mixture
from solvers.predictor import FLOW_BACKENDS, Recipe
from src.files import read_json

SHIPPED = Path(__file__).resolve().parent.parent / "src" / "models"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INDEX = "model_index.json"
DEFAULT = "fashion-mnist-32"
SAME_SIZE = 0.1
"""By how much the side of a square of the same area may differ, for pictures in other ratios."""


def shipped_models() -> list[str]:
    """The names of the models that the repo ships."""
    found = [*SHIPPED.glob("*/config.json"), *SHIPPED.glob(f"*/{INDEX}")]
    return sorted(path.parent.name for path in found)


def find_model(name: str) -> Path:
    """A path as it is, a shipped name as its folder, a name on the hub (who/what) as it is.

    Raises ValueError where it is none of them.
    """
    for path in (Path(name), SHIPPED / name):
        if path.exists():
            return path
    if HUB_NAME.fullmatch(name) and Path(name).suffix not in (".pkl", ".ckpt", ".safetensors"):
        return Path(name)
    known = ", ".join(shipped_models())
    raise ValueError(
        f"no model at {name!r}: give a folder, an EDM .pkl, a .ckpt or .safetensors file, "
        f"a name on the hub, or one of {known}"
    )


def load_backend(
    name: str,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype | None = torch.float32,
    options: ModelOptions | None = None,
) -> Backend:
    """The backend of a model.

    A folder is known by its model_index.json (a diffusers pipeline) or config.json (ours), a
    .ckpt or .safetensors file by its tensors, an EDM network by its .pkl. dtype None is the
    model's usual one: float32, or half precision for text to image on a GPU.

    Raises ValueError, in one line, for a path that is no model.
    """
    path = find_model(name)
    if (path / INDEX).is_file() or not path.exists() or is_single_file(path):
        from backends.pipelines import load_pipeline  # noqa: PLC0415 (diffusers, when asked for)

        return load_pipeline(str(path), device, dtype, options or ModelOptions())
    channels_last = bool(options and options.channels_last)
    if options and options != ModelOptions(channels_last=channels_last):
        raise ValueError(f"{name} is on pixels: it takes no prompts, sizes or parts of pipelines")
    if path.is_dir() and kind(path) == "analytic":
        return load_mixture(path, device)
    return load_pixels(path, device, dtype or torch.float32, channels_last=channels_last)


def family(backend: Backend) -> str:
    """Former name of `backend.family`."""
    return backend.family


def backbone_of(recipe: Recipe | None) -> str:
    """The name of the model that a predictor was learned for; the shipped one without any.

    Raises ValueError where it is not shipped, and nobody says where it is.
    """
    if recipe is None or recipe.dataset_name == "unknown":
        return DEFAULT
    if recipe.dataset_name in shipped_models():
        return recipe.dataset_name
    wanted = recipe.backend_config.get("model_name_or_path") or recipe.dataset_name
    raise ValueError(
        f"the predictor is for {wanted} ({recipe.backend}), which does not ship with the "
        "repository: give its folder or file with --model"
    )


def is_single_file(path: Path) -> bool:
    """Whether it is one file with all the weights of a pipeline."""
    return path.is_file() and path.suffix in (".ckpt", ".safetensors")


def kind(folder: Path) -> str:
    """Which backend a folder is for; ValueError where config.json is not there or broken."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config.get("backend", "edm")


def check_fit(recipe: Recipe, backend: Backend) -> None:
    """ValueError where a predictor was learned at another resolution than the model's."""
    if recipe.backend == "ldm" or recipe.img_resolution is None:
        return  # the published recipes of LDMs give latents, or a size that is not theirs
    height, width = backend.size
    if math.isclose(math.sqrt(height * width), recipe.img_resolution, rel_tol=SAME_SIZE):
        return
    learned = f"the predictor is for {recipe.img_resolution} pixels ({recipe.dataset_name})"
    size = f"{width}" if height == width else f"{height}x{width}"
    flow = recipe.backend in FLOW_BACKENDS
    way = f"add --resolution {recipe.img_resolution}" if flow else "choose one of its size"
    raise ValueError(f"{learned}, the model makes {size}: {way}")
