"""Models of the CLIP family, of open_clip and of transformers, behind one face.

Built from their configs without downloading anything. B images, P prompts, D channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.pixels import Preprocess, by_open_clip, by_transformers
from rewards.states import State, fill, read_state, renamed
from src.files import read_json

OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json")
PART = 64  # prompts that are encoded at once
Tokenise = Callable[[Sequence[str]], Tensor]
"""P prompts -> tokens [P, L]."""


@dataclass
class TextCache:
    """What `encode` makes of each distinct prompt, the latest `size` of them kept."""

    encode: Callable[[Sequence[str]], Tensor]
    size: int = 4096
    rows: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, *], the distinct new ones encoded together."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.rows]
        for start in range(0, len(new), PART):
            part = new[start : start + PART]
            with torch.inference_mode(False), torch.no_grad():  # rows serve gradients, too
                rows = self.encode(part)
            self.rows.update((p, row.clone()) for p, row in zip(part, rows, strict=True))
        result = torch.stack([self.rows[p] for p in prompts])
        for prompt in prompts:
            self.rows.move_to_end(prompt)
        while len(self.rows) > self.size:
            self.rows.popitem(last=False)
        return result


@dataclass(frozen=True)
class Towers:
    """Two towers into one space of `width` channels. Embeddings have length 1, in float32.

    see: what `preprocess` made -> [B, D]; read: P prompts -> [P, D]; both of any length.
    """

    preprocess: Preprocess
    see: Callable[[Tensor], Tensor]
    read: Callable[[Sequence[str]], Tensor]
    width: int
    logit_scale: float  # the exponential of the learnt number
    device: torch.device
    amp: bool

    @cached_property
    def texts(self) -> TextCache:
        """B prompts -> [B, D]."""
        return TextCache(self._read)

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        pixels = self.preprocess(images.to(self.device))
        with autocast(self.device, self.amp):
            seen = self.see(pixels)
        return F.normalize(seen.float(), dim=-1)

    def _read(self, prompts: Sequence[str]) -> Tensor:
        with autocast(self.device, self.amp):
            return F.normalize(self.read(prompts).float(), dim=-1)


@dataclass(frozen=True)
class Cosine:
    """scale * cos(image, prompt): a Reward."""

    towers: Towers
    scale: float = 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosines = (self.towers.images(images) * self.towers.texts(prompts)).sum(-1)
        return (self.scale * cosines).to(images.device)


def half_for(device: torch.device, amp: bool) -> torch.dtype | None:
    """float16 on a GPU, bfloat16 elsewhere; None without `amp`."""
    return None if not amp else torch.float16 if device.type == "cuda" else torch.bfloat16


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """Products in half precision where `amp` asks for it."""
    return torch.autocast(device.type, dtype=half_for(device, True), enabled=amp)


# --- open_clip ------------------------------------------------------------------------------


def open_clip() -> Any:
    """The library, imported when it is asked for."""
    import open_clip as library  # noqa: PLC0415

    return library


def known_config(name: str) -> dict[str, Any]:
    """The sections of a model that open_clip knows by name."""
    config = open_clip().get_model_config(name)
    assert config is not None, name
    return config


def open_clip_folder(folder: Path, device: torch.device, amp: bool) -> Towers:
    """The towers of a folder with open_clip_config.json, its weights and its tokenizer."""
    config = read_json(folder / OPEN_CLIP)
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{folder / OPEN_CLIP}: it has no object 'model_cfg'")
    path, model = weights_in(folder, OPEN_CLIP_WEIGHTS), config["model_cfg"]
    tokens: Any = None
    if model.get("text_cfg", {}).get("hf_tokenizer_name"):
        tokens = open_clip().get_tokenizer(f"local-dir:{folder}")
    size = model.get("vision_cfg", {}).get("image_size", 224)
    preprocess = by_open_clip(config.get("preprocess_cfg") or {}, size, folder / OPEN_CLIP)
    return open_clip_towers(read_state(path), model, str(path), device, amp, tokens, preprocess)


def open_clip_towers(
    state: State,
    config: Mapping[str, Any],
    source: str,
    device: torch.device,
    amp: bool = False,
    tokens: Tokenise | None = None,
    preprocess: Preprocess | None = None,
) -> Towers:
    """The towers of a config and a state dict; CLIP's own tokenizer and pixels by default.

    ValueError for a config that open_clip does not know, and as `fill`.
    """
    sections = {name: value for name, value in config.items() if name != "custom_text"}
    text = config.get("text_cfg", {})
    custom = config.get("custom_text") or "hf_model_name" in text
    kind = open_clip().CustomTextCLIP if custom else open_clip().CLIP
    try:
        network = fill(lambda: kind(**sections), state, source, device, half_for(device, amp))
    except TypeError as error:
        raise ValueError(f"this open_clip config is not known: {error}") from error
    length = text.get("context_length", 77)
    tokenise = tokens or open_clip().SimpleTokenizer(context_length=length)
    return Towers(
        preprocess or Preprocess(config["vision_cfg"]["image_size"]),
        network.encode_image,
        lambda prompts: network.encode_text(tokenise(list(prompts)).to(device)),
        int(network.visual.output_dim),
        _exponential(network.logit_scale),
        device,
        amp,
    )


# --- transformers ---------------------------------------------------------------------------


def transformers() -> Any:
    """The library, imported when it is asked for."""
    import transformers as library  # noqa: PLC0415

    return library


def clip_folder(folder: Path, device: torch.device, amp: bool) -> Towers:
    """The towers of a folder with config.json and weights of transformers' CLIPModel.

    Without a tokenizer in it, CLIP's own is used; its preprocessor_config.json is followed where
    there is one. ValueError, in one line, for another folder.
    """
    content = read_json(folder / "config.json")
    if not isinstance(content, dict) or content.get("model_type") != "clip":
        raise ValueError(f"{folder / 'config.json'}: its model_type is not clip")
    try:
        config = transformers().CLIPConfig.from_dict(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    path = weights_in(folder, WEIGHTS)
    network = clip_model(read_state(path), config, str(path), device, amp)
    length, vocabulary = config.text_config.max_position_embeddings, config.text_config.vocab_size
    tokenise = _own_tokenizer(folder, length) or padded_tokenizer(length, vocabulary, folder)
    pixels, size = folder / PREPROCESSOR, config.vision_config.image_size

    def see(images: Tensor) -> Tensor:
        return network.visual_projection(network.vision_model(images).pooler_output)

    def read(prompts: Sequence[str]) -> Tensor:
        tokens = tokenise(prompts).to(device)
        return network.text_projection(network.text_model(tokens).pooler_output)

    return Towers(
        by_transformers(read_json(pixels) if pixels.is_file() else {}, size, pixels),
        see,
        read,
        network.projection_dim,
        _exponential(network.logit_scale),
        device,
        amp,
    )


def _own_tokenizer(folder: Path, length: int) -> Tokenise | None:
    """The tokenizer in a folder: P prompts -> [P, length]."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    own = transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    return lambda prompts: own(list(prompts), return_tensors="pt", **options).input_ids


def clip_model(
    state: State, config: Any, source: str, device: torch.device, amp: bool = False
) -> Any:
    """The CLIPModel of a config with the tensors of a state dict; old files have positions."""
    kept = renamed(state, {}, (".position_ids",))
    half = half_for(device, amp)
    return fill(lambda: transformers().CLIPModel(config), kept, source, device, half)


def padded_tokenizer(length: int, vocabulary: int, source: object) -> Tokenise:
    """CLIP's own tokenizer as transformers has it: filled up with the end of text."""
    own = open_clip().SimpleTokenizer(context_length=length)
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


def weights_in(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that a folder has; ValueError where it has none."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: it has neither {' nor '.join(names)}")
    return path


def _exponential(scale: Tensor) -> float:
    """Of the learnt logarithm of a scale; 1 for one without numbers."""
    return 1.0 if scale.is_meta else float(scale.exp())
