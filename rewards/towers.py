"""Image and text towers of the CLIP family behind one face, and the cosine of their embeddings.

B images, P distinct prompts, D channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.pixels import MEAN, STD, Middle, prepare

PART = 64  # prompts that are encoded at once


@dataclass
class TextCache:
    """What `encode` makes of each distinct prompt, the latest `size` of them kept."""

    encode: Callable[[Sequence[str]], Tensor]
    size: int = 4096
    known: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, *], the distinct new ones encoded together."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        for start in range(0, len(new), PART):
            part = new[start : start + PART]
            rows = self.encode(part)
            self.known.update((p, row.clone()) for p, row in zip(part, rows, strict=True))
        found = torch.stack([self.known[p] for p in prompts])
        for prompt in prompts:
            self.known.move_to_end(prompt)
        while len(self.known) > self.size:
            self.known.popitem(last=False)
        return found


@dataclass(frozen=True)
class Look:
    """What an image tower takes: squares of `size` pixels, normalised."""

    size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    middle: Middle = round

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size]."""
        return prepare(images, self.size, self.mean, self.std, self.middle)


@dataclass(frozen=True)
class Towers:
    """Two towers into one space of `width` channels. Embeddings have length 1, in float32.

    see: what `look` made -> [B, D]; read: P prompts -> [P, D]; both of any length.
    """

    look: Look
    see: Callable[[Tensor], Tensor]
    read: Callable[[Sequence[str]], Tensor]
    width: int
    logit_scale: float  # the exponential of the learnt number
    device: torch.device
    amp: bool

    @cached_property
    def texts(self) -> TextCache:
        """B prompts -> [B, D]."""
        return TextCache(self._read)

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        with half(self.device, self.amp):
            seen = self.see(self.look(images.to(self.device)))
        return F.normalize(seen.float(), dim=-1)

    def _read(self, prompts: Sequence[str]) -> Tensor:
        with half(self.device, self.amp):
            return F.normalize(self.read(prompts).float(), dim=-1)


@dataclass(frozen=True)
class Cosine:
    """scale * cos(image, prompt): a Reward."""

    towers: Towers
    scale: float = 1.0

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As Reward."""
        cosines = (self.towers.images(images) * self.towers.texts(prompts)).sum(-1)
        return (self.scale * cosines).to(images.device)


def half(device: torch.device, amp: bool) -> torch.autocast:
    """Autocast to float16 on a GPU, bfloat16 elsewhere; or none."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp)
