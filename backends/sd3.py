"""Stable Diffusion 3: a StableDiffusion3Pipeline as a backend.

Esser et al. 2024, arXiv:2403.03206. Latents [B, C, h, w]; L tokens of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from backends.base import ModelOptions, NoiseLevels, Prompt, classifier_free
from backends.flow import CLOCK, clean, flow_levels
from backends.latents import decode, image_size, prepare_vae, vae_factor
from backends.text import Embedding, Texts, usual_text
from backends.zeros import fold_zeros
from solvers.field import Condition, Denoiser

TEXT_TOKENS = 256
"""T5's, in the pipeline's own default."""


@dataclass(frozen=True)
class SD3Backend:
    """The transformer's velocity as a denoiser; a prompt is a text.

    `zeros` is how many rows of zeros the last row of a text stands for, if it is no text itself.
    """

    transformer: Any
    vae: Any
    texts: Texts
    levels: NoiseLevels
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    zeros: int | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, C, h, w] at sigma [B] -> E[x0 | x, sigma] [B, C, h, w]."""
        told = cond.given if cond else self.encode([None] * len(x)).given
        velocity = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma * CLOCK,
            encoder_hidden_states=told["text"],
            pooled_projections=told["pooled"],
            joint_attention_kwargs=self.attention(sigma),
            return_dict=False,
        )[0]
        return clean(x, sigma, velocity)

    def attention(self, sigma: Tensor) -> dict[str, Tensor] | None:
        """What attention is told for a batch at sigma [B]."""
        return {"log_zeros": torch.full_like(sigma, log(self.zeros))} if self.zeros else None

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """Guidance away from the negative prompt, in one call of twice the rows."""
        return classifier_free(self, rate, cond)

    def usual_prompt(self, seed: int) -> Prompt:
        """One of the test prompts."""
        return usual_text(seed)

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Texts -> all encoders' tokens [B, L, D] and pooled embeddings [B, P]."""
        return self.texts.condition(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [0, 1]."""
        return decode(self.vae, latents)


def sd3_backend(pipe: Any, device: torch.device, options: ModelOptions) -> SD3Backend:
    """The backend of a StableDiffusion3Pipeline, whose parts it shares.

    Raises ValueError for a size that the model does not allow.
    """
    config, factor = pipe.transformer.config, vae_factor(pipe.vae)
    size = image_size(options, config.sample_size * factor, factor * config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size * factor
    if max(size) > largest:
        raise ValueError(f"resolution {max(size)} is too large: the model goes up to {largest}")
    prepare_vae(pipe.vae, options)
    height, width = (side // factor for side in size)
    tokens = (height // config.patch_size) * (width // config.patch_size)
    others = tokens + pipe.tokenizer_max_length
    folded = pipe.text_encoder_3 is None and fold_zeros(pipe.transformer, TEXT_TOKENS, others)

    def encode(text: str) -> Embedding:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=text,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=1 if folded else TEXT_TOKENS,
        )
        dtype = pipe.transformer.dtype
        return {"text": embeds[0].to(dtype), "pooled": pooled[0].to(dtype)}

    return SD3Backend(
        transformer=pipe.transformer,
        vae=pipe.vae,
        texts=Texts(encode, device, options.negative_prompt or "").at_once(options.encode_first),
        levels=flow_levels(pipe.scheduler.config, tokens),
        latent_shape=(config.in_channels, height, width),
        image_size=size,
        device=device,
        dtype=pipe.transformer.dtype,
        zeros=TEXT_TOKENS if folded else None,
    )
