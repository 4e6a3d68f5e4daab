"""Latent diffusion in VP scaling: Stable Diffusion 1.x and 2.x, and unconditional models.

Rombach et al. 2022, arXiv:2112.10752. Latents [B, C, h, w] are those of the VAE times its
scaling factor; L tokens of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.base import ModelOptions, NoiseLevels, Prompt, classifier_free
from backends.latents import decode, image_size, prepare_vae, vae_factor
from backends.text import Embedding, Texts, usual_text
from backends.vp import Table, clean, prediction_of, scaled, table_of
from solvers.field import Condition, Denoiser


@dataclass(frozen=True)
class LDMBackend:
    """A U-Net as a denoiser in sigma; a prompt is a text, or None where there are no texts."""

    unet: Any
    vae: Any
    texts: Texts | None
    table: Table
    prediction: str
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    @property
    def levels(self) -> NoiseLevels:
        """The levels of the network's own timesteps."""
        return self.table.levels

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, C, h, w] at sigma [B] -> E[x0 | x, sigma] [B, C, h, w]."""
        seen, t = scaled(x, sigma).to(self.dtype), self.table.sigma_inv(sigma).to(x.dtype)
        cond = cond or self.encode([None] * len(x))
        told = {"encoder_hidden_states": cond.given["text"]} if cond else {}
        output = self.unet(seen, t, **told, return_dict=False)[0]
        return clean(x, sigma, output, self.prediction)

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """Guidance away from the negative prompt, in one call of twice the rows."""
        return classifier_free(self, rate, cond)

    def usual_prompt(self, seed: int) -> Prompt:
        """One of the test prompts, or None for a model without texts."""
        return usual_text(seed) if self.texts else None

    def encode(self, prompts: Sequence[Prompt]) -> Condition | None:
        """Texts -> CLIP's tokens [B, L, D]; ValueError for prompts to a model without texts."""
        if self.texts:
            return self.texts.condition(prompts)
        if any(prompt is not None for prompt in prompts):
            raise ValueError(f"this model takes no prompts, not {prompts[0]!r}")
        return None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [0, 1]."""
        return decode(self.vae, latents)


def sd_backend(pipe: Any, device: torch.device, options: ModelOptions) -> LDMBackend:
    """The backend of a StableDiffusionPipeline, whose parts it shares."""

    def encode(text: str) -> Embedding:
        embeds, _ = pipe.encode_prompt(text, device, 1, False)
        return {"text": embeds[0].to(pipe.unet.dtype)}

    texts = Texts(encode, device, options.negative_prompt or "").at_once(options.encode_first)
    return built(pipe, pipe.vae, texts, device, options)


def uncond_backend(pipe: Any, device: torch.device, options: ModelOptions) -> LDMBackend:
    """The backend of an LDMPipeline (a UNet2DModel and a VQModel), whose parts it shares."""
    if options.negative_prompt:
        raise ValueError("this model takes no prompts, so no negative one either")
    return built(pipe, pipe.vqvae, None, device, options)


def built(
    pipe: Any, vae: Any, texts: Texts | None, device: torch.device, options: ModelOptions
) -> LDMBackend:
    """What the two kinds have in common."""
    factor, unet = vae_factor(vae), pipe.unet
    size = image_size(options, unet.config.sample_size * factor, factor)
    prepare_vae(vae, options)
    return LDMBackend(
        unet=unet,
        vae=vae,
        texts=texts,
        table=table_of(pipe.scheduler.config),
        prediction=prediction_of(pipe.scheduler.config),
        latent_shape=(unet.config.in_channels, size[0] // factor, size[1] // factor),
        image_size=size,
        device=device,
        dtype=unet.dtype,
    )
