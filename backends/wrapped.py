"""A backend with something of its own replaced: to time it, or to let another network answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels, Prompt
from solvers.field import Condition, Denoiser


@dataclass(frozen=True)
class Wrapped:
    """A backend in all but what is given here; see `Backend` for each.

    A `network` answers under guidance as well.
    """

    backend: Backend
    network: Denoiser | None = None
    encoder: Callable[[Sequence[Prompt]], Condition | None] | None = None
    decoder: Callable[[Tensor], Tensor] | None = None

    @property
    def levels(self) -> NoiseLevels:
        """The levels that the network knows."""
        return self.backend.levels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        return self.backend.latent_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.backend.image_size

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's own."""
        return self.backend.dtype

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> x0 [B, *]."""
        return (self.network or self.backend)(x, sigma, cond)

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """The denoiser under guidance."""
        return self.network or self.backend.guided(rate, cond)

    def usual_prompt(self, seed: int) -> Prompt:
        """The backend's."""
        return self.backend.usual_prompt(seed)

    def encode(self, prompts: Sequence[Prompt]) -> Condition | None:
        """What the network is told."""
        return (self.encoder or self.backend.encode)(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *] -> images [B, C, H, W]."""
        return (self.decoder or self.backend.decode)(latents)
