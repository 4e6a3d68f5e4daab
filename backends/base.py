"""What every backend is: a denoiser with the two ends of sampling, as one value."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from solvers.field import Condition, Denoiser, Guided
from solvers.schedules import NoiseLevels

Prompt: TypeAlias = str | int | None
"""What one image is asked for: a text, a class number, or nothing."""
ON_PIXELS = ("edm", "analytic")
"""Families on pixels, whose network estimates x0 rather than a slope."""
Guide: TypeAlias = Callable[[Denoiser, float, Condition | None], Denoiser]


def pixels(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> images in [0, 1], clipped, float32."""
    return (x.float() / 2 + 0.5).clamp(0, 1)


def classifier_free(denoiser: Denoiser, rate: float, cond: Condition | None) -> Denoiser:
    """Guidance away from "nothing"; ValueError where the condition knows no "nothing"."""
    if rate != 1 and (cond is None or cond.null is None):
        raise ValueError(f"guidance_rate {rate} needs prompts or classes")
    return Guided(denoiser, rate)


def no_prompt(_seed: int) -> Prompt:
    """Nothing, whatever the seed: for models that take neither classes nor texts."""
    return None


@dataclass(frozen=True)
class Backend:
    """A network made into a denoiser, and what stands before and behind it.

    A variant is a copy with other parts: `replace(backend, decode=timed)`.
    """

    family: str  # edm, analytic, ldm, sd3, flux, ...: what predictors' recipes call it
    denoise: Denoiser  # x [B, *] at sigma [B], condition -> E[x0 | x, sigma] [B, *]
    encode: Callable[[Sequence[Prompt]], Condition | None]  # ValueError: prompts it cannot take
    decode: Callable[[Tensor], Tensor]  # latents [B, *] -> images [B, C, H, W] in [0, 1], float32
    guide: Guide  # the denoiser under a guidance rate: `classifier_free`, or the network's own way
    levels: NoiseLevels
    shape: tuple[int, ...]  # * of one latent
    size: tuple[int, int]  # height and width of an image, in pixels
    device: torch.device
    dtype: torch.dtype  # the network's own; the state is float32 at least
    usual_prompt: Callable[[int], Prompt] = no_prompt  # of a seed when nobody says
    least_rate: float = -math.inf  # the smallest guidance rate that the model takes
    config: Mapping[str, Any] = field(default_factory=dict)  # what a recipe keeps: the scheduler

    def check_rates(self, rates: Iterable[float], cond: Condition | None) -> None:
        """ValueError where one of these guidance rates cannot be had."""
        for rate in rates:
            self.guided(rate, cond)

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """The denoiser under guidance, 1 being none; ValueError where there is no such thing."""
        return self.guide(self.denoise, rate, cond)


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened; those on pixels take `channels_last` alone.

    `encode_first` are texts to embed at once, after which the text encoders are let go: memory
    for the transformer.
    """

    size: tuple[int, int] | None = None  # height and width in pixels; None: the model's own
    negative_prompt: str | None = None
    config: str | None = None  # a diffusers folder with what a single file lacks
    cpu_offload: bool = False  # each part on the GPU only while it works
    vae_tiling: bool = False
    vae_slicing: bool = False
    encode_first: tuple[str, ...] = ()
    channels_last: bool = False  # the weights' order in memory
