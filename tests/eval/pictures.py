"""Pictures on disk, and cheap features of them by a dotted name."""

from pathlib import Path

import torch
from torch import Tensor

from src.images import save_png
from tests.eval.small import cheap_features

CHEAP = "tests.eval.pictures:features"


def features(images: Tensor) -> Tensor:
    """Five numbers of an image."""
    return cheap_features(images)


def nan_features(images: Tensor) -> Tensor:
    """As those, but not finite for an image that begins black."""
    found = cheap_features(images)
    found[images[:, 0, 0, 0] == 0] = float("nan")
    return found


def image(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> Tensor:
    """One drawn image [C, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, height, width, generator=generator) ** (1 + seed % 3)


def fill(folder: Path, count: int, first: int = 0) -> Path:
    """A folder of drawn pictures, every fifth of another size."""
    for i in range(first, first + count):
        save_png(folder / f"{i:06d}.png", image(i, width=9 if i % 5 == 4 else 8))
    return folder
