"""ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977): BLIP reads the prompt while it looks.

The published networks are those of transformers under other names, so the published state dict
is renamed and loaded into them. B images, P prompts, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.clip import LinearStack, TextCache, Tokenise, autocast, half_for, transformers
from rewards.pixels import Preprocess
from rewards.registry import Setup
from rewards.state_dicts import State, fill, read_state, renamed
from rewards.weights import VOCABULARIES

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over the authors' images; the score is measured in these."""
PARTS = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.text_encoder.": "text.",
    "mlp.": "head.",
}
VISION_BLOCK = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
UNUSED = (
    *("vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias"),
    "position_ids",
)
"""Of BLIP's pretraining; in the file, and of no use to the score."""


Sizes = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Of the networks: the arguments of transformers' BlipVisionConfig and BlipTextConfig."""
PUBLISHED: Sizes = (
    {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "image_size": 224, "patch_size": 16},
    },
    {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "vocab_size": 30524, "max_position_embeddings": 512},
    },
)
"""ViT-L/16 and BERT-base."""
LENGTH = 35  # tokens that prompts are cut or filled to


class Blip(nn.Module):
    """The image tower, the text tower that asks it, and the head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        vision = transformers.BlipVisionConfig(**sizes[0], layer_norm_eps=1e-6)
        text = transformers.BlipTextConfig(
            **sizes[1], encoder_hidden_size=vision.hidden_size, layer_norm_eps=1e-12
        )
        blip = transformers.models.blip.modeling_blip_text
        self.vision = transformers.BlipVisionModel(vision)
        self.text = blip.BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearStack(text.hidden_size)

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


def load(setup: Setup, sizes: Sizes = PUBLISHED, length: int = LENGTH) -> ImageReward:
    """The reward `imagereward`. ValueError for missing or other weights, or another vocabulary."""
    path, device, amp = setup.path("imagereward"), setup.device, setup.amp
    tokens = TextCache(tokenizer(setup.path("bert"), sizes[1]["vocab_size"], length))
    networks = load_state(read_state(path), sizes, str(path), device, amp)
    return ImageReward(networks, tokens, Preprocess(sizes[0]["image_size"]), device, amp)


def load_state(
    state: State, sizes: Sizes, source: str, device: torch.device, amp: bool = False
) -> Blip:
    """The networks of the published state dict, the head in float32; ValueError as `fill`."""
    ours = renamed(state, PARTS, UNUSED)
    for old, new in VISION_BLOCK:
        ours = {name.replace(old, new): value for name, value in ours.items()}
    networks = fill(lambda: Blip(sizes), ours, source, device, half_for(device, amp))
    networks.head.float()
    return networks


def tokenizer(path: Path, vocabulary: int, length: int) -> Tokenise:
    """P prompts -> [P, 2, L] by the vocabulary in a folder, or beside a vocab.txt.

    ValueError where there is none, or one that is larger than the network's.
    """
    folder = path.parent if path.is_file() else path
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder}: it has neither {' nor '.join(VOCABULARIES)} of BERT")
    own = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    if len(own) > vocabulary:
        raise ValueError(f"{folder}: {len(own)} tokens, more than the {vocabulary} of the network")
    options = {"padding": "max_length", "truncation": True, "max_length": length}

    def tokenise(prompts: Sequence[str]) -> Tensor:
        tokens = own(list(prompts), return_tensors="pt", **options)
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1)

    return tokenise
