"""The U-Nets of the published EDM models: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

Written from the papers, with the parameter and buffer names of the published files: Song et al.
2021, arXiv:2011.13456; Dhariwal & Nichol 2021, arXiv:2105.05233; Karras et al. 2022,
arXiv:2206.00364, appendix C and F (what EDM runs of them).

Shapes: B batch, C channels, H = W = img_resolution, E embedding channels, L classes, A
augmentation labels. A network maps x [B, C, H, W], noise [B], labels [B, L] and augment [B, A] to
[B, C, H, W]. Weights start at zero and norms at one: nothing here draws random numbers but dropout
in training and `initialise`, from its generator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from backends.edm_layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    group_norm,
)

__all__ = ["UNet", "build_unet", "initialise"]


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


COMMON = [field.name for field in fields(UNetConfig)][1:-5]
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


class UNet(nn.Module):
    """SongUNet (Song et al. 2021) or DhariwalUNet (Dhariwal & Nichol 2021), as EDM runs them."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.is_song = config.model_type == "SongUNet"
        channels = config.model_channels * config.channel_mult_noise
        wide = config.model_channels * config.channel_mult_emb
        if config.embedding_type == "fourier":
            self.map_noise = FourierEmbedding(channels)
        else:
            self.map_noise = PositionalEmbedding(channels, endpoint=self.is_song)
        if self.is_song:  # parameters stand in the published order
            self.map_label = optional_linear(config.label_dim, channels, bias=True)
        self.map_augment = optional_linear(config.augment_dim, channels)
        self.map_layer0 = Linear(channels, wide)
        self.map_layer1 = Linear(wide, wide)
        if not self.is_song:
            self.map_label = optional_linear(config.label_dim, wide)
        self.enc, skips = encoder(config)
        self.dec = decoder(config, skips)
        if not self.is_song:
            width = config.model_channels * config.channel_mult[0]
            self.out_norm, self.out_conv = (
                group_norm(width),
                Conv2d(width, config.out_channels, 3),
            )

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], noise [B], labels [B, L] one-hot or zeros -> [B, C, H, W]."""
        emb = self.embed(noise, labels, augment)
        x, skips = encoded(self.enc, x, emb)
        x = decoded(self.dec, x, emb, skips)
        return x if self.is_song else self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Noise [B], labels [B, L] and augment [B, A] -> embedding [B, E].

        No labels are "no class", a row of zeros. SongUNet embeds labels with the noise, and has
        its sines first; DhariwalUNet adds them behind the layers.
        """
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


def optional_linear(in_features: int, out_features: int, bias: bool = False) -> Linear | None:
    """A layer for labels, None where there are none."""
    return Linear(in_features, out_features, bias=bias) if in_features else None


def style_of(config: UNetConfig) -> BlockStyle:
    """How the blocks of a network of this kind are made."""
    shared = (config.model_channels * config.channel_mult_emb, config.dropout)
    if config.model_type == "DhariwalUNet":
        return BlockStyle(*shared, 1e-5, 1.0, True, False, 64)
    return BlockStyle(*shared, 1e-6, sqrt(0.5), False, True, None, config.resample_filter)


def encoder(config: UNetConfig) -> tuple[nn.ModuleDict, list[int]]:
    """The blocks from full to lowest resolution by name, and the widths of what each hands on."""
    is_song = config.model_type == "SongUNet"
    style = style_of(config)
    filtered = {"resample": "down", "resample_filter": style.resample_filter}
    blocks: dict[str, nn.Module] = {}
    skips: list[int] = []
    width = aux = config.in_channels
    for level, mult in enumerate(config.channel_mult):
        res = config.img_resolution >> level
        at = f"{res}x{res}"
        if level == 0:
            before, width = width, config.model_channels * (1 if is_song else mult)
            blocks[f"{at}_conv"] = Conv2d(before, width, 3)
        else:
            blocks[f"{at}_down"] = UNetBlock(width, width, style, resample="down")
        skips.append(width)
        if level and config.encoder_type == "skip":
            blocks[f"{at}_aux_down"] = Conv2d(aux, aux, 0, **filtered)
            blocks[f"{at}_aux_skip"] = Conv2d(aux, width, 1)
        if level and config.encoder_type == "residual":
            residual = Conv2d(aux, width, 3, filter_last=True, **filtered)
            blocks[f"{at}_aux_residual"] = residual
            aux = width
        for i in range(config.num_blocks):
            before, width = width, config.model_channels * mult
            attends = res in config.attn_resolutions
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, style, attention=attends)
            skips.append(width)
    return nn.ModuleDict(blocks), skips


def decoder(config: UNetConfig, skips: list[int]) -> nn.ModuleDict:
    """The blocks from lowest to full resolution by name; `skips` are those of the encoder."""
    is_song = config.model_type == "SongUNet"
    style = style_of(config)
    blocks: dict[str, nn.Module] = {}
    last = len(config.channel_mult) - 1
    width, out = skips[-1], config.out_channels
    for level in range(last, -1, -1):
        res = config.img_resolution >> level
        at = f"{res}x{res}"
        if level == last:
            blocks[f"{at}_in0"] = UNetBlock(width, width, style, attention=True)
            blocks[f"{at}_in1"] = UNetBlock(width, width, style)
        else:
            blocks[f"{at}_up"] = UNetBlock(width, width, style, resample="up")
        for i in range(config.num_blocks + 1):
            before, width = width + skips.pop(), config.model_channels * config.channel_mult[level]
            attends = res in config.attn_resolutions and (not is_song or i == config.num_blocks)
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, style, attention=attends)
        if config.decoder_type == "skip" and level < last:
            filters = config.resample_filter
            blocks[f"{at}_aux_up"] = Conv2d(out, out, 0, resample="up", resample_filter=filters)
        if is_song and (config.decoder_type == "skip" or level == 0):
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
    own = [field.name for field in fields(UNetConfig)][1:]
    names = own if model_type == "SongUNet" else COMMON
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
            raise ValueError(f"{name} must be {reason}, not {getattr(config, name)!r}")
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
        fine = fine and (len(value) > 0 or name == "attn_resolutions")
        return "" if fine else "a list of whole numbers above 0"
    if name in ("dropout", "label_dropout"):
        return "" if isinstance(value, int | float) and 0 <= value < 1 else "in [0, 1)"
    lowest = 0 if name in ("label_dim", "augment_dim") else 1
    return "" if isinstance(value, int) and value >= lowest else f"a whole number from {lowest}"


def initialise(unet: nn.Module, generator: Generator) -> None:
    """Fill the weights in place for training, every draw from `generator`.

    Xavier-uniform weights, zero biases, residual branches that start near zero, attention at a
    fifth of the variance, Fourier frequencies N(0, 16^2) (Karras et al. 2022, appendix F.5).
    """
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim < 2:
                continue
            fan_in, fan_out = p[0].numel(), p.shape[0] * prod(p.shape[2:])
            layer = name.rsplit(".", 2)[-2]
            gain = sqrt(0.2) if layer == "qkv" else 1.0
            if layer in ("conv1", "proj", "out_conv") or layer.endswith("_aux_conv"):
                gain = 1e-5
            bound = sqrt(6 / (fan_in + fan_out)) * gain
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
        for name, buffer in unet.named_buffers():
            if name.endswith("map_noise.freqs") and "map_noise.freqs" in unet.state_dict():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 16)
