"""The one way to load a backend: a path, a shipped model, or a name on the hub."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from backends.base import ON_PIXELS, Backend, ModelOptions
from backends.edm import load_edm, pixel_backend
from backends.mixture import CPU, load_mixture
from backends.parametrization import without_signal
from solvers.recipe import Recipe
from src.files import read_json

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "src" / "models"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INDEX = "model_index.json"
DEFAULT = "fashion-mnist-32"
SAME_SIZE = 0.1
"""By how much the side of a square of the same area may differ, for pictures in other ratios."""


def shipped_models() -> list[str]:
    """The names of the models that the repo ships."""
    marks = [*SHIPPED.glob("*/config.json"), *SHIPPED.glob(f"*/{INDEX}")]
    return sorted(path.parent.name for path in marks)


def find_model(name: str) -> Path:
    """A path as it is, a shipped name as its folder, a name on the hub (who/what) as it is.

    Raises ValueError where it is none of them.
    """
    for path in (Path(name), SHIPPED / name):
        if path.exists():
            return path
    owner, ours = name.partition("/")[0], {"weights", *(p.name for p in ROOT.glob("[!.]*/"))}
    of_file = Path(name).suffix in (".pkl", ".ckpt", ".safetensors")
    if HUB_NAME.fullmatch(name) and not of_file and owner not in ours:
        return Path(name)
    names = ", ".join(shipped_models())
    raise ValueError(
        f"no model at {name!r}: give a folder, an EDM .pkl, a .ckpt or .safetensors file, "
        f"a name on the hub, or one of {names}"
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
    if options and options.config and not path.is_file():
        raise ValueError(f"a model_config is for single files: leave it out for {name}")
    is_single_file = path.is_file() and path.suffix in (".ckpt", ".safetensors")
    if (path / INDEX).is_file() or not path.exists() or is_single_file:
        from backends.pipelines import load_pipeline  # noqa: PLC0415 (diffusers, when asked for)

        return load_pipeline(str(path), device, dtype, options or ModelOptions())
    channels_last = bool(options and options.channels_last)
    if options and options != ModelOptions(channels_last=channels_last):
        others = "sizes, parts of pipelines or predictors of text-to-image models"
        raise ValueError(f"{name} is on pixels: it takes no prompts, {others}")
    if path.is_dir() and kind(path) == "analytic":
        return load_mixture(path, device)
    network = load_edm(path, device, dtype or torch.float32, channels_last=channels_last)
    return pixel_backend(network, device)


@dataclass(frozen=True)
class Published:
    """Where the model of a published predictor is looked for, and where it comes from."""

    files: tuple[str, ...]  # within src/<data set>/, and the folder of weights
    source: str
    variable: str | None = None  # of the environment
    hub: str | None = None


EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained (0.2 to 1.2 GB)"
BACKBONES = {
    "cifar10/edm": Published(("edm-cifar10-32x32-uncond-vp.pkl", "*.pkl"), EDM),
    "ffhq/edm": Published(("edm-ffhq-64x64-uncond-vp.pkl", "*.pkl"), EDM),
    "imagenet64/edm": Published(("edm-imagenet-64x64-cond-adm.pkl", "*.pkl"), EDM),
    "lsun_bedroom_ldm/ldm": Published(
        ("model.ckpt", "lsun_bedroom_ldm/model.ckpt"),
        "CompVis' lsun_beds256 (ommer-lab.com/files/latent-diffusion/lsun_bedrooms.zip, 2 GB)",
    ),
    "ms_coco/ldm": Published(
        ("v1-5-pruned-emaonly.safetensors", "v1-5-pruned-emaonly.ckpt", "stable-diffusion-v1-5"),
        "v1-5-pruned-emaonly (4.3 GB) of stable-diffusion-v1-5/stable-diffusion-v1-5 on the hub",
        "EPD_SD15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "ms_coco/sd3": Published(
        ("stable-diffusion-3-medium-diffusers",),
        "stabilityai/stable-diffusion-3-medium-diffusers (15.5 GB) on the hub",
        "EPD_SD3",
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    "ms_coco/flux": Published(
        ("FLUX.1-dev",),
        "black-forest-labs/FLUX.1-dev (33.7 GB) on the hub",
        "EPD_FLUX",
        "black-forest-labs/FLUX.1-dev",
    ),
}
"""By the data set and the backend of a recipe."""


def backbone_of(recipe: Recipe | None, root: Path = ROOT, default: str | None = None) -> str:
    """The model that a predictor was learned for, where it is: a path, or a shipped or hub name.

    That is what its own run was given, or, for a published predictor, the first of `places_of`
    that is there; else `default`, or the shipped default without a recipe.

    Raises ValueError where it is nowhere without a `default`, with its source and the places.
    """
    if recipe is None or recipe.dataset_name == "unknown":
        return default or DEFAULT
    own = recipe.training.get("model")
    places = places_of(recipe, root)
    shipped = [recipe.dataset_name] if recipe.dataset_name in shipped_models() else []
    for place in (*([own] if own else []), *shipped, *places):
        if Path(place).exists() or place in shipped_models() or cached(place):
            return str(place)
    if default:
        return default
    backbone = BACKBONES.get(f"{recipe.dataset_name}/{recipe.backend}")
    source = f": it is {backbone.source}" if backbone else ""
    looked = f", looked for at {', '.join(places)}" if places else ""
    raise ValueError(
        f"the predictor is for {own or recipe.dataset_name} ({recipe.backend}){looked}{source}; "
        "give its folder or file with --model"
    )


def published_model(dataset: str, backend: str = "auto") -> str:
    """The model of a published data set's name, where it is; any other name as it is.

    Raises ValueError where it is nowhere, with its source and the places.
    """
    families = [k.partition("/")[2] for k in BACKBONES if k.startswith(f"{dataset}/")]
    families = [family for family in families if backend in ("auto", family)]
    if not families or dataset in shipped_models():
        return dataset
    recipes = [Recipe(2, 1, dataset_name=dataset, backend=family) for family in families]
    places = [place for recipe in recipes for place in places_of(recipe)]
    for place in places:
        if Path(place).exists() or cached(place):
            return place
    source = " or ".join(BACKBONES[f"{dataset}/{family}"].source for family in families)
    raise ValueError(f"no model of {dataset} at {', '.join(places)}: it is {source}; give --model")


def places_of(recipe: Recipe, root: Path = ROOT) -> list[str]:
    """Where the model of a published predictor may be, in the order in which it is looked for."""
    backbone = BACKBONES.get(f"{recipe.dataset_name}/{recipe.backend}")
    if backbone is None:
        return []
    places = [os.environ.get(backbone.variable or "", "")]
    weights = Path(os.environ.get("EPD_WEIGHTS", root / "weights"))
    for folder in (root / "src" / recipe.dataset_name, weights):
        for file in backbone.files:
            matches = sorted(folder.glob(file)) if "*" in file and folder != weights else []
            places += [str(path) for path in matches] or [str(folder / file)] * ("*" not in file)
    return [place for place in (*places, backbone.hub or "") if place]


def cached(name: str) -> bool:
    """Whether a name on the hub is in its cache on this machine."""
    if not HUB_NAME.fullmatch(name):
        return False
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (text to image alone)

    return isinstance(try_to_load_from_cache(name, INDEX), str)


def kind(folder: Path) -> str:
    """Which backend a folder is for; ValueError where config.json is not there or broken."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config.get("backend", "edm")


def usual_size(recipe: Recipe | None) -> tuple[int, int] | None:
    """Height and width that a predictor was learned at; None on pixels and for published LDMs."""
    side = recipe.img_resolution if recipe and recipe.backend not in {*ON_PIXELS, "ldm"} else None
    return None if side is None else (side, side)


def check_fit(recipe: Recipe, backend: Backend) -> None:
    """ValueError where a predictor was learned for another family or resolution than the model's.

    Of families on pixels, any will do: their levels are the same.
    """
    if recipe.backend != backend.family and not {recipe.backend, backend.family} <= {*ON_PIXELS}:
        own = f"the predictor is for {recipe.backend} ({recipe.dataset_name})"
        raise ValueError(f"{own}, the model is of {backend.family}: choose one of its family")
    if reason := without_signal(recipe, backend.config.get("scheduler", {})):
        raise ValueError(f"the predictor for {recipe.dataset_name} {reason}")
    if recipe.backend == "ldm" or recipe.img_resolution is None:
        return  # the published recipes of LDMs give latents, or a size that is not theirs
    height, width = backend.size
    if math.isclose(math.sqrt(height * width), recipe.img_resolution, rel_tol=SAME_SIZE):
        return
    learned = f"the predictor is for {recipe.img_resolution} pixels ({recipe.dataset_name})"
    size = f"{width}" if height == width else f"{height}x{width}"
    sized = backend.family not in ON_PIXELS
    way = f"add --resolution {recipe.img_resolution}" if sized else "choose one of its size"
    raise ValueError(f"{learned}, the model makes {size}: {way}")
