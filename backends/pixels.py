"""An EDM network as a backend: classes in, pixels out."""

from collections.abc import Sequence
from pathlib import Path

import torch

from backends.base import Backend, Prompt, classifier_free, pixels
from backends.edm import EDM, class_condition, load_edm
from solvers.field import Condition
from solvers.process import VE
from solvers.schedules import NoiseLevels
from src.seeds import randint

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""The range that EDM samples in (Karras et al. 2022, Table 1), where the network allows it."""


def pixel_backend(network: EDM, device: torch.device) -> Backend:
    """A preconditioned network on pixels in [-1, 1] as a backend; a prompt is a class number."""
    classes, side = network.label_dim, network.img_resolution
    low, high = max(SIGMA_MIN, network.sigma_min), min(SIGMA_MAX, network.sigma_max)

    def encode(prompts: Sequence[Prompt]) -> Condition | None:
        if all(prompt is None for prompt in prompts):
            return None
        chosen = [p for p in prompts if isinstance(p, int)]
        if len(chosen) != len(prompts):
            raise ValueError(f"this network takes a class number for every image, not {prompts}")
        return class_condition(torch.tensor(chosen), classes, device=device)

    def usual_prompt(seed: int) -> Prompt:
        return int(randint([seed], classes, stream="class")) if classes else None

    return Backend(
        family="edm",
        denoise=network,
        encode=encode,
        decode=pixels,
        guide=classifier_free,
        levels=NoiseLevels(VE, low, high),
        shape=(network.img_channels, side, side),
        size=(side, side),
        device=device,
        dtype=network.dtype,
        usual_prompt=usual_prompt,
    )


def load_pixels(
    path: Path, device: torch.device, dtype: torch.dtype, *, channels_last: bool = False
) -> Backend:
    """An EDM folder of ours or an NVIDIA pickle; ValueError where it is neither."""
    network = load_edm(path, device, dtype)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    return pixel_backend(network, device)
