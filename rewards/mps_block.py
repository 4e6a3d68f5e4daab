"""The cross-attention stack of MPS: image tokens ask, text tokens answer.

B images, Q image tokens (queries), L text tokens (context), D channels, h heads of c channels.
Names of parameters are those of the published file. All norms and projections have no bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    Named(Cross(dim, dim_head, heads, ff_mult)),
                    Named(Parallel(dim, dim_head, heads, ff_mult)),
                )
            )
            for _ in range(layer_num)
        )

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Queries [B, Q, D], context [B, L, D], mask [B, L] (0 or -inf) -> [B, Q, D]."""
        for layer in self.layers:
            cross, own = (block.get_submodule("fn") for block in layer.children())
            queries = queries + cross(queries, context, mask)
            queries = queries + own(queries)
        return queries


class Named(nn.Module):
    """Puts `fn` into the names of a block's parameters."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn


class Cross(nn.Module):
    """Attention of normed queries to the context, and a feed-forward of them beside it."""

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
        """As Stack, without the sum."""
        normed = self.norm(queries)
        q = self.to_q(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(context).chunk(2, -1)
        return self.to_out(attend(q, k, v, mask)) + self.ff(normed)


class Parallel(nn.Module):
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
        """[B, Q, D] -> [B, Q, D], without the sum."""
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, -1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.attn_out(attend(rotate(q), rotate(k), v, None)) + self.ff_out(ff)


class SwiGLU(nn.Module):
    """silu(second half) * first half."""

    def forward(self, x: Tensor) -> Tensor:
        """[*, 2 C] -> [*, C]."""
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
