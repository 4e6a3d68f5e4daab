"""Images as CLIP and BLIP want them, made on the device that they are on.

Pillow's bicubic resize is two passes, along rows and then along columns, each rounded to bytes;
so is this one. It computes in float64: the results differ where Pillow's own weights, of 22 bits,
decide which way a half goes, by one byte level in less than one of a thousand pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's (arXiv:2103.00020), and BLIP's."""
Middle = Callable[[float], int]
"""Half of what is cut off -> where the rest begins."""
PART = 16  # images that are resized at once, for the memory of float64


def prepare(
    images: Tensor,
    size: int,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    middle: Middle = round,
) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], float32: resized, cropped, normalised.

    The short side becomes `size` (antialiased bicubic), then the centre is cut out: Resize and
    CenterCrop of torchvision, or with `middle` int, of transformers, whose centre of an odd rest
    may lie a pixel before. Images are rounded to bytes first.
    """
    parts = (images.to(torch.float32) * 255).round().split(PART)
    square = torch.cat([crop(resize(part, size), size, middle) for part in parts]) / 255
    centre, spread = (square.new_tensor(v)[:, None, None] for v in (mean, std))
    return (square - centre) / spread


def resize(levels: Tensor, size: int) -> Tensor:
    """Byte levels [B, C, H, W] -> the short side is `size`, the long one in proportion, cut."""
    height, width = levels.shape[-2:]
    short = min(height, width)
    to = size * height // short, size * width // short
    return one_pass(one_pass(levels, (height, to[1])), to)


def one_pass(levels: Tensor, to: tuple[int, int]) -> Tensor:
    """Resize to (height, width); halves are rounded up, as Pillow does."""
    if levels.shape[-2:] == to:
        return levels
    made = F.interpolate(levels.double(), size=to, mode="bicubic", antialias=True)
    return (made + 0.5).floor().clamp(0, 255).float()


def crop(images: Tensor, size: int, middle: Middle = round) -> Tensor:
    """The centre [B, C, size, size] of images that are at least as large."""
    top, left = (middle((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]
