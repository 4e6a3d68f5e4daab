"""Latent diffusion in VP scaling: Stable Diffusion 1.x and 2.x, and unconditional models.

Rombach et al. 2022, arXiv:2112.10752. Latents [B, C, h, w] are those of the VAE times its
scaling factor; L tokens of text.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.base import Backend, ModelOptions, Prompt, classifier_free, no_prompt
from backends.clock import plain_like
from backends.embeddings import Embedding, Texts, say_what_is_cut, usual_text
from backends.latents import decode, image_size, prepare_vae, vae_factor
from backends.vp import Table, clean, prediction_of, scaled, table_of
from solvers.field import Condition


def sd_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
    """The backend of a StableDiffusionPipeline, whose parts it shares."""

    def encode(text: str) -> Embedding:
        say_what_is_cut(text, (pipe.tokenizer, pipe.tokenizer.model_max_length))
        embeds, _ = pipe.encode_prompt(text, device, 1, False)
        return {"text": embeds[0].to(pipe.unet.dtype)}

    texts = Texts(encode, device, options.negative_prompt or "").at_once(options.encode_first)
    return built(pipe, pipe.vae, texts, device, options)


def uncond_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
    """The backend of an LDMPipeline (a UNet2DModel and a VQModel), whose parts it shares."""
    if options.negative_prompt:
        raise ValueError("this model takes no prompts, so no negative one either")
    return built(pipe, pipe.vqvae, None, device, options)


def built(
    pipe: Any, vae: Any, texts: Texts | None, device: torch.device, options: ModelOptions
) -> Backend:
    """What the two kinds have in common: the U-Net's estimate of noise, data or velocity as x0."""
    factor, unet = vae_factor(vae), pipe.unet
    size = image_size(options, unet.config.sample_size * factor, factor)
    prepare_vae(vae, options)
    table, prediction = table_of(pipe.scheduler.config), prediction_of(pipe.scheduler.config)

    here = Table(table.log_sigmas.to(device))  # no copy in a call

    def encode(prompts: Sequence[Prompt]) -> Condition | None:
        if texts:
            return texts.condition(prompts)
        if any(prompt is not None for prompt in prompts):
            raise ValueError(f"this model takes no prompts, not {prompts[0]!r}")
        return None

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        seen, t = scaled(x, sigma).to(unet.dtype), here.sigma_inv(sigma).to(x.dtype)
        cond = cond or encode([None] * len(x))
        text = {"encoder_hidden_states": cond.given["text"]} if cond else {}
        output = unet(seen, t, **text, return_dict=False)[0]
        return clean(x, sigma, output, prediction)

    return Backend(
        family="ldm",
        denoise=denoise,
        encode=encode,
        decode=partial(decode, vae),
        guide=classifier_free,
        levels=table.levels,
        shape=(unet.config.in_channels, size[0] // factor, size[1] // factor),
        size=size,
        device=device,
        dtype=unet.dtype,
        usual_prompt=usual_text if texts else no_prompt,
        config={"scheduler": plain_like(pipe.scheduler)},
    )
