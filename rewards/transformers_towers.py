"""CLIP models of transformers, from their folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.open_clip_towers import Tokenise, tokenizer
from rewards.pixels import MEAN, STD
from rewards.states import State, fill, read_state, renamed
from rewards.towers import Look, Towers
from src.files import read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json")
UNUSED = (".position_ids",)  # in old files


def library() -> Any:
    """-> transformers, imported when it is asked for."""
    import transformers  # noqa: PLC0415

    return transformers


def load_clip_folder(folder: Path, device: torch.device, amp: bool) -> Towers:
    """-> the towers of a folder with config.json and weights.

    Without a tokenizer in it, CLIP's own is used. ValueError, in one line, for another folder.
    """
    config = read_config(folder)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"{folder}: it has neither {WEIGHTS[0]} nor {WEIGHTS[1]}")
    network = load_state(read_state(weights), config, str(weights), device)
    text = config.text_config
    tokenise = folder_tokenizer(folder, text.max_position_embeddings, text.vocab_size)
    return towers(network, tokenise, read_look(folder, config), amp)


def read_config(folder: Path) -> Any:
    """-> the CLIPConfig of a folder."""
    content = read_json(folder / "config.json")
    if not isinstance(content, dict) or content.get("model_type") != "clip":
        raise ValueError(f"{folder / 'config.json'}: its model_type is not clip")
    try:
        return library().CLIPConfig.from_dict(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def read_look(folder: Path, config: Any) -> Look:
    """-> what the image tower takes, by preprocessor_config.json where it is there."""
    path = folder / "preprocessor_config.json"
    told = read_json(path) if path.is_file() else {}
    mean, std = told.get("image_mean", MEAN), told.get("image_std", STD)
    return Look(config.vision_config.image_size, tuple(mean), tuple(std), int)


def load_state(state: State, config: Any, source: str, device: torch.device) -> Any:
    """-> the CLIPModel of a config with the tensors of a state dict."""
    kept = renamed(state, {}, UNUSED)
    return fill(lambda: library().CLIPModel(config), kept, source, device)


def folder_tokenizer(folder: Path, length: int, vocabulary: int) -> Tokenise:
    """-> the folder's tokenizer, else CLIP's own: P prompts -> [P, length]."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return padded_tokenizer(length, vocabulary, folder)
    own = library().CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenise(prompts: Sequence[str]) -> Tensor:
        told = own(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return told.input_ids

    return tokenise


def padded_tokenizer(length: int, vocabulary: int, source: object) -> Tokenise:
    """-> CLIP's own tokenizer as transformers has it: filled up with the end of text."""
    own: Any = tokenizer({"text_cfg": {"context_length": length}})
    if vocabulary < own.vocab_size:
        raise ValueError(
            f"{source}: it has {vocabulary} tokens, fewer than CLIP's, and no tokenizer of its "
            f"own: put {TOKENIZERS[0]} into it"
        )

    def tokenise(prompts: Sequence[str]) -> Tensor:
        tokens = own(list(prompts))
        after = torch.arange(length) > tokens.argmax(1, keepdim=True)
        return tokens.masked_fill(after, own.eot_token_id)

    return tokenise


def towers(network: Any, tokenise: Tokenise, seen: Look, amp: bool) -> Towers:
    """-> the towers of a loaded CLIPModel."""
    scale = network.logit_scale

    def see(pixels: Tensor) -> Tensor:
        return network.visual_projection(network.vision_model(pixels).pooler_output)

    def read(prompts: Sequence[str]) -> Tensor:
        tokens = tokenise(prompts).to(scale.device)
        return network.text_projection(network.text_model(tokens).pooler_output)

    grown = 1.0 if scale.is_meta else float(scale.exp())
    return Towers(seen, see, read, network.projection_dim, grown, scale.device, amp)
