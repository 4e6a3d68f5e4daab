"""The layers of the published EDM networks, with the published parameter names.

Shapes: B batch, C channels, H, W height and width, E embedding channels. Weights start at zero and
norms at one; nothing here draws random numbers but dropout in training.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one network share."""

    emb_channels: int
    dropout: float
    eps: float
    skip_scale: float
    adaptive_scale: bool
    resample_proj: bool
    channels_per_head: int | None  # None: one head
    resample_filter: tuple[int, ...] = (1, 1)


class Linear(nn.Module):
    """x [..., in] -> [..., out], weights zero until filled."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation with 32 groups, fewer where a group would hold under 4 channels."""
    groups = max(1, min(32, channels // 4))
    if channels % groups:
        raise ValueError(
            f"{channels} channels do not divide into {groups} groups; choose "
            "model_channels and channel_mult that make multiples of 32"
        )
    return nn.GroupNorm(groups, channels, eps)


class Conv2d(nn.Module):
    """A convolution, a halving or doubling of the resolution by a fixed filter, or both.

    `kernel` 0 resamples only and has no weights. With `filter_last` a halving convolution filters
    after its weights instead of before, as the published residual encoder does.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        resample: str = "",
        resample_filter: tuple[int, ...] = (1, 1),
        filter_last: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.filter_last = resample, filter_last
        self.pad, self.filter_pad = kernel // 2, (len(resample_filter) - 1) // 2
        self.is_box = tuple(resample_filter) == (1, 1)
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.zeros(shape)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        square = torch.outer(taps, taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", square if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return self.filtered(x, self.filter_pad)
        if self.filter_last:
            y = F.conv2d(x, self.weight, padding=self.pad + self.filter_pad)
            return self.filtered(y, pad=0) + self.bias[:, None, None]
        if self.resample:
            x = self.filtered(x, self.filter_pad)
        return F.conv2d(x, self.weight, self.bias, padding=self.pad)

    def filtered(self, x: Tensor, pad: int) -> Tensor:
        """x at half or double the resolution; the box filter has kernels of its own."""
        if self.is_box and self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        if self.is_box:
            return F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "up":
            return F.conv_transpose2d(x, taps * 4, groups=channels, stride=2, padding=pad)
        return F.conv2d(x, taps, groups=channels, stride=2, padding=pad)


class PositionalEmbedding(nn.Module):
    """Noise [B] -> cosines, then sines [B, channels], of the Transformer's frequencies."""

    freqs: Tensor

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        half = channels // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu") / (half - endpoint)
        self.register_buffer("freqs", (1 / 10000) ** steps, persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        phase = torch.outer(noise, self.freqs.to(noise.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Noise [B] -> cosines, then sines [B, channels], of random frequencies in a buffer."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.zeros(channels // 2))

    def forward(self, noise: Tensor) -> Tensor:
        phase = torch.outer(noise, self.freqs.to(noise.dtype) * (2 * torch.pi))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """A residual block told the embedding, with self-attention where `attention`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: str = "",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = style.dropout
        self.skip_scale = style.skip_scale
        self.adaptive_scale = style.adaptive_scale
        per_head = style.channels_per_head or out_channels
        self.num_heads = out_channels // per_head if attention else 0

        changed = {"resample": resample, "resample_filter": style.resample_filter}
        self.norm0 = group_norm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **changed)
        wide = out_channels * (2 if style.adaptive_scale else 1)
        self.affine = Linear(style.emb_channels, wide)
        self.norm1 = group_norm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip: Conv2d | None = None
        if out_channels != in_channels or resample:
            kernel = 1 if style.resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **changed)
        if self.num_heads:
            self.norm2 = group_norm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        params = self.affine(emb).to(x.dtype)[:, :, None, None]
        y = self.conv0(F.silu(self.norm0(x)))
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            y = torch.addcmul(shift, self.norm1(y), scale + 1)
        else:
            y = self.norm1(y + params)
        y = self.conv1(F.dropout(F.silu(y), self.dropout, self.training))
        x = self.scaled(y + (x if self.skip is None else self.skip(x)))
        if self.num_heads:
            x = self.scaled(self.proj(self.attend(self.qkv(self.norm2(x)))) + x)
        return x

    def scaled(self, x: Tensor) -> Tensor:
        """x times `skip_scale`."""
        return x if self.skip_scale == 1 else x * self.skip_scale

    def attend(self, qkv: Tensor) -> Tensor:
        """Channels laid out (head, channel, q-k-v) [B, 3C, H, W] -> [B, C, H, W]."""
        b, _, h, w = qkv.shape
        q, k, v = qkv.reshape(b, self.num_heads, -1, 3, h * w).permute(3, 0, 1, 4, 2).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(2, 3).reshape(b, -1, h, w)
