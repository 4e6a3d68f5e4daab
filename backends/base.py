"""What every backend is: a denoiser that also encodes prompts and decodes latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from solvers import schedules
from solvers.field import Condition, Denoiser, Guided
from solvers.process import Process

Prompt: TypeAlias = str | int | None
"""What one image is asked for: a text, a class number, or nothing."""


@dataclass(frozen=True)
class Timesteps:
    """A network's own discrete clock, for the `discrete` schedule."""

    first: float
    last: float
    sigma_of: Callable[[Tensor], Tensor]  # timesteps [n] -> levels [n], rising


@dataclass(frozen=True)
class NoiseLevels:
    """The levels that a network knows, and how its schedules are spaced."""

    process: Process
    sigma_min: float
    sigma_max: float
    timesteps: Timesteps | None = None
    shift: float = 1.0
    mu: float | None = None  # dynamic shift, by resolution

    def schedule(
        self,
        schedule_type: str,
        num_steps: int,
        *,
        rho: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Tensor:
        """The grid sigmas [num_steps] in float64 of a schedule by name.

        Raises ValueError for an unknown name, bad ranges, or a schedule that the network lacks.
        """
        low = self.sigma_min if sigma_min is None else sigma_min
        high = self.sigma_max if sigma_max is None else sigma_max
        match schedule_type:
            case "polynomial":
                return schedules.polynomial(num_steps, low, high, 7 if rho is None else rho)
            case "logsnr":
                return schedules.log_snr(num_steps, low, high)
            case "time_uniform":
                return schedules.time_uniform(num_steps, low, high, 1 if rho is None else rho)
            case "discrete" if self.timesteps:
                t = self.timesteps
                rho = 1 if rho is None else rho
                return schedules.discrete(num_steps, t.first, t.last, t.sigma_of, rho)
            case "flowmatch" if self.process.name == "flow":
                return schedules.flowmatch(num_steps, shift=self.shift, mu=self.mu)
            case "discrete" | "flowmatch":
                raise ValueError(f"this network has no {schedule_type!r} schedule")
            case _:
                names = ", ".join(SCHEDULES)
                raise ValueError(f"unknown schedule {schedule_type!r}: choose from {names}")


SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")


@dataclass(frozen=True)
class ModelOptions:
    """How a text-to-image model is opened; models on pixels take none of these.

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


class Backend(Protocol):
    """A denoiser with the two ends of sampling: prompts in, images out."""

    @property
    def levels(self) -> NoiseLevels:
        """The levels that the network knows."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape * of one latent."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The network's own; the state is float32 at least."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at noise level sigma [B] -> E[x0 | x, sigma] [B, *]."""
        ...

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """The denoiser under guidance, 1 being none; ValueError where there is no such thing."""
        ...

    def usual_prompt(self, seed: int) -> Prompt:
        """What an image is of when nobody says: a class or text by its seed, or None."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition | None:
        """What the network is told for these prompts; ValueError for one that it cannot take."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *] -> images [B, C, H, W] in [0, 1], float32."""
        ...


def pixels(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> images in [0, 1], clipped, float32."""
    return (x.float() / 2 + 0.5).clamp(0, 1)


def classifier_free(denoiser: Denoiser, rate: float, cond: Condition | None) -> Denoiser:
    """Guidance away from "nothing"; ValueError where the condition knows no "nothing"."""
    if rate != 1 and (cond is None or cond.null is None):
        raise ValueError(f"guidance_rate {rate} needs prompts or classes")
    return Guided(denoiser, rate)


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
