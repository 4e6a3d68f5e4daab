"""Images as CLIP and BLIP want them: what Pillow's resize makes, to the byte, on any device.

Pillow resizes along rows and then along columns; its weights are whole numbers of 2^-22, and each
pass is rounded to bytes. Such sums are exact in float64, in any order. Only the part of the result
that is kept is computed, from the part of the image that it needs. A gradient passes through the
roundings as if they were not there. B images, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's (arXiv:2103.00020), and BLIP's."""
ONE = 1 << 22
PIXELS = 1 << 22
"""Of images that are resized at once, for the memory of float64."""
Box = tuple[int, int, int, int]
"""Top, left, height and width of a part."""


@dataclass(frozen=True)
class Preprocess:
    """What an image tower takes: squares of `size` pixels, normalised by `mean` and `std`.

    mode: `shortest` resizes the short side to `resize` (0: `size`) and cuts out the centre,
    `squash` resizes both sides.
    middle: half of what is cut off -> where the rest begins; round as in torchvision, int as in
    transformers.
    """

    size: int
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    mode: str = "shortest"
    resize: int = 0
    interpolation: str = "bicubic"
    middle: Callable[[float], int] = round

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], float32."""
        at_once = max(1, PIXELS // images[0, 0].numel())
        parts = (to_levels(part.float() * 255) for part in images.split(at_once))
        square = torch.cat([self.square(part) for part in parts]) / 255
        mean, std = (square.new_tensor(tuple(v))[:, None, None] for v in (self.mean, self.std))
        return (square - mean) / std

    def square(self, levels: Tensor) -> Tensor:
        """Byte levels [B, C, H, W] -> [B, C, size, size]."""
        height, width = levels.shape[-2:]
        size = self.size
        to = (size, size)
        if self.mode == "shortest":
            short, new = min(height, width), self.resize or size
            to = (new * height // short, new * width // short)
        top, left = (self.middle((side - size) / 2) for side in to)
        return resize(levels, to, (top, left, size, size), self.interpolation)


def to_levels(x: Tensor) -> Tensor:
    """The byte levels, 0 to 255, nearest to x, halves up.

    Its gradient is that of x from 0 to 255, both ends included, and nothing outside.
    """
    levels = (x + 0.5).floor().clamp(0, 255)
    if not x.requires_grad:
        return levels
    return torch.where((x >= 0) & (x <= 255), x + (levels - x).detach(), levels)


def resize(
    levels: Tensor, to: tuple[int, int], box: Box, interpolation: str = "bicubic"
) -> Tensor:
    """Byte levels [B, C, H, W], resized to (height, width) -> the part `box` of the result."""
    top, left, height, width = box
    (old_height, old_width), device = levels.shape[-2:], levels.device
    rows, vertical = weights_for(old_height, to[0], top, height, interpolation, device)
    columns, horizontal = weights_for(old_width, to[1], left, width, interpolation, device)
    narrow = to_levels(levels[..., rows, columns].double() @ horizontal.mT / ONE)
    return to_levels(narrow.mT @ vertical.mT / ONE).mT.to(levels.dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # they are kept, and serve gradients too
def weights_for(
    old: int, new: int, start: int, count: int, name: str, device: torch.device
) -> tuple[slice, Tensor]:
    """What `count` pixels from `start` on are made of, in a row that goes from `old` to `new`.

    -> the n pixels that are needed, and their weights [count, n] in units of 2^-22. As in Pillow's
    Resample.c: the filter is widened where the row shrinks.
    """
    reach, shape = FILTERS[name]
    wide = max(old / new, 1.0)
    centre = (torch.arange(start, start + count, dtype=torch.float64)[:, None] + 0.5) * (old / new)
    first = (centre - reach * wide + 0.5).trunc().clamp(min=0)
    last = (centre + reach * wide + 0.5).trunc().clamp(max=old)
    needed = slice(int(first[0]), int(last[-1]))
    x = torch.arange(needed.start, needed.stop, dtype=torch.float64)
    weights = shape(((x - centre + 0.5) * (1 / wide)).abs())
    weights = weights.where((first <= x) & (x < last), 0)
    weights = weights / weights.sum(1, keepdim=True) * ONE
    return needed, (weights + 0.5 * weights.sign()).trunc().to(device)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' with a = -1/2."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, far.where(x < 2, 0))


FILTERS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "bilinear": (1, lambda x: (1 - x).clamp(min=0)),
    "bicubic": (2, _bicubic),
    "lanczos": (3, lambda x: (torch.sinc(x) * torch.sinc(x / 3)).where(x < 3, 0)),
}
"""How far each reaches, and its weights at distances x in pixels."""
BY_NUMBER = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as in the files of transformers."""


def by_open_clip(content: Mapping[str, Any], size: int, source: Path) -> Preprocess:
    """What open_clip's preprocess_cfg says; ValueError where that is not served."""
    names = {n: n for n in ("mean", "std", "interpolation")} | {"resize_mode": "mode"}
    stated: dict[str, Any] = {own: content[n] for n, own in names.items() if n in content}
    return checked(Preprocess(size, **stated), source)


def by_transformers(content: Any, size: int, source: Path) -> Preprocess:
    """What preprocessor_config.json says; ValueError, naming it, where it is not served."""
    if not isinstance(content, dict):
        raise ValueError(f"{source}: it is no object")
    to, crop = content.get("size", size), content.get("crop_size", size)
    edge = to.get("shortest_edge", 0) if isinstance(to, dict) else to
    sides = {size} if edge else {to.get("height"), to.get("width")}
    crops = set(crop.values()) if isinstance(crop, dict) else {crop}
    cut = content.get("do_center_crop", True)
    if not content.get("do_resize", True) or not content.get("do_rescale", True):
        raise ValueError(f"{source}: only images that are resized and rescaled are served")
    if sides != {size} or (edge and (not cut or edge < size)) or (cut and crops != {size}):
        raise ValueError(f"{source}: it does not make images of {size}x{size}, as the model takes")
    mean, std = content.get("image_mean", MEAN), content.get("image_std", STD)
    if not content.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    mode = "shortest" if edge else "squash"
    kind = BY_NUMBER.get(content.get("resample", 3), "other")
    return checked(Preprocess(size, mean, std, mode, edge, kind, middle=int), source)


def checked(preprocess: Preprocess, source: Path) -> Preprocess:
    """The same; ValueError, naming the file, where it is not served."""
    if preprocess.mode not in ("shortest", "squash"):
        raise ValueError(f"{source}: resize_mode {preprocess.mode!r} is not served")
    if preprocess.interpolation not in FILTERS:
        raise ValueError(f"{source}: only the resizes {', '.join(FILTERS)} are served")
    for numbers in (preprocess.mean, preprocess.std):
        if len(numbers) != 3 or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"{source}: mean and std need three numbers each")
    return preprocess
