"""The Inception network of FID, without its classifier.

Szegedy et al. 2016, arXiv:1512.00567, as trained for TensorFlow's `inception-2015-12-05` graph:
average pools do not count their padding, and the last block has a maximum in that place. Names
and shapes are those of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid, torch-fidelity).

Shapes: N images, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Conv:
    """One layer: its name, its width, its kernel (height, width), its stride."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


@dataclass(frozen=True)
class Branch:
    """Layers one after the other, the last of them perhaps side by side."""

    chain: tuple[Conv, ...]
    ends: tuple[Conv, ...] = ()


Pool = Callable[[Tensor], Tensor]


def mean_pool(x: Tensor) -> Tensor:
    """3x3, at every place, of what lies inside."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def top_pool(x: Tensor) -> Tensor:
    """3x3, at every place."""
    return F.max_pool2d(x, 3, 1, 1)


def down_pool(x: Tensor) -> Tensor:
    """3x3, at every second place."""
    return F.max_pool2d(x, 3, 2)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU. What keeps its size is padded, what halves it is not."""

    def __init__(self, channels: int, spec: Conv, *, padded: bool = True) -> None:
        super().__init__()
        high, wide = spec.kernel
        padding = (high // 2, wide // 2) if padded and spec.stride == 1 else 0
        self.conv = nn.Conv2d(
            channels, spec.width, spec.kernel, spec.stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(spec.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, width, H', W']."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches and a pool side by side, their channels together."""

    def __init__(
        self, channels: int, branches: tuple[Branch, ...], pool: Pool, pooled: int = 0
    ) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        self.pooled = pooled > 0
        for branch in branches:
            width = channels
            for spec in branch.chain:
                self.add_module(spec.name, Unit(width, spec))
                width = spec.width
            for spec in branch.ends:
                self.add_module(spec.name, Unit(width, spec))
        if pooled:
            self.add_module("branch_pool", Unit(channels, Conv("branch_pool", pooled)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        found = []
        for branch in self.branches:
            y = x
            for spec in branch.chain:
                y = self.get_submodule(spec.name)(y)
            found += [self.get_submodule(spec.name)(y) for spec in branch.ends] or [y]
        pooled = self.pool(x)
        found.append(self.get_submodule("branch_pool")(pooled) if self.pooled else pooled)
        return torch.cat(found, 1)


THREE, FIVE, ROW, COLUMN = (3, 3), (5, 5), (1, 7), (7, 1)


def block_a(channels: int, pooled: int) -> Mixed:
    """35x35."""
    one = Branch((Conv("branch1x1", 64),))
    five = Branch((Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, FIVE)))
    n = "branch3x3dbl_"
    double = Branch((Conv(n + "1", 64), Conv(n + "2", 96, THREE), Conv(n + "3", 96, THREE)))
    return Mixed(channels, (one, five, double), mean_pool, pooled)


def block_b(channels: int) -> Mixed:
    """35x35 -> 17x17."""
    n = "branch3x3dbl_"
    double = Branch((Conv(n + "1", 64), Conv(n + "2", 96, THREE), Conv(n + "3", 96, THREE, 2)))
    return Mixed(channels, (Branch((Conv("branch3x3", 384, THREE, 2),)), double), down_pool)


def block_c(w: int) -> Mixed:
    """17x17, of inner width w."""
    n, d = "branch7x7_", "branch7x7dbl_"
    seven = Branch((Conv(n + "1", w), Conv(n + "2", w, ROW), Conv(n + "3", 192, COLUMN)))
    inner = (Conv(d + "2", w, COLUMN), Conv(d + "3", w, ROW), Conv(d + "4", w, COLUMN))
    double = Branch((Conv(d + "1", w), *inner, Conv(d + "5", 192, ROW)))
    return Mixed(768, (Branch((Conv("branch1x1", 192),)), seven, double), mean_pool, 192)


def block_d() -> Mixed:
    """17x17 -> 8x8."""
    n = "branch7x7x3_"
    three = Branch((Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, THREE, 2)))
    cross = (Conv(n + "2", 192, ROW), Conv(n + "3", 192, COLUMN))
    seven = Branch((Conv(n + "1", 192), *cross, Conv(n + "4", 192, THREE, 2)))
    return Mixed(768, (three, seven), down_pool)


def block_e(channels: int, pool: Pool) -> Mixed:
    """8x8."""

    def forked(n: str) -> tuple[Conv, Conv]:
        return Conv(n + "a", 384, (1, 3)), Conv(n + "b", 384, (3, 1))

    one = Branch((Conv("branch1x1", 320),))
    three = Branch((Conv("branch3x3_1", 384),), forked("branch3x3_2"))
    n = "branch3x3dbl_"
    double = Branch((Conv(n + "1", 448), Conv(n + "2", 384, THREE)), forked(n + "3"))
    return Mixed(channels, (one, three, double), pool, 192)


STEM = (
    Conv("Conv2d_1a_3x3", 32, THREE, 2),
    Conv("Conv2d_2a_3x3", 32, THREE),
    Conv("Conv2d_2b_3x3", 64, THREE),
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, THREE),
)
POOLED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
PADDED = "Conv2d_2b_3x3"


class Inception(nn.Module):
    """Images [N, 3, 299, 299] in [-1, 1] -> features [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for spec in STEM:
            self.add_module(spec.name, Unit(width, spec, padded=spec.name == PADDED))
            width = spec.width
        blocks = {"5b": block_a(192, 32), "5c": block_a(256, 64), "5d": block_a(288, 64)}
        blocks |= {"6a": block_b(288), "6b": block_c(128), "6c": block_c(160)}
        blocks |= {"6d": block_c(160), "6e": block_c(192), "7a": block_d()}
        blocks |= {"7b": block_e(1280, mean_pool), "7c": block_e(2048, top_pool)}
        for name, block in blocks.items():
            self.add_module("Mixed_" + name, block)

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        for name, layer in self.named_children():
            x = layer(x)
            if name in POOLED_AFTER:
                x = down_pool(x)
        return x.mean((2, 3))
