"""ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977): BLIP reads the prompt while it looks.

The published networks are those of transformers under other names, so the published state dict
is renamed and loaded into them. B images, P prompts, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rewards.clip import LinearStack
from rewards.pixels import Preprocess
from rewards.registry import Loader
from rewards.states import State, fill, read_state, renamed, within
from rewards.towers import TextCache, autocast, half_for

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over the authors' images; the score is measured in these."""
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    "norm.": "post_layernorm.",
}
BLOCK = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
UNUSED = ("vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias")
"""Of BLIP's pretraining; in the file, and of no use to the score."""


@dataclass(frozen=True)
class BlipSizes:
    """Of the networks; the published ones are ViT-L/16 and BERT-base."""

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocabulary: int = 30524
    positions: int = 512
    tokens: int = 35  # prompts are cut or filled to these


class Blip(nn.Module):
    """The image tower, the text tower that asks it, and the head."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        vision = transformers.BlipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image,
            patch_size=sizes.patch,
            layer_norm_eps=1e-6,
        )
        text = transformers.BlipTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=sizes.positions,
            layer_norm_eps=1e-12,
        )
        blip: Any = transformers.models.blip.modeling_blip_text
        self.vision = transformers.BlipVisionModel(vision)
        self.text = blip.BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearStack(sizes.text_width)

    def forward(self, pixels: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """Pixels [B, 3, S, S], tokens and which of them are there [B, L] -> [B, text_width]."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(tokens, attention_mask=present, encoder_hidden_states=seen)
        return read.last_hidden_state[:, 0]


@dataclass(frozen=True)
class ImageReward:
    """About -2 to 2, signed: a Reward. It is the package's value, without a shift for training."""

    networks: Blip
    tokens: TextCache  # P prompts -> [P, 2, L]: tokens, and which of them are there
    preprocess: Preprocess
    device: torch.device
    amp: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens, present = self.tokens(prompts).to(self.device).unbind(1)
        pixels = self.preprocess(images.to(self.device))
        with autocast(self.device, self.amp):
            features = self.networks(pixels, tokens, present)
        return ((self.networks.head(features.float()) - MEAN) / STD).to(images.device)


def load(loader: Loader, sizes: BlipSizes | None = None) -> ImageReward:
    """The reward `imagereward`."""
    path, bert, setup = loader.path("imagereward"), loader.path("bert"), loader.setup
    sizes = sizes or BlipSizes()
    tokens = TextCache(tokenizer(bert, sizes))
    networks = load_state(read_state(path), sizes, str(path), setup.device, setup.amp)
    return ImageReward(networks, tokens, Preprocess(sizes.image), setup.device, setup.amp)


def load_state(
    state: State, sizes: BlipSizes, source: str, device: torch.device, amp: bool = False
) -> Blip:
    """The networks with the tensors of the published state dict; the head stays float32."""
    vision = renamed(within(state, "blip.visual_encoder."), VISION)
    for old, new in BLOCK:
        vision = {name.replace(old, new): value for name, value in vision.items()}
    text = renamed(within(state, "blip.text_encoder."), {}, ("position_ids",))
    parts = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    rest = renamed(state, {}, UNUSED)
    ours = {name: value for name, value in rest.items() if not name.startswith(parts)}
    for prefix, tensors in (("vision", vision), ("text", text), ("head", within(state, "mlp."))):
        ours |= {f"{prefix}.{name}": value for name, value in tensors.items()}
    networks = fill(lambda: Blip(sizes), ours, source, device, half_for(device, amp))
    networks.head.float()
    return networks


def tokenizer(path: Path, sizes: BlipSizes) -> Any:
    """P prompts -> [P, 2, L] by the vocabulary in a folder, or beside a vocab.txt."""
    folder = path.parent if path.is_file() else path
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise ValueError(f"{folder}: it has neither vocab.txt nor tokenizer.json of BERT")
    own: Any = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    if len(own) > sizes.vocabulary:
        raise ValueError(f"{folder}: {len(own)} tokens, more than the {sizes.vocabulary} known")
    options = {"padding": "max_length", "truncation": True, "max_length": sizes.tokens}

    def tokenise(prompts: Sequence[str]) -> Tensor:
        tokens = own(list(prompts), return_tensors="pt", **options)
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1)

    return tokenise
