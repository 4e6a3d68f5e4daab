"""Where diffusers' pipelines are opened: folders, names on the hub, single files.

This module and `drop_in` alone import diffusers; `load` imports it when a model asks for it.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from backends.base import Backend, ModelOptions
from backends.flux import flux_backend
from backends.ldm import sd_backend, uncond_backend
from backends.sd3 import sd3_backend

CONFIGS = Path(__file__).resolve().parent.parent / "src" / "configs"
TEXT_PREFIX = "cond_stage_model.transformer."
BROKEN = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)
ANYTHING = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Kind:
    """A pipeline's class, the backend made of it, and where its best known weights come from."""

    backend: Callable[[Any, torch.device, ModelOptions], Backend]
    source: str
    gigabytes: float
    marks: tuple[str, ...] = ()  # names of tensors by which a single file is known
    config: str | None = None  # the shipped folder with what a single file lacks


KINDS = {
    "StableDiffusionPipeline": Kind(
        sd_backend,
        "stable-diffusion-v1-5/stable-diffusion-v1-5 (v1-5-pruned-emaonly.safetensors)",
        4.3,
        ("model.diffusion_model.input_blocks.0.0.weight",),
        "stable-diffusion-v1-5",
    ),
    "LDMPipeline": Kind(uncond_backend, "CompVis/ldm-celebahq-256", 1.3),
    "StableDiffusion3Pipeline": Kind(
        sd3_backend,
        "stabilityai/stable-diffusion-3-medium-diffusers",
        15.5,
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",),
    ),
    "FluxPipeline": Kind(
        flux_backend,
        "black-forest-labs/FLUX.1-dev",
        33.7,
        (
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        ),
    ),
}


def load_pipeline(
    name: str, device: torch.device, dtype: torch.dtype, options: ModelOptions
) -> Backend:
    """The backend of a pipeline folder, a name on the hub, or a single file of weights.

    Raises ValueError, in one line, for what is not there, not whole, or of an unknown kind.
    """
    quiet()
    path = Path(name)
    pipe = single_file(path, dtype, options) if path.is_file() else opened(name, dtype)
    pipe.set_progress_bar_config(disable=True)
    if options.cpu_offload:
        if device.type == "cpu":
            raise ValueError("cpu_offload needs a GPU: leave it out on the CPU")
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return wrap(pipe, device, options)


def wrap(pipe: Any, device: torch.device, options: ModelOptions | None = None) -> Backend:
    """The backend of a pipeline that is open already; ValueError for an unknown kind."""
    return kind_of(type(pipe).__name__).backend(pipe, device, options or ModelOptions())


def kind_of(class_name: str) -> Kind:
    """The kind of a pipeline; ValueError for one that is not known."""
    if class_name not in KINDS:
        raise ValueError(f"{class_name} is not served: {', '.join(KINDS)} are")
    return KINDS[class_name]


def quiet() -> None:
    """No bars and no chatter while weights are read."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# --- folders and names --------------------------------------------------------------------


def opened(name: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or a name; on the hub, diffusers fetches what is not cached."""
    try:
        index = diffusers.DiffusionPipeline.load_config(name)
    except OSError as error:
        known = [k for k in KINDS.values() if k.source.split(" ")[0] == name]
        size = f" ({known[0].gigabytes} GB)" if known else ""
        raise ValueError(
            f"no model {name!r}{size} here, and no hub has given one: "
            "copy its folder to this machine and give it with --model"
        ) from error
    class_name = index["_class_name"]
    kind_of(class_name)
    check_parts(Path(name), index)
    extra = {part: None for part, made_by in index.items() if made_by == [None, None]}
    if class_name == "StableDiffusionPipeline":
        extra["safety_checker"] = None
    try:
        return getattr(diffusers, class_name).from_pretrained(name, dtype=dtype, **extra)
    except (OSError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


def check_parts(folder: Path, index: Mapping[str, Any]) -> None:
    """ValueError for a part of a local pipeline folder that has a config and no weights."""
    if not folder.is_dir():
        return
    kind = KINDS[index["_class_name"]]
    for part, made_by in index.items():
        if not isinstance(made_by, list | tuple) or made_by[0] is None or part == "safety_checker":
            continue
        if not (folder / part).is_dir():
            raise ValueError(f"{folder / part} is missing: {source_of(kind)}")
        is_model = (folder / part / "config.json").is_file()
        if is_model and not any(any((folder / part).glob(p)) for p in ANYTHING):
            raise ValueError(f"{folder / part} has no weights (.safetensors): {source_of(kind)}")


def source_of(kind: Kind) -> str:
    """Where such a model comes from, and how to say where a copy is."""
    return (
        f"the whole is {kind.source} on the hub, {kind.gigabytes} GB; "
        "give the folder of a local copy with --model"
    )


# --- single files -------------------------------------------------------------------------


def single_file(path: Path, dtype: torch.dtype, options: ModelOptions) -> Any:
    """The pipeline of one file in its makers' layout; ValueError for one that is not known.

    What the file lacks comes from the folder `options.config`: for Stable Diffusion 1.x one is
    shipped.
    """
    tensors = read_tensors(path)
    found = [n for n, kind in KINDS.items() if any(mark in tensors for mark in kind.marks)]
    if not found:
        raise ValueError(f"{path}: its tensors are of no model that is known ({', '.join(KINDS)})")
    shipped = KINDS[found[0]].config
    folder = options.config or (str(CONFIGS / shipped) if shipped else None)
    if folder is None:
        raise ValueError(
            f"{path}: a single file of {found[0]} lacks tokenizers and more: give a diffusers "
            f"folder with --model_config ({KINDS[found[0]].source} on the hub)"
        )
    try:
        if found[0] == "StableDiffusionPipeline":
            return sd_from_tensors(tensors, folder, dtype)
        return from_single_file(found[0], path, folder, dtype, tensors)
    except (OSError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} with the config of {folder}: {first_line(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped into memory; ValueError for one that is broken."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return checkpoint_tensors(path)
    except (*BROKEN, SafetensorError) as error:
        raise ValueError(f"{path}: no weights that can be read: {first_line(error)}") from error


def checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch checkpoint; nothing that it names is run.

    `torch.load(weights_only=True)` reads it, with a stand-in that does nothing for every other
    class that it names (trainers leave such in theirs).
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins: list[Any] = [(StandIn, name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    while isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, no tensors by name")
    return {str(name): v for name, v in content.items() if isinstance(v, Tensor)}


class StandIn:
    """What becomes of an object of a class that a checkpoint names and nobody needs."""

    def __new__(cls, *_: object) -> "StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def sd_from_tensors(tensors: dict[str, Tensor], folder: str, dtype: torch.dtype) -> Any:
    """A StableDiffusionPipeline from tensors in the layout of its makers."""
    parts: dict[str, Any] = {
        "text_encoder": clip_from_tensors(tensors, Path(folder) / "text_encoder").to(dtype)
    }
    for part, made_by in (
        ("unet", diffusers.UNet2DConditionModel),
        ("vae", diffusers.AutoencoderKL),
    ):
        parts[part] = made_by.from_single_file(
            dict(tensors), config=folder, subfolder=part, dtype=dtype
        )
    return diffusers.StableDiffusionPipeline.from_pretrained(
        folder, **parts, safety_checker=None, feature_extractor=None, dtype=dtype
    )


def clip_from_tensors(tensors: Mapping[str, Tensor], config: Path) -> CLIPTextModel:
    """The text encoder among a checkpoint's tensors, under any transformers' names for them."""
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(config))
    own = model.state_dict()
    prefix = "text_model." if any(n.startswith("text_model.") for n in own) else ""
    renamed = {
        prefix + n.removeprefix(TEXT_PREFIX).removeprefix("text_model."): t
        for n, t in tensors.items()
        if n.startswith(TEXT_PREFIX)
    }
    model.load_state_dict({n: t for n, t in renamed.items() if not n.endswith("position_ids")})
    return model.eval()


def from_single_file(
    class_name: str, path: Path, folder: str, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> Any:
    """An SD3 or FLUX pipeline, from a file and a folder with what it lacks; T5 may be neither."""
    extra: dict[str, Any] = {}
    in_file = any(n.startswith("text_encoders.t5") for n in tensors)
    in_folder = any(any((Path(folder) / "text_encoder_3").glob(p)) for p in ANYTHING)
    if class_name == "StableDiffusion3Pipeline" and not (in_file or in_folder):
        extra = {"text_encoder_3": None, "tokenizer_3": None}
    return getattr(diffusers, class_name).from_single_file(
        str(path), config=folder, dtype=dtype, local_files_only=True, **extra
    )


def first_line(error: BaseException) -> str:
    """The start of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
