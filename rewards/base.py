"""What a reward is, the one way to call it, and the weighted mean of several.

B images, each with its prompt. Images are floats in [0, 1], [B, 3, H, W].
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rewards.pixels import to_levels
from src.runs import Stopped


@contextmanager
def looking(name: str, x: Tensor) -> Iterator[None]:
    """ValueError, with the name of what looks at x, and its shape, where it fails."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError, Stopped):
        raise
    except Exception as error:  # a function of one's own may raise its libraries' own kinds
        said = (str(error).strip().splitlines() or [""])[0][:300]
        shape = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ValueError(f"{name} fails on {shape}: {type(error).__name__}: {said}") from error


class Reward(Protocol):
    """Scores images under prompts. Any function of this shape is one.

    Those of this folder let a gradient through to the images, see `has_gradient`; what their
    scores hang on is `rewards.fingerprint.fingerprint`.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts -> [B], in own units, higher is better."""
        ...


def score(reward: Reward, images: Tensor, prompts: Sequence[str], name: str = "reward") -> Tensor:
    """The scores [B], float32, of images [B, 3, H, W] in [0, 1], each under its prompt.

    Images are rounded to bytes first, so that an image in memory scores as its PNG does. Where
    the images ask for a gradient, the scores have one; it passes through the rounding as if
    nothing was rounded.

    Raises ValueError, with the reward's name, for images that are not [B, 3, H, W] floats, have no
    pixels or hold NaN, for another number of prompts, for a reward that fails, and for a result
    that is not B finite numbers.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"rewards take floats [B, 3, H, W], not {images.dtype} {list(images.shape)}: "
            "make grey images RGB with images.expand(-1, 3, -1, -1)"
        )
    if 0 in images.shape[2:]:
        raise ValueError(f"rewards take images with pixels, not {list(images.shape)}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, not {len(prompts)}")
    if not len(images):
        return images.new_zeros(0, dtype=torch.float32)
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        wrong = (~finite).nonzero()[:, 0].tolist()
        low = images.dtype in (torch.float16, torch.bfloat16)
        raise ValueError(
            f"image {wrong[0]} of {len(images)} (and {len(wrong) - 1} more) holds NaN or infinity"
            + (f": it was made in {images.dtype}, try float32" if low else "")
        )
    wanted = torch.is_grad_enabled() and images.requires_grad
    with torch.set_grad_enabled(wanted), looking(name, images):
        scores = reward(to_levels(images.float() * 255) / 255, prompts)
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{name} must return a tensor [{len(images)}], not {got}")
    if not scores.isfinite().all():
        wrong = (~scores.isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name} gave {scores[wrong[0]].item()} for image {wrong[0]} of {len(images)} "
            f"(and {len(wrong) - 1} more): try it without half precision, and check its weights"
        )
    return scores.to(images.device, torch.float32)


def has_gradient(
    reward: Reward, device: torch.device | str = "cpu", prompt: str = "a picture"
) -> bool:
    """Whether training may follow the gradient of a reward, tried on one small noisy picture.

    Raises ValueError as `score`.
    """
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = noise.to(device).requires_grad_()
    with torch.enable_grad():
        scores = score(reward, image, [prompt])
        if not scores.requires_grad:
            return False
        (slope,) = torch.autograd.grad(scores.sum(), image, allow_unused=True)
    return slope is not None and bool(slope.any())


SCALES = {
    "hps": 1.0,
    "pickscore": 1 / 26,
    "imagereward": 1 / 10,  # signed: a bad image counts against, below zero
    "clip": 1.0,
    "aesthetic": 1 / 10,
    "mps": 1 / 26,  # not in the published sum; scaled as pickscore, whose units it has
}
"""What brings scores near [0, 1] in `multi` (arXiv:2512.22796); its clamp to [0, 1] is left out,
as it makes all bad images equal."""


@dataclass(frozen=True)
class WeightedSum:
    """sum_i weight_i scale_i score_i / sum_i weight_i, a Reward made of rewards.

    Weights are positive; rewards that `scales` does not name count as they are.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    scales: Mapping[str, float]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.mean({n: score(r, images, prompts, n) for n, r in self.rewards.items()})

    def mean(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean [B] of scores that are at hand, in their own units."""
        terms = [self.weights[n] * (parts[n] * self.scales.get(n, 1.0)) for n in self.rewards]
        return torch.stack(terms).sum(0) / sum(self.weights[name] for name in self.rewards)
