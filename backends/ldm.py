"""Latent diffusion in VP scaling: Stable Diffusion 1.x and 2.x, and unconditional models.

Rombach et al. 2022, arXiv:2112.10752. Latents [B, C, h, w] are those of the VAE times its
scaling factor; L tokens of text.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends import latents
from backends.base import Backend, ModelOptions, Prompt, classifier_free, no_prompt
from backends.parametrization import parametrization_of, plain_like
from solvers.field import Condition
from solvers.vp import scaled


def ldm_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
    """The backend of a StableDiffusionPipeline, or of an LDMPipeline (UNet2DModel and VQModel).

    Its parts are shared. Raises ValueError for a size that the model does not allow, a
    negative prompt where it takes no prompts, or a scheduler that thresholds what guidance gives.
    """
    vae, texts = pipe.components.get("vae"), None
    if vae is None:
        vae = pipe.vqvae
        if options.negative_prompt:
            raise ValueError("this model takes no prompts, so no negative one either")
    factor, unet = latents.vae_factor(vae), pipe.unet
    size = latents.image_size(options, unet.config.sample_size * factor, factor)
    latents.prepare_vae(vae, options)
    model = parametrization_of(pipe.scheduler)
    if model.threshold or (model.clip and "text_encoder" in pipe.components):
        what = "thresholding" if model.threshold else "clip_sample"
        raise ValueError(f"{what} in the scheduler's config: use parallel(pipe, predictor)")
    if (table := model.table) is None:
        raise ValueError("flow matching in the scheduler's config: use parallel(pipe, predictor)")

    def embed(text: str) -> latents.Embedding:
        latents.say_what_is_cut(text, (pipe.tokenizer, pipe.tokenizer.model_max_length))
        embeds, _ = pipe.encode_prompt(text, device, 1, False)
        return {"text": embeds[0].to(unet.dtype)}

    if "text_encoder" in pipe.components:
        texts = latents.Texts(embed, device, options.negative_prompt or "", options.encode_first)

    def encode(prompts: Sequence[Prompt]) -> Condition | None:
        if texts:
            return texts.condition(prompts)
        if any(prompt is not None for prompt in prompts):
            raise ValueError(f"this model takes no prompts, not {prompts[0]!r}")
        return None

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        seen, t = scaled(x, sigma).to(unet.dtype), table.sigma_inv(sigma).to(x.dtype)
        cond = cond or encode([None] * len(x))
        text = {"encoder_hidden_states": cond.given["text"]} if cond else {}
        output = unet(seen, t, **text, return_dict=False)[0]
        return model.clean(x, sigma, output)

    return Backend(
        family="ldm",
        denoise=denoise,
        encode=encode,
        decode=partial(latents.decode, vae),
        guide=classifier_free,
        levels=table.levels,
        shape=(unet.config.in_channels, size[0] // factor, size[1] // factor),
        size=size,
        device=device,
        dtype=unet.dtype,
        usual_prompt=latents.usual_text if texts else no_prompt,
        config={"scheduler": plain_like(pipe.scheduler)},
    )
