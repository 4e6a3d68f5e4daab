"""FLUX.1: a FluxPipeline as a backend, with guidance embedded in the network.

Latents [B, C, h, w], packed for the network into [B, h w / 4, 4 C]; L tokens of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backends.base import ModelOptions, NoiseLevels, Prompt
from backends.flow import clean, flow_levels
from backends.latents import decode, image_size, prepare_vae, vae_factor
from backends.text import Embedding, Texts, usual_text
from solvers.field import Condition, Denoiser

PATCH = 2
USUAL_LATENTS = 128
"""FLUX has no size of its own; the pipeline's default is so many latents a side."""
TEXT_TOKENS = 512
NO_GUIDANCE = 1.0


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> a token for each 2x2 patch, [B, h w / 4, 4 C]."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`, to latents of this shape [C, h, w]."""
    c, h, w = shape
    patches = tokens.reshape(-1, h // PATCH, w // PATCH, c, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h, w)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """Each token's place [height * width, 3]: 0, row, column."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1).float()


@dataclass(frozen=True)
class FluxBackend:
    """The transformer's velocity as a denoiser; a prompt is a text."""

    transformer: Any
    vae: Any
    texts: Texts
    levels: NoiseLevels
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    guidance: float = NO_GUIDANCE

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, C, h, w] at sigma [B] -> E[x0 | x, sigma] [B, C, h, w]."""
        told = cond.given if cond else self.encode([None] * len(x)).given
        _, height, width = self.latent_shape
        strength = torch.full_like(sigma, self.guidance, dtype=torch.float32)
        velocity = self.transformer(
            hidden_states=pack(x).to(self.dtype),
            timestep=sigma,
            guidance=strength if self.transformer.config.guidance_embeds else None,
            pooled_projections=told["pooled"],
            encoder_hidden_states=told["text"],
            txt_ids=torch.zeros(told["text"].shape[1], 3, device=x.device),
            img_ids=places(height // PATCH, width // PATCH, x.device),
            return_dict=False,
        )[0]
        return clean(x, sigma, unpack(velocity, self.latent_shape))

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """The network told of another guidance; ValueError where it cannot be (schnell)."""
        if rate != NO_GUIDANCE and not self.transformer.config.guidance_embeds:
            raise ValueError(f"guidance_rate {rate}: this FLUX was trained without guidance")
        return replace(self, guidance=rate)

    def usual_prompt(self, seed: int) -> Prompt:
        """One of the test prompts."""
        return usual_text(seed)

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Texts -> T5's tokens [B, L, D] and CLIP's pooled embeddings [B, P]."""
        return self.texts.condition(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [0, 1]."""
        return decode(self.vae, latents)


def flux_backend(pipe: Any, device: torch.device, options: ModelOptions) -> FluxBackend:
    """The backend of a FluxPipeline, whose parts it shares.

    Raises ValueError for a size that the model does not allow, or a negative prompt.
    """
    if options.negative_prompt:
        raise ValueError("FLUX takes no negative prompt: its guidance is part of the network")
    factor = vae_factor(pipe.vae)
    size = image_size(options, USUAL_LATENTS * factor, factor * PATCH)
    prepare_vae(pipe.vae, options)
    height, width = (side // factor for side in size)
    dtype = pipe.transformer.dtype

    def encode(text: str) -> Embedding:
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=text, prompt_2=None, device=device, max_sequence_length=TEXT_TOKENS
        )
        return {"text": embeds[0].to(dtype), "pooled": pooled[0].to(dtype)}

    return FluxBackend(
        transformer=pipe.transformer,
        vae=pipe.vae,
        texts=Texts(encode, device, None).at_once(options.encode_first),
        levels=flow_levels(pipe.scheduler.config, height * width // PATCH**2),
        latent_shape=(pipe.transformer.config.in_channels // PATCH**2, height, width),
        image_size=size,
        device=device,
        dtype=dtype,
    )
