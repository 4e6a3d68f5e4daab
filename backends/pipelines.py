"""Where diffusers' pipelines are opened: folders, names on the hub, single files.

This module and `scheduler` alone import diffusers; `load` imports them when a model asks.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers as library
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from backends import compvis
from backends.any_pipeline import any_backend, first_line
from backends.base import Backend, ModelOptions
from backends.flux import flux_backend
from backends.ldm import ldm_backend
from backends.sd3 import sd3_backend
from src import pickles

diffusers: Any = library  # its own annotations are not those of what it returns
CONFIGS = Path(__file__).resolve().parent.parent / "src" / "configs"
BROKEN = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Kind:
    """A pipeline's class, the backend made of it, and where its best known weights come from."""

    backend: Callable[[Any, torch.device, ModelOptions], Backend]
    source: str
    gigabytes: float
    marks: tuple[str, ...] = ()  # names of tensors by which a single file is known
    prefixes: Mapping[str, str] = field(default_factory=dict)  # of a file's tensors, by part
    config: str | None = None  # the shipped folder with what a single file lacks
    half: torch.dtype = torch.float16  # what it runs in on a GPU unless told otherwise


KINDS = {
    "StableDiffusionPipeline": Kind(
        ldm_backend,
        "stable-diffusion-v1-5/stable-diffusion-v1-5 (v1-5-pruned-emaonly.safetensors)",
        4.3,
        ("model.diffusion_model.input_blocks.0.0.weight",),
        {
            "unet": "model.diffusion_model.",
            "vae": "first_stage_model.",
            "text_encoder": "cond_stage_model.transformer.",
        },
        "stable-diffusion-v1-5",
    ),
    "LDMPipeline": Kind(ldm_backend, "CompVis/ldm-celebahq-256", 1.3, half=torch.float32),
    "StableDiffusion3Pipeline": Kind(
        sd3_backend,
        "stabilityai/stable-diffusion-3-medium-diffusers",
        15.5,
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",),
        {
            "transformer": "model.diffusion_model.",
            "vae": "first_stage_model.",
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer.",
        },
    ),
    "FluxPipeline": Kind(
        flux_backend,
        "black-forest-labs/FLUX.1-dev",
        33.7,
        (
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        ),
        {"transformer": "", "vae": "first_stage_model."},
        half=torch.bfloat16,
    ),
}


def load_pipeline(
    name: str, device: torch.device, dtype: torch.dtype | None, options: ModelOptions
) -> Backend:
    """The backend of a pipeline folder, a name on the hub, or a single file of weights.

    dtype None is the usual one: the kind's half precision on a GPU, float32 on a CPU.

    Raises ValueError, in one line, for what is not there, not whole, or of an unknown kind.
    """
    for library_of in (diffusers, transformers):  # no bars and no chatter while weights are read
        library_of.utils.logging.disable_progress_bar()
        library_of.utils.logging.set_verbosity_error()
    path = Path(name)
    dtype = torch.float32 if dtype is None and device.type == "cpu" else dtype
    pipe = single_file(path, dtype, options) if path.is_file() else opened(name, dtype)
    pipe.set_progress_bar_config(disable=True)
    for part in filter(lambda part: isinstance(part, torch.nn.Module), pipe.components.values()):
        part.requires_grad_(False)  # what is learned here is a table, never the backbone
        if options.channels_last:
            if any(weight.ndim > 4 for weight in part.parameters()):
                raise ValueError(f"channels_last is for networks of images: {name} makes videos")
            part.to(memory_format=torch.channels_last)
    if options.cpu_offload:
        if device.type == "cpu":
            raise ValueError("cpu_offload needs a GPU: leave it out on the CPU")
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return wrap(pipe, device, options)


def wrap(pipe: Any, device: torch.device, options: ModelOptions | None = None) -> Backend:
    """The backend of a pipeline that is open already; ValueError for one that cannot be served."""
    kind = KINDS.get(type(pipe).__name__)
    return (kind.backend if kind else any_backend)(pipe, device, options or ModelOptions())


# --- folders and names --------------------------------------------------------------------


def opened(name: str, dtype: torch.dtype | None) -> Any:
    """The pipeline of a folder or a name (fetched by diffusers); ValueError if it is not whole."""
    index = read_index(name)
    class_name = str(index.get("_class_name", ""))
    if getattr(diffusers, class_name, None) is None:
        raise ValueError(f"{name}: no pipeline of diffusers is called {class_name[:80]!r}")
    kind = KINDS.get(class_name)
    if missing := lacking(Path(name), index):
        source = f"the whole is {kind.source} on the hub, {kind.gigabytes} GB; " if kind else ""
        raise ValueError(
            f"{Path(name) / missing[0]} has no weights (.safetensors): {source}give the folder of "
            "a local copy with --model"
        )
    return from_folder(name, index, dtype or (kind.half if kind else torch.bfloat16), {})


def read_index(name: str) -> Mapping[str, Any]:
    """The model_index.json of a folder or a name; ValueError where there is none."""
    try:
        with warnings.catch_warnings():  # diffusers asks the hub in a way that it warns of
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")
            index = diffusers.DiffusionPipeline.load_config(name)
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: its model_index.json is no pipeline's") from error
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"{name}: {first_line(error)}") from error
        sources = [k for k in KINDS.values() if k.source.split(" ")[0] == name]
        size = f" ({sources[0].gigabytes} GB)" if sources else ""
        raise ValueError(
            f"no model {name!r}{size} here, and no hub has given one: "
            "copy its folder to this machine and give it with --model"
        ) from error
    parts = [v for key, v in index.items() if not key.startswith("_") and isinstance(v, list)]
    if any(len(part) != 2 for part in parts) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{name}: its model_index.json is no pipeline's")
    return index


def from_folder(
    name: str, index: Mapping[str, Any], dtype: torch.dtype, parts: Mapping[str, Any]
) -> Any:
    """The pipeline of a folder or a name, given some parts; ValueError for a broken file."""
    absent = {part: None for part, made_by in index.items() if made_by == [None, None]}
    if index["_class_name"] == "StableDiffusionPipeline":
        absent |= {"safety_checker": None, "feature_extractor": None}
    folder, half = Path(name), None
    if not folder.is_dir():  # a name in the hub's cache
        cached = try_to_load_from_cache(name, "model_index.json")
        folder = Path(cached).parent if isinstance(cached, str) else None
    if folder:
        files = [weights(folder / part) for part in index]
        for file in (f for names in files for f in names if f.suffix == ".bin"):
            pickles.read_pickle(file)  # inert: what it lets through does torch's reader no harm
        halves = any(names and all(".fp16" in file.name for file in names) for names in files)
        half = "fp16" if halves else None
    import backends.scheduler  # noqa: F401, PLC0415 (saved pipelines may have ours)

    kind = getattr(diffusers, index["_class_name"])
    try:
        return kind.from_pretrained(name, dtype=dtype, variant=half, **{**absent, **parts})
    except (*BROKEN, SafetensorError, AttributeError, TypeError) as error:
        fault = broken_file(folder) if folder else None
        raise ValueError(fault or f"{name}: {first_line(error)}") from error


def weights(part: Path) -> list[Path]:
    """The files of weights in a part's folder."""
    return [file for kind in ("*.safetensors", "*.bin") for file in part.glob(kind)]


def broken_file(folder: Path) -> str | None:
    """What is wrong with the first file of weights that cannot be read."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (*BROKEN, SafetensorError) as error:
            with file.open("rb") as start:
                pointer = start.read(64).startswith(b"version https://git-lfs")
            what = "a pointer of git-lfs: run git lfs pull" if pointer else first_line(error)
            return f"{file}: no weights that can be read: {what}"
    return None


def lacking(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """The parts of a local pipeline folder that are not there, or have a config and no weights."""
    missing: list[str] = []
    for part, made_by in index.items() if folder.is_dir() else ():
        if isinstance(made_by, list | tuple) and made_by[0] and part not in UNUSED:
            is_network = (folder / part / "config.json").is_file()
            if not (folder / part).is_dir() or (is_network and not weights(folder / part)):
                missing.append(part)
    return missing


# --- single files -------------------------------------------------------------------------


def single_file(path: Path, dtype: torch.dtype | None, options: ModelOptions) -> Any:
    """The pipeline of one file in its makers' layout; ValueError for one that is not known."""
    tensors = read_tensors(path)
    if compvis.is_unconditional(tensors):
        try:
            return compvis.ldm_pipeline(tensors, dtype or KINDS["LDMPipeline"].half)
        except (*BROKEN, IndexError) as error:
            raise ValueError(f"{path}: not CompVis' layout: {first_line(error)}") from error
    names = [n for n, kind in KINDS.items() if any(mark in tensors for mark in kind.marks)]
    if not names:
        raise ValueError(f"{path}: its tensors are of no model that is known ({', '.join(KINDS)})")
    family = infer_diffusers_model_type(tensors)
    if names[0] == "StableDiffusionPipeline" and family not in ("v1", "v2"):
        raise ValueError(
            f"{path}: a single file of {family!r} is not served: give its diffusers folder"
        )
    kind = KINDS[names[0]]
    folder = options.config or (str(CONFIGS / kind.config) if kind.config else None)
    if folder is None:
        raise ValueError(
            f"{path}: a single file of {names[0]} lacks tokenizers and more: give a diffusers "
            f"folder with --model_config ({kind.source} on the hub)"
        )
    try:
        return from_tensors(names[0], tensors, folder, dtype or kind.half)
    except (*BROKEN, AttributeError, SingleFileComponentError) as error:
        raise ValueError(f"{path} with the config of {folder}: {first_line(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped into memory; ValueError for one that is broken."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return pickles.read_tensors(path)
    except (*BROKEN, SafetensorError) as error:
        raise ValueError(f"{path}: no weights that can be read: {first_line(error)}") from error


def from_tensors(
    class_name: str, tensors: dict[str, Tensor], folder: str, dtype: torch.dtype
) -> Any:
    """A pipeline of a file's networks, else of a folder's; ValueError where neither has them."""
    index = read_index(folder)
    parts: dict[str, Any] = {}
    for part, prefix in KINDS[class_name].prefixes.items():
        if index[part][0] and any(name.startswith(prefix) for name in tensors):
            parts[part] = network(index[part], tensors, prefix, Path(folder) / part, dtype)
    for part in lacking(Path(folder), index):
        if part == "text_encoder_3" and part not in parts:
            parts |= {part: None, "tokenizer_3": None}
        elif part not in parts:
            raise ValueError(f"neither the file nor {folder} has the weights of {part}")
    return from_folder(folder, index, dtype, parts)


def network(
    made_by: Sequence[str],
    tensors: dict[str, Tensor],
    prefix: str,
    config: Path,
    dtype: torch.dtype,
) -> Any:
    """One network of a file's tensors with this prefix, by a (library, class) of an index."""
    library_name, class_name = made_by
    if library_name == "diffusers":
        return getattr(diffusers, class_name).from_single_file(
            dict(tensors), config=str(config.parent), subfolder=config.name, dtype=dtype
        )
    kind = getattr(transformers, class_name)
    with init_empty_weights(include_buffers=False):  # T5-XXL would be 19 GB of random numbers
        model = kind(kind.config_class.from_pretrained(config))
    there = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    own = {n: own_tensor(n, t, there) for n, t in model.state_dict().items()}
    model.load_state_dict(own, assign=True)
    return model.to(dtype).eval()


def own_tensor(name: str, like: Tensor, there: Mapping[str, Tensor]) -> Tensor:
    """A text encoder's tensor, under any of transformers' names for it; KeyError without one."""
    bare = name.removeprefix("text_model.")
    for alias in (name, bare, f"text_model.{bare}"):
        if alias in there:
            return there[alias]
    if name == "text_projection.weight":
        return torch.eye(len(like))  # CLIP-L of SD3's files has none
    if name == "encoder.embed_tokens.weight":
        return there["shared.weight"]
    raise KeyError(f"the file lacks {name}")
