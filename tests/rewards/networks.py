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

from rewards.mps import MPSNetworks
from rewards.pixels import MEAN, STD

transformers: Any = library
PROMPTS = ["a red fox", "two cats on a mat", "a red fox", "rain"]
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TEXT |= {"num_hidden_layers": 2, "projection_dim": 12}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
BLIP_VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
BLIP_VISION |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
BLIP_TEXT = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2}
BLIP_TEXT |= {"num_attention_heads": 3, "vocab_size": 20, "max_position_embeddings": 40}
BLIP = (BLIP_VISION, BLIP_TEXT)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "red", "fox", "two", "cats", "on", "the"]
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
    shape = [transforms.Resize(size, transforms.InterpolationMode.BICUBIC)]
    shape += [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    path: Any = transforms.Compose(shape)
    return torch.stack([path(picture) for picture in pictures(batch)])


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
    """Tensors that hang on their names, as those of parity.json's stacks do."""
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


def head_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published linear head."""
    ends = zip((0, 2, 4, 6, 7), (width, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True)
    return {f"layers.{i}.{k}": s for i, a, b in ends for k, s in linear(a, b).items()}


def head_state(width: int) -> dict[str, Tensor]:
    """A random head."""
    g = Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=g) / (shape[1] ** 0.5 if len(shape) > 1 else 10)
        for name, shape in head_shapes(width).items()
    }


# --- ImageReward ------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]


def linear(inputs: int, outputs: int) -> Shapes:
    return {"weight": (outputs, inputs), "bias": (outputs,)}


def norm(width: int) -> Shapes:
    return {"weight": (width,), "bias": (width,)}


def imagereward_shapes() -> Shapes:
    """The names and shapes of ImageReward.pt, in its order."""
    v, t = BLIP_VISION["hidden_size"], BLIP_TEXT["hidden_size"]
    size, patch, positions = 32, 8, BLIP_TEXT["max_position_embeddings"]
    vision = {"norm1": norm(v), "norm2": norm(v), "attn.qkv": linear(v, 3 * v)}
    vision |= {"attn.proj": linear(v, v), "mlp.fc1": linear(v, 4 * v), "mlp.fc2": linear(4 * v, v)}
    text: dict[str, Shapes] = {}
    for kind, source in (("attention", t), ("crossattention", v)):
        text[f"{kind}.self.query"] = linear(t, t)
        text |= {f"{kind}.self.{one}": linear(source, t) for one in ("key", "value")}
        text |= {f"{kind}.output.dense": linear(t, t), f"{kind}.output.LayerNorm": norm(t)}
    text |= {"intermediate.dense": linear(t, 4 * t), "output.dense": linear(4 * t, t)}
    text["output.LayerNorm"] = norm(t)
    image, words = "blip.visual_encoder", "blip.text_encoder"
    groups: dict[str, Shapes] = {
        image: {"cls_token": (1, 1, v), "pos_embed": (1, (size // patch) ** 2 + 1, v)},
        f"{image}.patch_embed.proj": {"weight": (v, 3, patch, patch), "bias": (v,)},
        **{f"{image}.blocks.{i}.{n}": p for i in range(2) for n, p in vision.items()},
        f"{image}.norm": norm(v),
        f"{words}.embeddings": {
            "position_ids": (1, positions),
            "word_embeddings.weight": (BLIP_TEXT["vocab_size"], t),
            "position_embeddings.weight": (positions, t),
        },
        f"{words}.embeddings.LayerNorm": norm(t),
        **{f"{words}.encoder.layer.{i}.{n}": p for i in range(2) for n, p in text.items()},
        "blip.vision_proj": linear(v, 256),
        "blip.text_proj": linear(t, 256),
        "mlp": head_shapes(t),
    }
    return {f"{name}.{k}": shape for name, part in groups.items() for k, shape in part.items()}


def imagereward_state() -> dict[str, Tensor]:
    """A random ImageReward.pt."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in imagereward_shapes().items():
        inputs = torch.Size(shape[1:]).numel() if len(shape) > 1 else 16
        around = float(len(shape) == 1 and name.endswith("weight"))
        state[name] = around + torch.randn(shape, generator=g) / inputs**0.5
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state | {f"mlp.{k}": v for k, v in head_state(BLIP_TEXT["hidden_size"]).items()}


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
