"""CompVis' unconditional U-Net, as the paper's code names and computes it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, HEAD = 32, 32


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels)


class ResBlock(nn.Module):
    def __init__(self, channels: int, emb: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, 1, 1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out))
        self.out_layers = nn.Sequential(
            norm(out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, 1, 1)
        )
        same = channels == out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, _emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        q, k, v = qkv.reshape(-1, 3 * HEAD, flat.shape[-1]).split(HEAD, 1)
        weight = torch.einsum("bct,bcs->bts", q, k / math.sqrt(HEAD)).softmax(-1)
        mixed = torch.einsum("bts,bcs->bct", weight, v).reshape(flat.shape)
        return (flat + self.proj_out(mixed)).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor, _emb: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor, _emb: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class CompVisUNet(nn.Module):
    """model_channels `width`, channel_mult `mult`, attention at levels `attended`."""

    def __init__(self, width: int, mult: list[int], layers: int, attended: list[bool]) -> None:
        super().__init__()
        emb, self.width = 4 * width, width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        blocks: list[list[nn.Module]] = [[nn.Conv2d(3, width, 3, 1, 1)]]
        channels, kept = width, [width]
        for level, m in enumerate(mult):
            for _ in range(layers):
                block: list[nn.Module] = [ResBlock(channels, emb, m * width)]
                channels = m * width
                blocks.append(block + [AttentionBlock(channels)] * attended[level])
                kept.append(channels)
            if level < len(mult) - 1:
                blocks.append([Downsample(channels)])
                kept.append(channels)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        middle = [ResBlock(channels, emb, channels), AttentionBlock(channels)]
        self.middle_block = nn.ModuleList([*middle, ResBlock(channels, emb, channels)])
        outs: list[list[nn.Module]] = []
        for level, m in reversed(list(enumerate(mult))):
            for i in range(layers + 1):
                block = [ResBlock(channels + kept.pop(), emb, m * width)]
                channels = m * width
                block += [AttentionBlock(channels)] * attended[level]
                outs.append(block + [Upsample(channels)] * (level > 0 and i == layers))
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, outs))
        self.out = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half) / half)
        args = t[:, None].float() * freqs
        emb = self.time_embed(torch.cat([args.cos(), args.sin()], -1))
        kept: list[Tensor] = []

        def through(block: Any, x: Tensor) -> Tensor:
            for layer in block:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
            return x

        for block in self.input_blocks:
            x = through(block, x)
            kept.append(x)
        x = through(self.middle_block, x)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, kept.pop()], 1))
        return self.out(x)
