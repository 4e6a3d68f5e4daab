"""Tiny models in the layouts of the published files, random, and images to score."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tokenizers
import torch
import transformers as library
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torchvision import transforms

from rewards.imagereward import BlipSizes
from rewards.mps import MPSNetworks
from rewards.pixels import MEAN, STD

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
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 12,
}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
BLIP = BlipSizes(32, 8, 16, 2, 2, 24, 2, 3, vocabulary=20, positions=40, tokens=9)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "fox",
    "two",
    "cats",
    "on",
    "the",
]
MPS_STACK = {"dim": 12, "layer_num": 2, "dim_head": 4, "heads": 3, "ff_mult": 4}
MPS_SIZES = ({"text_config": TEXT, "vision_config": VISION, "projection_dim": 12}, MPS_STACK)


def images(count: int = 4, height: int = 40, width: int = 36, seed: int = 0) -> Tensor:
    """[B, 3, H, W] in [0, 1], whole byte levels."""
    g = Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=g) / 255


def pictures(batch: Tensor) -> list[Image.Image]:
    """The same as Pillow has them."""
    pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def by_pillow(batch: Tensor, size: int, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """What torchvision and Pillow make of images for a tower of `size` pixels."""
    path = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    made: list[Any] = [path(picture) for picture in pictures(batch)]
    return torch.stack(made)


def shaken(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of this shape: normal numbers, scales of norms around 1."""
    g = Generator().manual_seed(seed)

    def numbers(shape: torch.Size) -> Tensor:
        inputs = shape[1:].numel() if len(shape) > 1 else 16
        return torch.randn(shape, generator=g) / inputs**0.5

    return {
        name: numbers(v.shape) + (v.ndim == 1 and name.endswith("weight")) if v.ndim else v
        for name, v in network.state_dict().items()
    }


def by_rule(name: str, shape: torch.Size) -> Tensor:
    """The tensors of mps_block.json."""
    k = torch.arange(shape.numel(), dtype=torch.float64)
    wave = (0.37 * k + zlib.crc32(name.encode()) % 1000).sin().reshape(shape)
    return wave * 0.2 if len(shape) > 1 else 1 + wave * 0.1


def open_clip_state(config: dict[str, Any] = OPEN_CLIP) -> dict[str, Tensor]:
    """The state dict of a random open_clip model."""
    return shaken(open_clip.CLIP(**config))


def write_open_clip_folder(folder: Path, config: dict[str, Any] = OPEN_CLIP) -> Path:
    """A folder as open_clip writes it."""
    folder.mkdir(exist_ok=True)
    save_file(open_clip_state(config), folder / "open_clip_model.safetensors")
    normal = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {"model_cfg": config, "preprocess_cfg": normal}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def write_clip_folder(folder: Path, vocabulary: int = 49408) -> Any:
    """A random CLIPModel of transformers, also written to the folder."""
    text = {**TEXT, "vocab_size": vocabulary, "bos_token_id": vocabulary - 2}
    text["eos_token_id"] = vocabulary - 1
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(shaken(model))
    model.save_pretrained(folder)
    return model


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


# --- ImageReward ------------------------------------------------------------------------------


def imagereward_shapes(s: BlipSizes) -> dict[str, tuple[int, ...]]:
    """The names and shapes of ImageReward.pt."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    w, root = s.vision_width, "blip.visual_encoder"
    shapes[f"{root}.cls_token"] = (1, 1, w)
    shapes[f"{root}.pos_embed"] = (1, (s.image // s.patch) ** 2 + 1, w)
    shapes[f"{root}.patch_embed.proj.weight"] = (w, 3, s.patch, s.patch)
    shapes[f"{root}.patch_embed.proj.bias"] = (w,)
    for i in range(s.vision_layers):
        block = f"{root}.blocks.{i}"
        norm(f"{block}.norm1", w)
        norm(f"{block}.norm2", w)
        linear(f"{block}.attn.qkv", w, 3 * w)
        linear(f"{block}.attn.proj", w, w)
        linear(f"{block}.mlp.fc1", w, 4 * w)
        linear(f"{block}.mlp.fc2", 4 * w, w)
    norm(f"{root}.norm", w)
    w, root = s.text_width, "blip.text_encoder"
    shapes[f"{root}.embeddings.position_ids"] = (1, s.positions)
    shapes[f"{root}.embeddings.word_embeddings.weight"] = (s.vocabulary, w)
    shapes[f"{root}.embeddings.position_embeddings.weight"] = (s.positions, w)
    norm(f"{root}.embeddings.LayerNorm", w)
    for i in range(s.text_layers):
        layer = f"{root}.encoder.layer.{i}"
        for kind, source in (("attention", w), ("crossattention", s.vision_width)):
            linear(f"{layer}.{kind}.self.query", w, w)
            linear(f"{layer}.{kind}.self.key", source, w)
            linear(f"{layer}.{kind}.self.value", source, w)
            linear(f"{layer}.{kind}.output.dense", w, w)
            norm(f"{layer}.{kind}.output.LayerNorm", w)
        linear(f"{layer}.intermediate.dense", w, 4 * w)
        linear(f"{layer}.output.dense", 4 * w, w)
        norm(f"{layer}.output.LayerNorm", w)
    linear("blip.vision_proj", s.vision_width, 256)
    linear("blip.text_proj", w, 256)
    widths = (w, 1024, 128, 64, 16, 1)
    for place, i, o in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        linear(f"mlp.layers.{place}", i, o)
    return shapes


def imagereward_state(s: BlipSizes = BLIP) -> dict[str, Tensor]:
    """A random ImageReward.pt."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in imagereward_shapes(s).items():
        inputs = torch.Size(shape[1:]).numel() if len(shape) > 1 else 16
        around = float(len(shape) == 1 and name.endswith("weight"))
        state[name] = around + torch.randn(shape, generator=g) / inputs**0.5
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(s.positions)[None]
    return state | {f"mlp.{k}": v for k, v in head_state(s.text_width).items()}


# --- MPS --------------------------------------------------------------------------------------


class PublishedMPS(nn.Module):
    """A module of the published shape, with what it carries besides parameters."""

    def __init__(self, stranger: object) -> None:
        super().__init__()
        inner = MPSNetworks(MPS_SIZES)
        inner.load_state_dict(shaken(inner))
        inner.model.logit_scale.data.fill_(2.0)
        inner.model.text_projection.weight.data[1:] *= 0.05  # some tokens have little in common
        self.model, self.cross_model = inner.model, inner.cross_model
        for layer in self.cross_model.layers:
            for block in (child.get_submodule("fn") for child in layer.children()):
                norm = block.get_submodule("norm")
                del norm._parameters["bias"]  # a buffer there, as in the published file
                norm.register_buffer("bias", torch.zeros(12))
                block.register_buffer("pos_emb", None)
                block.register_buffer("mask", torch.ones(5, 5))  # what a run left behind
        self.stranger = stranger
