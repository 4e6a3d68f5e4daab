"""An EDM network as a backend: classes in, pixels out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.base import NoiseLevels, Prompt, classifier_free, pixels
from backends.edm import EDM, class_condition, load_edm
from solvers.field import Condition, Denoiser
from solvers.process import VE
from src.seeds import randint

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""The range that EDM samples in (Karras et al. 2022, Table 1), where the network allows it."""


@dataclass(frozen=True)
class PixelBackend:
    """A preconditioned network on pixels in [-1, 1]; a prompt is a class number or None."""

    network: EDM
    levels: NoiseLevels
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's own."""
        return self.network.dtype

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, H, W] of one sample."""
        n = self.network
        return n.img_channels, n.img_resolution, n.img_resolution

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.network.img_resolution, self.network.img_resolution

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, C, H, W] at noise level sigma [B] -> E[x0 | x, sigma] [B, C, H, W]."""
        return self.network(x, sigma, cond)

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """Guidance away from no class, where the network was trained without one too."""
        return classifier_free(self, rate, cond)

    def usual_prompt(self, seed: int) -> Prompt:
        """A class drawn by the seed, None where the network knows no classes."""
        classes = self.network.label_dim
        return int(randint([seed], classes, stream="class")) if classes else None

    def encode(self, prompts: Sequence[Prompt]) -> Condition | None:
        """Class numbers -> one-hot labels [B, L]; None for every image is no class at all."""
        if all(prompt is None for prompt in prompts):
            return None
        classes = [p for p in prompts if isinstance(p, int)]
        if len(classes) != len(prompts):
            raise ValueError(f"this network takes a class number for every image, not {prompts}")
        return class_condition(torch.tensor(classes), self.network.label_dim, device=self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, C, H, W] in [-1, 1] -> images in [0, 1]."""
        return pixels(latents)


def load_pixels(path: Path, device: torch.device, dtype: torch.dtype) -> PixelBackend:
    """An EDM folder of ours or an NVIDIA pickle; ValueError where it is neither."""
    network = load_edm(path, device, dtype)
    low, high = max(SIGMA_MIN, network.sigma_min), min(SIGMA_MAX, network.sigma_max)
    return PixelBackend(network, NoiseLevels(VE, low, high), device)
