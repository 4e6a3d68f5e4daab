"""The rewards of the CLIP family: `clip`, `hps`, `pickscore` and `aesthetic`.

Models of open_clip and of transformers behind one face, built from their configs without
downloading anything. CLIP score: arXiv:2104.08718, without its factor 2.5. HPS v2 and v2.1: Wu et
al. 2023, arXiv:2306.09341. PickScore: Kirstain et al. 2023, arXiv:2305.01569. Aesthetic predictor
v2: LAION. B images, P prompts, D channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as library
from torch import Tensor, nn

from rewards.pixels import Preprocess, by_open_clip, by_transformers
from rewards.registry import Setup
from rewards.state_dicts import State, fill, read_state, renamed
from src.files import read_json

VIT_L, VIT_H = "ViT-L-14-quickgelu", "ViT-H-14"
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json")
UNUSED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Beside the weights in OpenAI's own files."""
PART = 64  # prompts that are encoded at once
Tokenise = Callable[[Sequence[str]], Tensor]
"""P prompts -> tokens [P, L]."""
transformers: Any = library


# --- the rewards ----------------------------------------------------------------------------


def load_clip(setup: Setup) -> "Cosine":
    """The reward `clip`: the cosine in ViT-L/14 of OpenAI, or any CLIP, about 0.15 to 0.35."""
    path = setup.path("clip")
    if path not in setup.models:
        setup.models[path] = load_towers(path, setup.device, setup.amp)
    return Cosine(setup.models[path])


def load_hps(setup: Setup, config: Mapping[str, Any] | None = None) -> "Cosine":
    """The reward `hps`, about 0.2 to 0.35. config: sections of another open_clip model.

    As CLIP does, it looks at the centre square; the package hpsv2 puts a picture that is not
    square between black bars. ValueError for another file of weights.
    """
    path, sections = setup.path("hps"), config or config_named(VIT_H)
    state = read_state(path)
    return Cosine(open_clip_towers(state, sections, str(path), setup.device, setup.amp))


def load_pickscore(setup: Setup) -> "Cosine":
    """The reward `pickscore`: exp(logit_scale) * cosine, about 15 to 26."""
    towers = clip_folder(setup.path("pickscore"), setup.device, setup.amp)
    return Cosine(towers, towers.logit_scale)


def load_aesthetic(setup: Setup) -> "Aesthetic":
    """The reward `aesthetic`, on the model that `clip` uses too. ValueError for other weights."""
    path, towers = setup.path("aesthetic"), load_clip(setup).towers
    state = read_state(path)
    head = fill(lambda: LinearStack(towers.width), state, str(path), setup.device)
    return Aesthetic(towers, head)


@dataclass(frozen=True)
class Cosine:
    """scale * cos(image, prompt): a Reward."""

    towers: "Towers"
    scale: float = 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosines = (self.towers.images(images) * self.towers.texts(prompts)).sum(-1)
        return (self.scale * cosines).to(images.device)


@dataclass(frozen=True)
class Aesthetic:
    """1 to 10, whatever the prompt: a Reward."""

    towers: "Towers"
    head: "LinearStack"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.towers.images(images)).to(images.device)


class LinearStack(nn.Module):
    """The head of ImageReward and the aesthetic predictor: linear layers, nothing between.

    [B, D] -> [B], under the names `layers.N` of the published files, which had dropout between.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        layers = (nn.Linear(*sizes[i]) if i in sizes else nn.Identity() for i in range(8))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(-1)


# --- two towers -----------------------------------------------------------------------------


@dataclass
class TextCache:
    """What `encode` makes of each distinct prompt, those asked for last kept."""

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

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        pixels = self.preprocess(images.to(self.device))
        with autocast(self.device, self.amp):
            return F.normalize(self.see(pixels).float(), dim=-1)

    @cached_property
    def texts(self) -> TextCache:
        """B prompts -> [B, D]."""

        def encode(prompts: Sequence[str]) -> Tensor:
            with autocast(self.device, self.amp):
                return F.normalize(self.read(prompts).float(), dim=-1)

        return TextCache(encode)


def half_for(device: torch.device, amp: bool) -> torch.dtype | None:
    """float16 on a GPU, bfloat16 elsewhere; None without `amp`."""
    return None if not amp else torch.float16 if device.type == "cuda" else torch.bfloat16


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """Products in half precision where `amp` asks for it."""
    return torch.autocast(device.type, dtype=half_for(device, True), enabled=amp)


def load_towers(
    path: Path, device: torch.device, amp: bool, config: Mapping[str, Any] | None = None
) -> Towers:
    """The towers of an open_clip folder, a transformers folder, or a file of weights.

    A file may be OpenAI's own, which is TorchScript: its tensors are read, its code is not.
    config: sections of the open_clip model that a file is of; ViT-L/14 with OpenAI's activation.
    ValueError, in one line, for another folder or file.
    """
    if path.is_dir():
        of_folder = open_clip_folder if (path / OPEN_CLIP).is_file() else clip_folder
        return of_folder(path, device, amp)
    state = renamed(read_state(path), {}, UNUSED)
    return open_clip_towers(state, config or config_named(VIT_L), str(path), device, amp)


def open_clip() -> Any:
    """The library, imported when it is asked for, as that takes seconds."""
    import open_clip as module  # noqa: PLC0415

    return module


def config_named(name: str) -> dict[str, Any]:
    """The sections of a model that open_clip knows by name."""
    return open_clip().get_model_config(name)


def open_clip_folder(folder: Path, device: torch.device, amp: bool) -> Towers:
    """The towers of a folder with open_clip_config.json, its weights and its tokenizer.

    ValueError, in one line, for another folder.
    """
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

    def read(prompts: Sequence[str]) -> Tensor:
        return network.encode_text(tokenise(list(prompts)).to(device))

    width, scale = int(network.visual.output_dim), exponential(network.logit_scale)
    pixels = preprocess or Preprocess(config["vision_cfg"]["image_size"])
    return Towers(pixels, network.encode_image, read, width, scale, device, amp)


def config_in(folder: Path, kind: str, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What `read` makes of a folder's config.json; ValueError for a model of another kind."""
    path = folder / "config.json"
    content = read_json(path)
    if not isinstance(content, dict) or content.get("model_type") != kind:
        raise ValueError(f"{path}: its model_type is not {kind}")
    try:
        return read(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def clip_folder(folder: Path, device: torch.device, amp: bool) -> Towers:
    """The towers of a folder with config.json and weights of transformers' CLIPModel.

    Without a tokenizer in it, CLIP's own is used; its preprocessor_config.json is followed where
    there is one. ValueError, in one line, for another folder.
    """
    config = config_in(folder, "clip", transformers.CLIPConfig.from_dict)
    path = weights_in(folder, WEIGHTS)
    network = clip_model(read_state(path), config, str(path), device, amp)
    text, size = config.text_config, config.vision_config.image_size
    tokenise = tokenizer_for(text.max_position_embeddings, text.vocab_size, folder)
    pixels = folder / PREPROCESSOR

    def see(images: Tensor) -> Tensor:
        return network.visual_projection(network.vision_model(images).pooler_output)

    def read(prompts: Sequence[str]) -> Tensor:
        tokens = tokenise(prompts).to(device)
        return network.text_projection(network.text_model(tokens).pooler_output)

    preprocess = by_transformers(read_json(pixels) if pixels.is_file() else {}, size, pixels)
    scale = exponential(network.logit_scale)
    return Towers(preprocess, see, read, network.projection_dim, scale, device, amp)


def clip_model(
    state: State, config: Any, source: str, device: torch.device, amp: bool = False
) -> Any:
    """The CLIPModel of a config with a state dict, positions left out; ValueError as `fill`."""
    kept = renamed(state, {}, (".position_ids",))
    half = half_for(device, amp)
    return fill(lambda: transformers.CLIPModel(config), kept, source, device, half)


def tokenizer_for(length: int, vocabulary: int, place: Path) -> Tokenise:
    """The tokenizer in a folder, else CLIP's own, filled up with the end of text to a length.

    ValueError where its vocabulary is larger than the network's.
    """
    if any((place / name).is_file() for name in TOKENIZERS):
        own = transformers.CLIPTokenizer.from_pretrained(place, local_files_only=True)
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        return lambda prompts: own(list(prompts), return_tensors="pt", **options).input_ids
    usual = open_clip().SimpleTokenizer(context_length=length)
    if vocabulary < usual.vocab_size:
        raise ValueError(
            f"{place}: it has {vocabulary} tokens, fewer than CLIP's, and no tokenizer of its "
            f"own: put {TOKENIZERS[0]} into it"
        )

    def tokenise(prompts: Sequence[str]) -> Tensor:
        tokens = usual(list(prompts))
        after = torch.arange(length) > tokens.argmax(1, keepdim=True)
        return tokens.masked_fill(after, usual.eot_token_id)

    return tokenise


def weights_in(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that a folder has; ValueError where it has none."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: it has neither {' nor '.join(names)}")
    return path


def exponential(scale: Tensor) -> float:
    """Of the learnt logarithm of a scale; 1 for one without numbers."""
    return 1.0 if scale.is_meta else float(scale.exp())
