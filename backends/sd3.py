"""Stable Diffusion 3: a StableDiffusion3Pipeline as a backend.

Esser et al. 2024, arXiv:2403.03206. Latents [B, C, h, w]; L tokens of text.
"""

from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor

from backends.base import Backend, ModelOptions, classifier_free
from backends.clock import plain_like
from backends.embeddings import Embedding, Texts, say_what_is_cut, usual_text
from backends.flow import CLOCK, clean, flow_levels
from backends.latents import decode, image_size, prepare_vae, vae_factor
from backends.zeros import TEXT_TOKENS, fold_zeros
from solvers.field import Condition


def sd3_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
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
        t5 = None if pipe.text_encoder_3 is None else pipe.tokenizer_3
        say_what_is_cut(text, (pipe.tokenizer, pipe.tokenizer_max_length), (t5, TEXT_TOKENS))
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

    texts = Texts(encode, device, options.negative_prompt or "").at_once(options.encode_first)

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        given = cond.given if cond else texts.condition([None] * len(x)).given
        zeros = {"log_zeros": torch.full_like(sigma, log(TEXT_TOKENS))} if folded else None
        velocity = pipe.transformer(
            hidden_states=x.to(pipe.transformer.dtype),
            timestep=sigma * CLOCK,
            encoder_hidden_states=given["text"],
            pooled_projections=given["pooled"],
            joint_attention_kwargs=zeros,
            return_dict=False,
        )[0]
        return clean(x, sigma, velocity)

    return Backend(
        family="sd3",
        denoise=denoise,
        encode=texts.condition,
        decode=partial(decode, pipe.vae),
        guide=classifier_free,
        levels=flow_levels(pipe.scheduler.config, tokens),
        shape=(config.in_channels, height, width),
        size=size,
        device=device,
        dtype=pipe.transformer.dtype,
        usual_prompt=usual_text,
        config={"scheduler": plain_like(pipe.scheduler)},
    )
