"""MPS, the overall score (Zhang et al. 2024, arXiv:2405.14705): CLIP ViT-H/14 under a condition.

Image tokens look at those text tokens of the prompt that have to do with the condition, in a
stack of cross-attention. B images, P prompts, L text tokens, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from rewards.mps_block import Stack
from rewards.registry import Shelf
from rewards.states import State, fill, read_module, renamed
from rewards.towers import Look, TextCache, half
from rewards.transformers_towers import Tokenise, padded_tokenizer

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The paper's, for the overall score."""
THRESHOLD = 0.3  # of relevance, relative to the most relevant token
UNUSED = (".position_ids", ".norm.bias", ".pos_emb", ".inv_freq")
"""Buffers of the published file: positions, zeros, and caches of the rotary embedding."""
CLIP_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}
STACK = {"dim": 1024, "layer_num": 4, "dim_head": 64, "heads": 16, "ff_mult": 4}


@dataclass(frozen=True)
class Sizes:
    """Of the networks: the sections of transformers' CLIPConfig, and the arguments of Stack."""

    clip: Mapping[str, Any]
    stack: Mapping[str, int]


PUBLISHED = Sizes(CLIP_H, STACK)


class Networks(nn.Module):
    """CLIP and the stack, by the names of the published file."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.model: Any = transformers.CLIPModel(transformers.CLIPConfig(**sizes.clip))
        self.cross_model = Stack(**sizes.stack)

    def read(self, tokens: Tensor) -> Tensor:
        """Tokens [P, L] -> [P, L + 1, D]: those of the text, and its embedding at last."""
        told = self.model.text_model(tokens)
        both = torch.cat([told.last_hidden_state, told.pooler_output[:, None]], 1)
        return self.model.text_projection(both)

    def see(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> image tokens [B, Q, D]."""
        return self.model.visual_projection(self.model.vision_model(pixels).last_hidden_state)

    def forward(self, pixels: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Pixels [B, 3, S, S], text [B, L + 1, D], mask [B, L] (0 or -inf) -> scores [B]."""
        x = self.cross_model(self.see(pixels), text[:, :-1], mask)[:, 0]
        return self.model.logit_scale.exp() * F.cosine_similarity(text[:, -1], x.float())


def relevant(tokens: Tensor, condition: Tensor) -> Tensor:
    """Text tokens [B, L, D], those of the condition [L, D] -> [B, L]: 0 where relevant, -inf."""
    relevance = (tokens @ condition.T).amax(-1)
    relative = relevance / relevance.amax(-1, keepdim=True)
    return torch.zeros_like(relative).masked_fill(relative <= THRESHOLD, float("-inf"))


@dataclass(frozen=True)
class MPS:
    """exp(logit_scale) * cosine of the prompt and what the image makes of it: a Reward."""

    networks: Networks
    tokenise: Tokenise
    look: Look
    device: torch.device
    amp: bool
    condition: str = CONDITION

    @cached_property
    def texts(self) -> TextCache:
        """B prompts -> [B, L + 1, D]."""
        return TextCache(self._read, size=256)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As Reward."""
        text, condition = self.texts(prompts), self.texts([self.condition])[0, :-1]
        mask, pixels = relevant(text[:, :-1], condition), self.look(images.to(self.device))
        with half(self.device, self.amp):
            return self.networks(pixels, text, mask).float().to(images.device)

    def _read(self, prompts: Sequence[str]) -> Tensor:
        with half(self.device, self.amp):
            return self.networks.read(self.tokenise(prompts).to(self.device)).float()


def load(shelf: Shelf, sizes: Sizes = PUBLISHED) -> MPS:
    """-> the reward."""
    path, setup = shelf.path("mps"), shelf.setup
    networks = load_state(read_module(path), sizes, str(path), setup.device)
    text = networks.model.config.text_config
    tokenise = padded_tokenizer(text.max_position_embeddings, text.vocab_size, path)
    look = Look(networks.model.config.vision_config.image_size, middle=int)
    return MPS(networks, tokenise, look, setup.device, setup.amp)


def load_state(state: State, sizes: Sizes, source: str, device: torch.device) -> Networks:
    """-> the networks with the tensors of the published module."""
    kept = renamed(state, {}, UNUSED)
    return fill(lambda: Networks(sizes), kept, source, device)
