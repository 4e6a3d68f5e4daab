"""Tiny models in the layouts of the published files, random, and images to score."""

import json
from pathlib import Path
from typing import Any

import open_clip
import tokenizers
import torch
import transformers as library
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

transformers: Any = library
PROMPTS = ["a red fox", "two cats on a mat", "a red fox", "rain"]
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 24,
        "head_width": 12,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


def images(count: int = 4, height: int = 40, width: int = 36, seed: int = 0) -> Tensor:
    """[B, 3, H, W] in [0, 1], whole byte levels."""
    g = Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=g) / 255


def shaken(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """-> a state dict of this shape: normal numbers, scales of norms around 1."""
    g = Generator().manual_seed(seed)

    def numbers(shape: torch.Size) -> Tensor:
        inputs = shape[1:].numel() if len(shape) > 1 else 16
        return torch.randn(shape, generator=g) / inputs**0.5

    return {
        name: numbers(v.shape) + (v.ndim == 1 and name.endswith("weight")) if v.ndim else v
        for name, v in network.state_dict().items()
    }


def open_clip_state(config: dict[str, Any] = OPEN_CLIP) -> dict[str, Tensor]:
    """The state dict of a random open_clip model."""
    return shaken(open_clip.CLIP(**config))


def write_open_clip_folder(folder: Path, config: dict[str, Any] = OPEN_CLIP) -> Path:
    """A folder as open_clip writes it."""
    folder.mkdir(exist_ok=True)
    save_file(open_clip_state(config), folder / "open_clip_model.safetensors")
    normal = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    told = {"model_cfg": config, "preprocess_cfg": normal}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


def letters_tokenizer() -> Any:
    """CLIP's tokenizer with no words, only bytes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


def head_state(width: int) -> dict[str, Tensor]:
    """The published linear head, by its names."""
    g = Generator().manual_seed(1)
    ends = [(width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
    state = {}
    for place, (a, b) in zip((0, 2, 4, 6, 7), ends, strict=True):
        state[f"layers.{place}.weight"] = torch.randn(b, a, generator=g) / a**0.5
        state[f"layers.{place}.bias"] = torch.randn(b, generator=g) / 10
    return state
