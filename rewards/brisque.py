"""BRISQUE (Mittal, Moorthy and Bovik 2012, IEEE Transactions on Image Processing 21(12)).

How natural the statistics of neighbouring pixels are, whatever the image shows: 36 numbers, put
into the support vector regression that its authors fitted to people's ratings. B images, F = 36.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.registry import Shelf
from rewards.states import check, read_state
from src.images import to_bytes

MODEL = Path(__file__).parents[1] / "src/models/brisque/model.safetensors"
SHAPES = {"vectors": (770, 36), "coefficients": (770,), "low": (36,), "high": (36,), "rest": (2,)}
LUMA = (0.2989, 0.587, 0.114)
WINDOW, SIGMA = 7, 7 / 6
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))
SHAPE_GRID = (0.2, 10.0, 9801)  # exponents of the fitted distributions: from, to, how many
TINY = 1e-12
PART = 64  # images at once


@dataclass(frozen=True)
class Brisque:
    """Minus BRISQUE, about -100 (bad) to 0 (good): a Reward."""

    vectors: Tensor  # [V, F]
    coefficients: Tensor  # [V]
    low: Tensor  # [F], goes to -1
    high: Tensor  # [F], goes to 1
    rest: Tensor  # gamma of the kernel, and what is subtracted from the sum

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As Reward."""
        return -torch.cat([self.quality(part) for part in images.split(PART)])

    def quality(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B], the published number: lower is better."""
        found = features(images.to(self.low.device))
        scaled = -1 + 2 * (found - self.low) / (self.high - self.low)
        gamma, rho = self.rest
        near = (-gamma * torch.cdist(scaled, self.vectors).square()).exp()
        return (near @ self.coefficients - rho).to(images.device, torch.float32)


def features(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 36] in float64: 18 of the grey image, 18 of its half."""
    levels = to_bytes(images).double()
    grey = (levels * levels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True).round()
    half = [-(-side // 2) for side in grey.shape[-2:]]
    small = F.interpolate(grey, half, mode="bicubic", antialias=True)
    return torch.cat([statistics(normalised(image)) for image in (grey, small)], 1)


def normalised(image: Tensor) -> Tensor:
    """[B, 1, H, W] -> [B, H, W]: (I - mean) / (deviation + 1) around each pixel, equation 1."""
    plain = image[:, 0]
    mean, square = around(plain), around(plain.square())
    return (plain - mean) / ((square - mean.square()).abs().sqrt() + 1)


def around(x: Tensor) -> Tensor:
    """[B, H, W] -> the same: the Gaussian mean of 7x7 pixels, zero outside of the image."""
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = (-place.square() / (2 * SIGMA**2)).exp()
    window = (bell / bell.sum()).tolist()
    for dim in (1, 2):
        edges = (WINDOW // 2,) * 2 if dim == 2 else (0, 0, *(WINDOW // 2,) * 2)
        wide, side = F.pad(x, edges), x.shape[dim]
        x = sum((w * wide.narrow(dim, k, side) for k, w in enumerate(window)), x.new_zeros(()))
    return x


def statistics(x: Tensor) -> Tensor:
    """[B, H, W] -> [B, 18]: the fit of the pixels, then those of four products of neighbours."""
    flat = x.flatten(1)
    power = flat.square().mean(1)
    found = [exponent(flat.abs().mean(1).square() / (power + TINY)), power]
    for shift in NEIGHBOURS:
        found += asymmetric((x * x.roll(shift, (1, 2))).flatten(1))
    return torch.stack(found, 1)


def asymmetric(x: Tensor) -> list[Tensor]:
    """[B, N] -> of the asymmetric generalised Gaussian the exponent, mean and two variances.

    By its moments: Lasmar, Stitou and Berthoumieu 2009, ICIP; equations 8 to 13.
    """
    left, right = (one_sided(x, x < 0), one_sided(x, x > 0))
    gamma = (left.sqrt() / (right.sqrt() + TINY)).clamp(max=1e6)
    ratio = x.abs().mean(1).square() / (x.square().mean(1) + TINY)
    skewed = ratio * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1).square()
    alpha = exponent(skewed)
    one, two, three = ((k / alpha).lgamma() for k in (1, 2, 3))
    mean = (right.sqrt() - left.sqrt()) * (two - one + (one - three) / 2).exp()
    return [alpha, mean, left, right]


def one_sided(x: Tensor, side: Tensor) -> Tensor:
    """The mean square [B] of the numbers on a side [B, N]; 0 where there is none."""
    return (x.square() * side).sum(1) / side.sum(1).clamp(min=1)


def exponent(ratio: Tensor) -> Tensor:
    """Of (mean |x|)^2 / mean x^2, [B], the exponent of a generalised Gaussian, by a table."""
    grid, ratios = (t.to(ratio.device) for t in table())
    after = torch.searchsorted(ratios, ratio.contiguous()).clamp(1, len(ratios) - 1)
    nearer = ratio - ratios[after - 1] < ratios[after] - ratio
    return grid[torch.where(nearer, after - 1, after)]


@cache
def table() -> tuple[Tensor, Tensor]:
    """Exponents, and the ratio of each: rising."""
    grid = torch.linspace(*SHAPE_GRID, dtype=torch.float64)
    one, two, three = ((k / grid).lgamma() for k in (1, 2, 3))
    return grid, (2 * two - one - three).exp()


def load(shelf: Shelf) -> Brisque:
    """-> the reward; its model comes with this repository."""
    state = read_state(MODEL)
    check(state, {n: torch.empty(s, device="meta") for n, s in SHAPES.items()}, str(MODEL))
    return Brisque(**{n: state[n].to(shelf.setup.device, torch.float64) for n in SHAPES})
