"""FLUX.1: a FluxPipeline as a backend, with guidance embedded in the network.

Latents [B, C, h, w], packed for the network into [B, h w / 4, 4 C]; L tokens of text.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends import latents
from backends.base import Backend, ModelOptions
from backends.parametrization import flow_clean, levels_at, plain_like
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


def flux_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
    """The backend of a FluxPipeline, whose parts it shares.

    Raises ValueError for a size that the model does not allow, or a negative prompt.
    """
    if options.negative_prompt:
        raise ValueError("FLUX takes no negative prompt: its guidance is part of the network")
    factor = latents.vae_factor(pipe.vae)
    size = latents.image_size(options, USUAL_LATENTS * factor, factor * PATCH)
    latents.prepare_vae(pipe.vae, options)
    height, width = (side // factor for side in size)
    transformer = pipe.transformer  # all of the pipe that sampling keeps: encoders may be let go
    dtype = transformer.dtype

    def encode(text: str) -> latents.Embedding:
        clip = pipe.tokenizer, pipe.tokenizer.model_max_length
        latents.say_what_is_cut(text, clip, (pipe.tokenizer_2, TEXT_TOKENS))
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=text, prompt_2=None, device=device, max_sequence_length=TEXT_TOKENS
        )
        return {"text": embeds[0].to(dtype), "pooled": pooled[0].to(dtype)}

    texts = latents.Texts(encode, device, None, options.encode_first)
    shape = (transformer.config.in_channels // PATCH**2, height, width)
    embeds_guidance = transformer.config.guidance_embeds

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        given = (cond or texts.condition([None] * len(x))).given
        strength = given.get("guidance", torch.full_like(sigma, NO_GUIDANCE, dtype=torch.float32))
        velocity = transformer(
            hidden_states=pack(x).to(dtype),
            timestep=sigma,
            guidance=strength if embeds_guidance else None,
            pooled_projections=given["pooled"],
            encoder_hidden_states=given["text"],
            txt_ids=torch.zeros(given["text"].shape[1], 3, device=x.device),
            img_ids=places(height // PATCH, width // PATCH, x.device),
            return_dict=False,
        )[0]
        return flow_clean(x, sigma, unpack(velocity, shape))

    def guide(network: Denoiser, rate: float, _cond: Condition | None) -> Denoiser:
        if rate != NO_GUIDANCE and not embeds_guidance:
            raise ValueError(f"guidance_rate {rate}: this FLUX was trained without guidance")

        def guided(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            cond = cond or texts.condition([None] * len(x))
            rates = (rate,) if cond.rates is None else cond.rates
            if not isinstance(rates, Tensor):
                size = len(x) // len(rates)
                rates = torch.cat([sigma.new_full((size,), r) for r in rates])
            strength = rates.to(x.device).float()
            return network(x, sigma, Condition({**cond.given, "guidance": strength}))

        return guided

    return Backend(
        family="flux",
        denoise=denoise,
        encode=texts.condition,
        decode=partial(latents.decode, pipe.vae),
        guide=guide,
        levels=levels_at(pipe.scheduler, height * width // PATCH**2),
        shape=shape,
        size=size,
        device=device,
        dtype=dtype,
        usual_prompt=latents.usual_text,
        config={"scheduler": plain_like(pipe.scheduler)},
    )
