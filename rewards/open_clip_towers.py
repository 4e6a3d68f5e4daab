"""Models of open_clip, built from their configs without downloading anything."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.pixels import MEAN, STD
from rewards.states import State, fill, read_state
from rewards.towers import Look, Towers
from src.files import read_json

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
Tokenise = Callable[[Sequence[str]], Tensor]


def library() -> Any:
    """-> open_clip, imported when it is asked for."""
    import open_clip  # noqa: PLC0415

    return open_clip


def known_config(name: str) -> dict[str, Any]:
    """-> the sections of a model that open_clip knows by name."""
    found = library().get_model_config(name)
    assert found is not None, name
    return found


def load_folder(folder: Path, device: torch.device, amp: bool) -> Towers:
    """-> the towers of a folder with open_clip_config.json, its weights and its tokenizer."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{folder / CONFIG}: it has no object 'model_cfg'")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"{folder}: it has neither {WEIGHTS[0]} nor {WEIGHTS[1]}")
    own = config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    tokens: Any = library().get_tokenizer(f"local-dir:{folder}") if own else None
    state = read_state(weights)
    return towers(
        fill(lambda: build(config["model_cfg"]), state, str(weights), device),
        tokens or tokenizer(config["model_cfg"]),
        look(config["model_cfg"], config.get("preprocess_cfg") or {}, folder),
        amp,
    )


def load_state(
    state: State, config: Mapping[str, Any], source: str, device: torch.device, amp: bool
) -> Towers:
    """-> the towers of a config and a state dict, with CLIP's own tokenizer and normalisation."""
    network = fill(lambda: build(config), state, source, device)
    return towers(network, tokenizer(config), Look(config["vision_cfg"]["image_size"]), amp)


def build(config: Mapping[str, Any]) -> nn.Module:
    """-> an untrained model. ValueError for a config that open_clip does not know."""
    sections = {name: value for name, value in config.items() if name != "custom_text"}
    text = config.get("text_cfg", {})
    custom = config.get("custom_text") or "hf_model_name" in text
    kind = library().CustomTextCLIP if custom else library().CLIP
    try:
        return kind(**sections)
    except TypeError as error:
        raise ValueError(f"this open_clip config is not known: {error}") from error


def tokenizer(config: Mapping[str, Any]) -> Tokenise:
    """-> CLIP's own tokenizer: P prompts -> [P, L], cut to L, zeros after the end."""
    length = config.get("text_cfg", {}).get("context_length", 77)
    return library().SimpleTokenizer(context_length=length)


def look(config: Mapping[str, Any], preprocess: Mapping[str, Any], folder: Path) -> Look:
    """-> what the image tower of a folder takes."""
    for key, only in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if preprocess.get(key, only) != only:
            raise ValueError(f"{folder}: {key} {preprocess[key]!r} is not served, only {only}")
    mean, std = preprocess.get("mean", MEAN), preprocess.get("std", STD)
    return Look(config["vision_cfg"]["image_size"], tuple(mean), tuple(std))


def towers(network: Any, tokenise: Tokenise, seen: Look, amp: bool) -> Towers:
    """-> the towers of a loaded model."""
    scale = network.logit_scale
    return Towers(
        seen,
        network.encode_image,
        lambda prompts: network.encode_text(tokenise(list(prompts)).to(scale.device)),
        width(network),
        1.0 if scale.is_meta else float(scale.exp()),
        scale.device,
        amp,
    )


def width(network: Any) -> int:
    """Channels of the embeddings."""
    return int(network.visual.output_dim)
