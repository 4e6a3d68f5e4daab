"""The one way to load a backend: a path, or the name of a shipped model."""

from pathlib import Path

import torch

from backends.analytic import CPU, load_analytic
from backends.base import Backend
from backends.pixels import load_pixels
from src.files import read_json

SHIPPED = Path(__file__).resolve().parent.parent / "src" / "models"


def shipped_models() -> list[str]:
    """The names of the models that the repo ships."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def find_model(name: str) -> Path:
    """A path as it is, a shipped name as its folder; ValueError where there is neither."""
    for path in (Path(name), SHIPPED / name):
        if path.exists():
            return path
    known = ", ".join(shipped_models())
    raise ValueError(f"no model at {name!r}: give a folder, an EDM .pkl, or one of {known}")


def load_backend(
    name: str, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Backend:
    """The backend of a model folder (by its config.json) or of an EDM network pickle.

    Raises ValueError, in one line, for a path that is no model.
    """
    path = find_model(name)
    if path.is_dir() and kind(path) == "analytic":
        return load_analytic(path, device)
    return load_pixels(path, device, dtype)


def kind(folder: Path) -> str:
    """Which backend a folder is for; ValueError where config.json is not there or broken."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config.get("backend", "edm")
