"""The U-Nets of the published EDM models: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

Written from the papers, with the parameter and buffer names of the published files: Song et al.
2021, arXiv:2011.13456; Dhariwal & Nichol 2021, arXiv:2105.05233; Karras et al. 2022,
arXiv:2206.00364, appendix C and F (what EDM runs of them).

Shapes: B batch, C channels, H = W = img_resolution, E embedding channels, L classes, A
augmentation labels. A network maps x [B, C, H, W], noise [B], labels [B, L] and augment [B, A] to
[B, C, H, W]. Weights start at zero and norms at one: nothing here draws random numbers but dropout
in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.inert import shown

MOST_PARTS, LARGEST = 32, 1 << 16
"""Of a list, and of blocks at a resolution; of a number. A config is read before its weights."""


@dataclass(frozen=True)
class UNetConfig:
    """Arguments of a network under their published names, with the published defaults."""

    model_type: str
    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0  # the share of training labels to blank: for the training script
    embedding_type: str = "positional"  # from here on of SongUNet alone
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    @property
    def is_song(self) -> bool:
        """Whether it is of Song et al.'s kind (DDPM++, NCSN++), not of Dhariwal & Nichol's."""
        return self.model_type == "SongUNet"

    @property
    def emb_channels(self) -> int:
        """The width of the embedding of levels and classes."""
        return self.model_channels * self.channel_mult_emb


NAMES = [field.name for field in fields(UNetConfig)][1:]
DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {},
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
    },
}
CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


# --- layers -----------------------------------------------------------------------------------


class Dense(nn.Module):
    """x [..., in] -> [..., out], weights zero until filled."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation in 32 groups, or fewer of 4 channels; ValueError for a remainder."""
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
        resample: str = "",
        taps: tuple[int, ...] = (1, 1),
        *,
        filter_last: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.filter_last = resample, filter_last
        self.pad, self.filter_pad = kernel // 2, (len(taps) - 1) // 2
        self.is_box = taps == (1, 1)
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.zeros(shape)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        line = torch.tensor(taps, dtype=torch.float32)
        square = torch.outer(line, line)[None, None] / line.sum().square()
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


class NoiseEmbedding(nn.Module):
    """Noise [B] -> cosines, then sines [B, channels], of the Transformer's frequencies.

    With `fourier` the frequencies are random, in a buffer of the file; SongUNet's own go to the
    endpoint.
    """

    freqs: Tensor

    def __init__(self, channels: int, *, fourier: bool, endpoint: bool) -> None:
        super().__init__()
        half, self.fourier = channels // 2, fourier
        steps = torch.arange(half, dtype=torch.float32, device=None if fourier else "cpu")
        freqs = torch.zeros(half) if fourier else (1 / 10000) ** (steps / (half - endpoint))
        self.register_buffer("freqs", freqs, persistent=fourier)

    def forward(self, noise: Tensor) -> Tensor:
        freqs = self.freqs.to(noise.dtype)
        phase = torch.outer(noise, freqs * (2 * pi) if self.fourier else freqs)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """A residual block with the embedding, and self-attention where `attention`."""

    def __init__(
        self, before: int, width: int, c: UNetConfig, resample: str = "", attention: bool = False
    ) -> None:
        super().__init__()
        self.dropout, self.is_song = c.dropout, c.is_song
        eps = 1e-6 if c.is_song else 1e-5
        self.num_heads = (1 if c.is_song else width // 64) if attention else 0
        self.norm0 = group_norm(before, eps)
        self.conv0 = Conv2d(before, width, 3, resample, c.resample_filter)
        self.affine = Dense(c.emb_channels, width if c.is_song else 2 * width)
        self.norm1 = group_norm(width, eps)
        self.conv1 = Conv2d(width, width, 3)
        self.skip: Conv2d | None = None
        if width != before or resample:
            kernel = 1 if c.is_song or width != before else 0
            self.skip = Conv2d(before, width, kernel, resample, c.resample_filter)
        if self.num_heads:
            self.norm2 = group_norm(width, eps)
            self.qkv, self.proj = Conv2d(width, width * 3, 1), Conv2d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        params = self.affine(emb).to(x.dtype)[:, :, None, None]
        y = self.conv0(F.silu(self.norm0(x)))
        if self.is_song:
            y = self.norm1(y + params)
        else:
            scale, shift = params.chunk(2, dim=1)
            y = torch.addcmul(shift, self.norm1(y), scale + 1)
        y = self.conv1(F.dropout(F.silu(y), self.dropout, self.training))
        x = self.scaled(y + (x if self.skip is None else self.skip(x)))
        if self.num_heads:
            x = self.scaled(self.proj(self.attend(self.qkv(self.norm2(x)))) + x)
        return x

    def scaled(self, x: Tensor) -> Tensor:
        """SongUNet keeps the variance of its sums."""
        return x * sqrt(0.5) if self.is_song else x

    def attend(self, qkv: Tensor) -> Tensor:
        """Channels laid out (head, channel, q-k-v) [B, 3C, H, W] -> [B, C, H, W]."""
        b, _, h, w = qkv.shape
        q, k, v = qkv.reshape(b, self.num_heads, -1, 3, h * w).permute(3, 0, 1, 4, 2).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(2, 3).reshape(b, -1, h, w)


# --- networks ---------------------------------------------------------------------------------


class UNet(nn.Module):
    """SongUNet (Song et al. 2021) or DhariwalUNet (Dhariwal & Nichol 2021), as EDM runs them."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config, self.is_song = config, config.is_song
        channels = config.model_channels * config.channel_mult_noise
        wide = config.emb_channels

        def labels(count: int, width: int, bias: bool = False) -> Dense | None:
            return Dense(count, width, bias) if count else None

        fourier = config.embedding_type == "fourier"
        self.map_noise = NoiseEmbedding(channels, fourier=fourier, endpoint=self.is_song)
        if self.is_song:  # parameters stand in the published order
            self.map_label = labels(config.label_dim, channels, bias=True)
        self.map_augment = labels(config.augment_dim, channels)
        self.map_layer0, self.map_layer1 = Dense(channels, wide), Dense(wide, wide)
        if not self.is_song:
            self.map_label = labels(config.label_dim, wide)
        self.enc, skips = encoder(config)
        self.dec = decoder(config, skips)
        if not self.is_song:
            width = config.model_channels * config.channel_mult[0]
            self.out_norm = group_norm(width, 1e-5)
            self.out_conv = Conv2d(width, config.out_channels, 3)

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], noise [B], labels [B, L] one-hot or zeros -> [B, C, H, W]."""
        emb = self.embed(noise, labels, augment)
        x, skips = encoded(self.enc, x, emb)
        x = decoded(self.dec, x, emb, skips)
        return x if self.is_song else self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Noise [B], labels [B, L] and augment [B, A] -> embedding [B, E]."""
        dtype = self.map_layer0.weight.dtype
        emb = self.map_noise(noise).to(dtype)
        label = 0
        if self.map_label is not None:
            given = emb.new_zeros(1, self.config.label_dim) if labels is None else labels.to(dtype)
            label = self.map_label(given * sqrt(self.config.label_dim) if self.is_song else given)
        if self.is_song:
            emb = emb.roll(emb.shape[1] // 2, dims=1) + label
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb if self.is_song else emb + label)


def encoder(c: UNetConfig) -> tuple[nn.ModuleDict, list[int]]:
    """The blocks from full to lowest resolution by name, and the widths of what each hands on."""
    blocks: dict[str, nn.Module] = {}
    skips: list[int] = []
    width = aux = c.in_channels
    for level, mult in enumerate(c.channel_mult):
        res = c.img_resolution >> level
        at = f"{res}x{res}"
        if level == 0:
            before, width = width, c.model_channels * (1 if c.is_song else mult)
            blocks[f"{at}_conv"] = Conv2d(before, width, 3)
        else:
            blocks[f"{at}_down"] = UNetBlock(width, width, c, "down")
        skips.append(width)
        if level and c.encoder_type == "skip":
            blocks[f"{at}_aux_down"] = Conv2d(aux, aux, 0, "down", c.resample_filter)
            blocks[f"{at}_aux_skip"] = Conv2d(aux, width, 1)
        if level and c.encoder_type == "residual":
            residual = Conv2d(aux, width, 3, "down", c.resample_filter, filter_last=True)
            blocks[f"{at}_aux_residual"] = residual
            aux = width
        for i in range(c.num_blocks):
            before, width = width, c.model_channels * mult
            attends = res in c.attn_resolutions
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, c, attention=attends)
            skips.append(width)
    return nn.ModuleDict(blocks), skips


def decoder(c: UNetConfig, skips: list[int]) -> nn.ModuleDict:
    """The blocks from lowest to full resolution by name; `skips` are those of the encoder."""
    blocks: dict[str, nn.Module] = {}
    last = len(c.channel_mult) - 1
    width, out = skips[-1], c.out_channels
    for level in range(last, -1, -1):
        res = c.img_resolution >> level
        at = f"{res}x{res}"
        if level == last:
            blocks[f"{at}_in0"] = UNetBlock(width, width, c, attention=True)
            blocks[f"{at}_in1"] = UNetBlock(width, width, c)
        else:
            blocks[f"{at}_up"] = UNetBlock(width, width, c, "up")
        for i in range(c.num_blocks + 1):
            before, width = width + skips.pop(), c.model_channels * c.channel_mult[level]
            attends = res in c.attn_resolutions and (not c.is_song or i == c.num_blocks)
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, c, attention=attends)
        if c.decoder_type == "skip" and level < last:
            blocks[f"{at}_aux_up"] = Conv2d(out, out, 0, "up", c.resample_filter)
        if c.is_song and (c.decoder_type == "skip" or level == 0):
            blocks[f"{at}_aux_norm"] = group_norm(width, 1e-6)
            blocks[f"{at}_aux_conv"] = Conv2d(width, out, 3)
    return nn.ModuleDict(blocks)


def encoded(enc: nn.ModuleDict, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x at the lowest resolution, and what each block hands to the decoder."""
    skips: list[Tensor] = []
    aux = x
    for name, block in enc.items():
        if name.endswith("_aux_down"):
            aux = block(aux)
        elif name.endswith("_aux_skip"):
            x = skips[-1] = x + block(aux)
        elif name.endswith("_aux_residual"):
            x = skips[-1] = aux = (x + block(aux)) * sqrt(0.5)
        else:
            x = block(x) if name.endswith("_conv") else block(x, emb)
            skips.append(x)
    return x, skips


def decoded(dec: nn.ModuleDict, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
    """x at full resolution: what the `_aux_conv`s give where there are any, else the blocks."""
    out: Tensor | None = None
    normed = x
    for name, block in dec.items():
        if name.endswith("_aux_up"):
            out = block(out)
        elif name.endswith("_aux_norm"):
            normed = block(x)
        elif name.endswith("_aux_conv"):
            new = block(F.silu(normed))
            out = new if out is None else out + new
        else:
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
    return x if out is None else out


# --- from arguments ---------------------------------------------------------------------------


def build_unet(model_type: str, arguments: Mapping[str, Any]) -> UNet:
    """A network of class `model_type` from its published arguments, with zero weights.

    Raises ValueError on an unknown class, on arguments the class does not take or lacks, and on
    values that make no network.
    """
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise ValueError(f"unknown network {model_type!r}; known: {', '.join(DEFAULTS)}")
    names = NAMES if model_type == "SongUNet" else NAMES[:-5]
    unknown = sorted(set(arguments) - set(names))
    if unknown:
        raise ValueError(
            f"{model_type} takes no argument {unknown[0]!r}; it takes {', '.join(names)}"
        )
    missing = [name for name in names[:3] if name not in arguments]
    if missing:
        raise ValueError(f"{model_type} needs {', '.join(missing)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    config = UNetConfig(model_type, **{**DEFAULTS[model_type], **given})
    for name in names:
        reason = wanted(name, getattr(config, name))
        if reason:
            raise ValueError(f"{name} must be {reason}, not {shown(getattr(config, name))}")
    halvings = len(config.channel_mult) - 1
    if config.img_resolution % 2**halvings:
        raise ValueError(
            f"img_resolution {config.img_resolution} cannot be halved {halvings} times, as "
            f"channel_mult {config.channel_mult} asks; use a multiple of {2**halvings}"
        )
    return UNet(config)


def wanted(name: str, value: Any) -> str:
    """What an argument must be, or nothing where `value` is that."""
    if name in CHOICES:
        return "" if value in CHOICES[name] else f"one of {', '.join(CHOICES[name])}"
    if name in ("channel_mult", "attn_resolutions", "resample_filter"):
        fine = isinstance(value, tuple) and all(isinstance(v, int) and v > 0 for v in value)
        fine = fine and (len(value) > 0 or name == "attn_resolutions") and len(value) <= MOST_PARTS
        fine = fine and max(value, default=0) <= LARGEST
        return "" if fine else f"a list of up to {MOST_PARTS} whole numbers from 1 to {LARGEST}"
    if name in ("dropout", "label_dropout"):
        return "" if isinstance(value, int | float) and 0 <= value < 1 else "in [0, 1)"
    lowest = 0 if name in ("label_dim", "augment_dim") else 1
    highest = MOST_PARTS if name == "num_blocks" else LARGEST
    fine = isinstance(value, int) and lowest <= value <= highest
    return "" if fine else f"a whole number from {lowest} to {highest}"
