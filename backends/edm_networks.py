"""The U-Nets of the published EDM models: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

Written from the papers, with the parameter and buffer names of the published files:
Song et al. 2021, arXiv:2011.13456 (DDPM++, NCSN++); Dhariwal & Nichol 2021, arXiv:2105.05233
(ADM); Karras et al. 2022, arXiv:2206.00364, appendix C and F (what EDM runs of them).

Shapes: B batch, C channels, H = W = img_resolution, E embedding channels, L classes, A
augmentation labels. A network maps x [B, C, H, W], noise [B], labels [B, L] and augment [B, A] to
[B, C, H, W].
Networks are built with zero weights and draw nothing: `initialise` fills them from a generator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import prod, sqrt
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from backends.edm_layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)

__all__ = [
    "DhariwalConfig",
    "DhariwalUNet",
    "SongConfig",
    "SongUNet",
    "UNet",
    "build_unet",
    "initialise",
]


@dataclass(frozen=True)
class SongConfig:
    """Arguments of a SongUNet under their published names, with the published defaults."""

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
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)


@dataclass(frozen=True)
class DhariwalConfig:
    """Arguments of a DhariwalUNet under their published names, with the published defaults."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.10
    label_dropout: float = 0.0  # the share of training labels to blank: for the training script


CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ (Song et al. 2021) as EDM runs them."""

    def __init__(self, config: SongConfig) -> None:
        super().__init__()
        self.config = config
        base = config.model_channels
        noise_channels = base * config.channel_mult_noise
        style = BlockStyle(
            emb_channels=base * config.channel_mult_emb,
            dropout=config.dropout,
            eps=1e-6,
            skip_scale=sqrt(0.5),
            adaptive_scale=False,
            resample_proj=True,
            resample_filter=config.resample_filter,
            channels_per_head=None,
        )
        if config.embedding_type == "fourier":
            self.map_noise = FourierEmbedding(noise_channels)
        else:
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        self.map_label = Linear(config.label_dim, noise_channels) if config.label_dim else None
        self.label_scale = sqrt(config.label_dim)
        self.map_augment = (
            Linear(config.augment_dim, noise_channels, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, style.emb_channels)
        self.map_layer1 = Linear(style.emb_channels, style.emb_channels)
        encoder, skips = _song_encoder(config, style)
        self.enc = nn.ModuleDict(encoder)
        self.dec = nn.ModuleDict(_song_decoder(config, style, skips))

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], noise [B], labels [B, L] one-hot or zeros -> [B, C, H, W]."""
        emb = self.embed(noise, labels, augment)
        x, skips = self._encode(x, emb)
        return self._decode(x, skips, emb)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Noise [B], labels [B, L] and augment [B, A] -> embedding [B, E]."""
        dtype = self.map_layer0.weight.dtype
        cosines, sines = self.map_noise(noise).to(dtype).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(_labels(labels, self.map_label, emb) * self.label_scale)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
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

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        out: Tensor | None = None
        normed = x
        for name, block in self.dec.items():
            if name.endswith("_aux_up"):
                out = block(out)
            elif name.endswith("_aux_norm"):
                normed = block(x)
            elif name.endswith("_aux_conv"):
                new = block(F.silu(normed))
                out = new if out is None else out + new
            else:
                x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        assert out is not None  # every decoder ends in an _aux_conv
        return out


def _song_encoder(config: SongConfig, style: BlockStyle) -> tuple[dict[str, nn.Module], list[int]]:
    """The blocks by name, and the widths of what they hand to the decoder."""
    filtered = {"resample": "down", "resample_filter": config.resample_filter}
    blocks: dict[str, nn.Module] = {}
    skips: list[int] = []
    width = aux = config.in_channels
    for level, mult in enumerate(config.channel_mult):
        res = config.img_resolution >> level
        at = f"{res}x{res}"
        if level == 0:
            width, before = config.model_channels, width
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
            width, before = config.model_channels * mult, width
            attends = res in config.attn_resolutions
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, style, attention=attends)
            skips.append(width)
    return blocks, skips


def _song_decoder(config: SongConfig, style: BlockStyle, skips: list[int]) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}
    last = len(config.channel_mult) - 1
    width = skips[-1]
    for level in range(last, -1, -1):
        res = config.img_resolution >> level
        at = f"{res}x{res}"
        blocks |= _decoder_head(at, width, style, is_last=level == last)
        for i in range(config.num_blocks + 1):
            before = width + skips.pop()
            width = config.model_channels * config.channel_mult[level]
            attends = i == config.num_blocks and res in config.attn_resolutions
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, style, attention=attends)
        if config.decoder_type == "skip" and level < last:
            out = config.out_channels
            blocks[f"{at}_aux_up"] = Conv2d(
                out, out, 0, resample="up", resample_filter=config.resample_filter
            )
        if config.decoder_type == "skip" or level == 0:
            blocks[f"{at}_aux_norm"] = GroupNorm(width, 1e-6)
            blocks[f"{at}_aux_conv"] = Conv2d(width, config.out_channels, 3)
    return blocks


def _decoder_head(at: str, width: int, style: BlockStyle, is_last: bool) -> dict[str, nn.Module]:
    """The middle of the U at its lowest resolution, a doubling above it."""
    if not is_last:
        return {f"{at}_up": UNetBlock(width, width, style, resample="up")}
    return {
        f"{at}_in0": UNetBlock(width, width, style, attention=True),
        f"{at}_in1": UNetBlock(width, width, style),
    }


class DhariwalUNet(nn.Module):
    """ADM (Dhariwal & Nichol 2021) as EDM runs it."""

    def __init__(self, config: DhariwalConfig) -> None:
        super().__init__()
        self.config = config
        base = config.model_channels
        style = BlockStyle(
            emb_channels=base * config.channel_mult_emb,
            dropout=config.dropout,
            eps=1e-5,
            skip_scale=1.0,
            adaptive_scale=True,
            resample_proj=False,
            resample_filter=(1, 1),
            channels_per_head=64,
        )
        wide = style.emb_channels
        self.map_noise = PositionalEmbedding(base, endpoint=False)
        self.map_augment = (
            Linear(config.augment_dim, base, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = Linear(base, wide)
        self.map_layer1 = Linear(wide, wide)
        self.map_label = Linear(config.label_dim, wide, bias=False) if config.label_dim else None
        encoder, skips = _adm_encoder(config, style)
        self.enc = nn.ModuleDict(encoder)
        self.dec = nn.ModuleDict(_adm_decoder(config, style, skips))
        width = base * config.channel_mult[0]
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, config.out_channels, 3)

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], noise [B], labels [B, L] one-hot or zeros -> [B, C, H, W]."""
        emb = self.embed(noise, labels, augment)
        skips: list[Tensor] = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("_conv") else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Noise [B], labels [B, L] and augment [B, A] -> embedding [B, E]."""
        dtype = self.map_layer0.weight.dtype
        emb = self.map_noise(noise).to(dtype)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(_labels(labels, self.map_label, emb))
        return F.silu(emb)


def _adm_encoder(
    config: DhariwalConfig, style: BlockStyle
) -> tuple[dict[str, nn.Module], list[int]]:
    """The blocks by name, and the widths of what they hand to the decoder."""
    blocks: dict[str, nn.Module] = {}
    skips: list[int] = []
    width = config.in_channels
    for level, mult in enumerate(config.channel_mult):
        res = config.img_resolution >> level
        at = f"{res}x{res}"
        if level == 0:
            width, before = config.model_channels * mult, width
            blocks[f"{at}_conv"] = Conv2d(before, width, 3)
        else:
            blocks[f"{at}_down"] = UNetBlock(width, width, style, resample="down")
        skips.append(width)
        for i in range(config.num_blocks):
            width, before = config.model_channels * mult, width
            attends = res in config.attn_resolutions
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, style, attention=attends)
            skips.append(width)
    return blocks, skips


def _adm_decoder(
    config: DhariwalConfig, style: BlockStyle, skips: list[int]
) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}
    last = len(config.channel_mult) - 1
    width = skips[-1]
    for level in range(last, -1, -1):
        res = config.img_resolution >> level
        at = f"{res}x{res}"
        blocks |= _decoder_head(at, width, style, is_last=level == last)
        for i in range(config.num_blocks + 1):
            before = width + skips.pop()
            width = config.model_channels * config.channel_mult[level]
            attends = res in config.attn_resolutions
            blocks[f"{at}_block{i}"] = UNetBlock(before, width, style, attention=attends)
    return blocks


def _labels(labels: Tensor | None, layer: Linear, like: Tensor) -> Tensor:
    """Labels [B, L] in the dtype of `like`; None is "no class", a row of zeros."""
    return like.new_zeros(1, layer.in_features) if labels is None else labels.to(like.dtype)


UNet: TypeAlias = SongUNet | DhariwalUNet
UNETS: dict[str, tuple[type, Callable[[Any], UNet]]] = {
    "SongUNet": (SongConfig, SongUNet),
    "DhariwalUNet": (DhariwalConfig, DhariwalUNet),
}


def build_unet(model_type: str, arguments: Mapping[str, Any]) -> UNet:
    """A network of class `model_type` from its published arguments, with zero weights.

    Raises ValueError on an unknown class, on arguments the class does not take or lacks, and on
    values that make no network.
    """
    if not isinstance(model_type, str) or model_type not in UNETS:
        raise ValueError(f"unknown network {model_type!r}; known: {', '.join(UNETS)}")
    config_type, make = UNETS[model_type]
    known = [field.name for field in fields(config_type)]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(
            f"{model_type} takes no argument {unknown[0]!r}; it takes {', '.join(known)}"
        )
    missing = [name for name in known[:3] if name not in arguments]
    if missing:
        raise ValueError(f"{model_type} needs {', '.join(missing)}")
    config = config_type(**{k: _frozen(v) for k, v in arguments.items()})
    _check(config)
    return make(config)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(config: SongConfig | DhariwalConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        wanted = _wanted(field.name, value)
        if wanted:
            raise ValueError(f"{field.name} must be {wanted}, not {value!r}")
    halvings = len(config.channel_mult) - 1
    if config.img_resolution % 2**halvings:
        raise ValueError(
            f"img_resolution {config.img_resolution} cannot be halved {halvings} times, as "
            f"channel_mult {config.channel_mult} asks; use a multiple of {2**halvings}"
        )


def _wanted(name: str, value: Any) -> str:
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
            fan_in = p[0].numel()
            fan_out = p.shape[0] * prod(p.shape[2:])
            bound = sqrt(6 / (fan_in + fan_out)) * _gain(name)
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
        for name, buffer in unet.named_buffers():
            if name.endswith("map_noise.freqs") and "map_noise.freqs" in unet.state_dict():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 16)


def _gain(name: str) -> float:
    layer = name.rsplit(".", 2)[-2]
    if layer in ("conv1", "proj", "out_conv") or layer.endswith("_aux_conv"):
        return 1e-5
    return sqrt(0.2) if layer == "qkv" else 1.0
