"""CompVis' unconditional networks, as the paper's code names and computes them, small."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, HEAD = 32, 32


def norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps)


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


class UNet(nn.Module):
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


class VQBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels, 1e-6), nn.Conv2d(channels, out, 3, 1, 1)
        self.norm2, self.conv2 = norm(out, 1e-6), nn.Conv2d(out, out, 3, 1, 1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if "nin_shortcut" in self._modules else x)


class VQAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weight = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weight.transpose(1, 2)).reshape(x.shape))


def middle(channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"block_1": VQBlock(channels, channels), "attn_1": VQAttention(channels),
         "block_2": VQBlock(channels, channels)}
    )  # fmt: skip


class Decoder(nn.Module):
    def __init__(self, widths: list[int], layers: int, z: int) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z, channels, 3, 1, 1), middle(channels)
        ups = []
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(VQBlock(channels, width))
                channels = width
            parts: dict[str, nn.Module] = {"block": nn.ModuleList(blocks)}
            ups.insert(0, nn.ModuleDict(parts | ({"upsample": Upsample(width)} if level else {})))
        self.up = nn.ModuleList(ups)
        self.norm_out, self.conv_out = norm(channels, 1e-6), nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in self.mid.values():
            x = part(x)
        for level in reversed(self.up):
            parts: Any = level
            for block in parts["block"]:
                x = block(x)
            x = parts["upsample"](x) if "upsample" in parts else x
        return self.conv_out(F.silu(self.norm_out(x)))


class VQ(nn.Module):
    """The first stage; of the encoder, the tensors alone."""

    def __init__(self, widths: list[int], layers: int, z: int, codes: int) -> None:
        super().__init__()
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, z)})
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, z, 1), nn.Conv2d(z, z, 1)
        self.decoder = Decoder(widths, layers, z)
        downs, channels = [], widths[0]
        for level, width in enumerate(widths):
            blocks = [VQBlock(channels if i == 0 else width, width) for i in range(layers)]
            parts: dict[str, nn.Module] = {"block": nn.ModuleList(blocks)}
            if level < len(widths) - 1:
                conv = nn.Conv2d(width, width, 3, 2)
                parts["downsample"] = nn.ModuleDict({"conv": conv})
            downs.append(nn.ModuleDict(parts))
            channels = width
        self.encoder = nn.ModuleDict(
            {"conv_in": nn.Conv2d(3, widths[0], 3, 1, 1), "down": nn.ModuleList(downs),
             "mid": middle(channels), "norm_out": norm(channels, 1e-6),
             "conv_out": nn.Conv2d(channels, z, 3, 1, 1)}
        )  # fmt: skip

    def decode(self, z: Tensor) -> Tensor:
        codes = self.quantize["embedding"].weight
        assert isinstance(codes, Tensor)
        flat = z.movedim(1, -1)
        nearest = (flat[..., None, :] - codes).norm(dim=-1).argmin(-1)
        return self.decoder(self.post_quant_conv(codes[nearest].movedim(-1, 1)))
