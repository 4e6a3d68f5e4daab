"""MPS, the overall score (Zhang et al. 2024, arXiv:2405.14705): CLIP ViT-H/14 under a condition.

Image tokens look at those text tokens of the prompt that have to do with the condition, in a
stack of cross-attention. B images, P prompts, Q image tokens (queries), L text tokens (context),
D channels, h heads of c channels. Names of parameters are those of the published file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.clip import TextCache, autocast, half_for, tokenizer_for, transformers
from rewards.pixels import Preprocess
from rewards.registry import Setup
from rewards.state_dicts import State, fill, read_state, renamed

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The paper's, for the overall score."""
THRESHOLD = 0.3  # of relevance, relative to the most relevant token
UNUSED = (".position_ids", ".norm.bias", ".pos_emb", ".inv_freq", ".mask")
"""Buffers of the published file: positions, zeros, and caches of the rotary embedding."""


def _tower(width: int, heads: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "projection_dim": 1024, "hidden_act": "gelu"}


CLIP_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": _tower(1024, 16, 24),
    "vision_config": {**_tower(1280, 16, 32), "patch_size": 14, "image_size": 224},
}
Sizes = tuple[Mapping[str, Any], Mapping[str, int]]
"""Of the networks: the sections of transformers' CLIPConfig, and the arguments of Stack."""
PUBLISHED: Sizes = (CLIP_H, {})


# --- the stack: image tokens ask, text tokens answer; no norm and no projection has a bias ----


class Stack(nn.Module):
    """Layers of a cross block and a self block, each added to what it gets."""

    def __init__(
        self,
        dim: int = 1024,
        layer_num: int = 4,
        dim_head: int = 64,
        heads: int = 16,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        sizes = (dim, dim_head, heads, ff_mult)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"fn": kind(*sizes)}) for kind in (Cross, ParallelBlock))
            for _ in range(layer_num)
        )

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Queries [B, Q, D], context [B, L, D], mask [B, L] (0 or -inf) -> [B, Q, D]."""
        for layer in self.layers:
            cross, own = (block.get_submodule("fn") for block in layer.children())
            queries = queries + cross(queries, context, mask)
            queries = queries + own(queries)
        return queries


class Cross(nn.Module):
    """Attention of normed queries to the context, and a feed-forward beside it, as in Stack."""

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        inner = ff_mult * dim
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(dim, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, dim, bias=False)
        )

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm(queries)
        q = self.to_q(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(context).chunk(2, -1)
        return self.to_out(attend(q, k, v, mask)) + self.ff(normed)


class ParallelBlock(nn.Module):
    """Attention of the queries to each other and a feed-forward, by one projection."""

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        inner = ff_mult * dim
        self.widths = [heads * dim_head, dim_head, dim_head, 2 * inner]
        self.norm = nn.LayerNorm(dim, bias=False)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, -1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.attn_out(attend(rotate(q), rotate(k), v, None)) + self.ff_out(ff)


class SwiGLU(nn.Module):
    """silu(second half) * first half, [*, 2 C] -> [*, C]."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return F.silu(second) * first


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, h, Q, c] and one head of keys and values [B, L, c] -> [B, Q, h c]."""
    bias = None if mask is None else mask[:, None, None].to(q.dtype)
    mixed = F.scaled_dot_product_attention(
        q, *(x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v)), attn_mask=bias
    )
    return mixed.transpose(1, 2).flatten(2)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of the positions [*, N, c], by halves (Su et al., arXiv:2104.09864)."""
    n, c = x.shape[-2:]
    rate = 10000 ** (-torch.arange(0, c, 2, device=x.device, dtype=torch.float32) / c)
    angle = torch.arange(n, device=x.device, dtype=torch.float32)[:, None] * rate
    angle = torch.cat([angle, angle], -1)
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


# --- the score ------------------------------------------------------------------------------


class MPSNetworks(nn.Module):
    """CLIP and the stack, by the names of the published file."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        clip, stack = sizes
        self.model = transformers.CLIPModel(transformers.CLIPConfig(**clip))
        self.cross_model = Stack(**stack)

    def read(self, tokens: Tensor) -> Tensor:
        """Tokens [P, L] -> [P, L + 1, D]: those of the text, and its embedding at last."""
        text = self.model.text_model(tokens)
        both = torch.cat([text.last_hidden_state, text.pooler_output[:, None]], 1)
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

    networks: MPSNetworks
    texts: TextCache  # B prompts -> [B, L + 1, D]
    preprocess: Preprocess
    device: torch.device
    amp: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        text, condition = self.texts(prompts), self.texts([CONDITION])[0, :-1]
        mask, pixels = relevant(text[:, :-1], condition), self.preprocess(images.to(self.device))
        with autocast(self.device, self.amp):
            return self.networks(pixels, text, mask).float().to(images.device)


def load(setup: Setup, sizes: Sizes = PUBLISHED) -> MPS:
    """The reward `mps`, of a whole pickled module; ValueError for missing or other weights."""
    path, device, amp = setup.path("mps"), setup.device, setup.amp
    networks = load_state(read_state(path), sizes, str(path), device, amp)
    text, vision = networks.model.config.text_config, networks.model.config.vision_config
    tokenise = tokenizer_for(text.max_position_embeddings, text.vocab_size, path)

    def read(prompts: Sequence[str]) -> Tensor:
        with autocast(device, amp):
            return networks.read(tokenise(prompts).to(device)).float()

    pixels = Preprocess(vision.image_size, middle=int)
    return MPS(networks, TextCache(read, size=256), pixels, device, amp)


def load_state(
    state: State, sizes: Sizes, source: str, device: torch.device, amp: bool = False
) -> MPSNetworks:
    """The networks with the tensors of the published module; ValueError as `fill`."""
    kept = renamed(state, {}, UNUSED)
    return fill(lambda: MPSNetworks(sizes), kept, source, device, half_for(device, amp))
