"""Stable Diffusion 3: a StableDiffusion3Pipeline as a backend.

Esser et al. 2024, arXiv:2403.03206. Latents [B, C, h, w]; L tokens of text.

Without a T5 encoder the pipeline hands the transformer 256 rows of zeros after the CLIP tokens.
They stay alike in every layer, so that one of them whose attention weight is 256 times as large
stands for all: ln(256) is added to its scores, and the numbers are the same. B samples, T tokens
of the image, L of the text, D channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import latents
from backends.base import Backend, ModelOptions, classifier_free
from backends.parametrization import FLOW_STEPS, flow_clean, levels_at, plain_like
from solvers.field import Condition

PLAIN = "JointAttnProcessor2_0"
TEXT_TOKENS = 256
"""T5's, in the pipeline's own default."""
OWN_SAY = (
    *("prompt_embeds", "negative_prompt_embeds", "max_sequence_length"),
    "joint_attention_kwargs",
    *("skip_guidance_layers", "ip_adapter_image"),
)
LEAST_SHARE = 0.25
"""Of all tokens: with fewer zeros, attention without a mask is faster on a GPU."""


@dataclass(frozen=True)
class OneForAllZeros:
    """Joint attention whose last key counts exp(log_zeros) times; plain attention without."""

    plain: Callable[..., Any]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        log_zeros: Tensor | None = None,
    ) -> Any:
        """Tokens of the image [B, T, D] and the text [B, L, D] after attention; log_zeros [B]."""
        if log_zeros is None or encoder_hidden_states is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)

        def heads(project: Any, x: Tensor, norm: Any = None) -> Tensor:
            y = project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return y if norm is None else norm(y)

        x, text = hidden_states, encoder_hidden_states
        q, tq = heads(attn.to_q, x, attn.norm_q), heads(attn.add_q_proj, text, attn.norm_added_q)
        k, tk = heads(attn.to_k, x, attn.norm_k), heads(attn.add_k_proj, text, attn.norm_added_k)
        q, k = torch.cat([q, tq], 2), torch.cat([k, tk], 2)
        v = torch.cat([heads(attn.to_v, x), heads(attn.add_v_proj, text)], 2)
        scores = F.pad(log_zeros[:, None], (k.shape[2] - 1, 0))[:, None, None]
        mask = scores.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        seen, read = mixed.split([x.shape[1], text.shape[1]], 1)
        return attn.to_out[0](seen), read if attn.context_pre_only else attn.to_add_out(read)


def fold_zeros(transformer: Any, zeros: int, others: int) -> bool:
    """Whether so many rows of zeros beside so many other tokens can be one row, and are then.

    The transformer serves whoever does not give `log_zeros` as before. One with attention of its
    user's own, or with few zeros, is left alone.
    """
    processors = transformer.attn_processors
    ours = {n: p for n, p in processors.items() if isinstance(p, OneForAllZeros)}
    plain = {n: p for n, p in processors.items() if type(p).__name__ == PLAIN}
    if len(ours) + len(plain) < len(processors) or zeros < LEAST_SHARE * (zeros + others):
        return False
    if plain:
        transformer.set_attn_processor(ours | {n: OneForAllZeros(p) for n, p in plain.items()})
    return True


def folding(pipe: Any, given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Arguments of a StableDiffusion3Pipeline's call that fold its zeros, for a batch of rows."""
    taken = any(given.get(name) is not None for name in OWN_SAY)
    if type(pipe).__name__ != "StableDiffusion3Pipeline" or pipe.text_encoder_3 or taken:
        return {}
    usual = pipe.default_sample_size * pipe.vae_scale_factor
    patch = pipe.vae_scale_factor * pipe.patch_size
    height, width = ((given.get(side) or usual) // patch for side in ("height", "width"))
    if not fold_zeros(pipe.transformer, TEXT_TOKENS, height * width + pipe.tokenizer_max_length):
        return {}
    log_zeros = torch.full((rows,), log(TEXT_TOKENS), device=pipe._execution_device)
    return {"max_sequence_length": 1, "joint_attention_kwargs": {"log_zeros": log_zeros}}


def sd3_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
    """The backend of a StableDiffusion3Pipeline, whose parts it shares.

    Raises ValueError for a size that the model does not allow.
    """
    config, factor = pipe.transformer.config, latents.vae_factor(pipe.vae)
    size = latents.image_size(options, config.sample_size * factor, factor * config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size * factor
    if max(size) > largest:
        raise ValueError(f"resolution {max(size)} is too large: the model goes up to {largest}")
    latents.prepare_vae(pipe.vae, options)
    height, width = (side // factor for side in size)
    tokens = (height // config.patch_size) * (width // config.patch_size)
    others = tokens + pipe.tokenizer_max_length
    folded = pipe.text_encoder_3 is None and fold_zeros(pipe.transformer, TEXT_TOKENS, others)

    transformer = pipe.transformer  # all of the pipe that sampling keeps: encoders may be let go

    def encode(text: str) -> latents.Embedding:
        t5 = None if pipe.text_encoder_3 is None else pipe.tokenizer_3
        latents.say_what_is_cut(
            text, (pipe.tokenizer, pipe.tokenizer_max_length), (t5, TEXT_TOKENS)
        )
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=text,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=1 if folded else TEXT_TOKENS,
        )
        return {n: t[0].to(transformer.dtype) for n, t in (("text", embeds), ("pooled", pooled))}

    texts = latents.Texts(encode, device, options.negative_prompt or "", options.encode_first)

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        given = cond.given if cond else texts.condition([None] * len(x)).given
        zeros = {"log_zeros": torch.full_like(sigma, log(TEXT_TOKENS))} if folded else None
        velocity = transformer(
            hidden_states=x.to(transformer.dtype),
            timestep=sigma * FLOW_STEPS,
            encoder_hidden_states=given["text"],
            pooled_projections=given["pooled"],
            joint_attention_kwargs=zeros,
            return_dict=False,
        )[0]
        return flow_clean(x, sigma, velocity)

    return Backend(
        family="sd3",
        denoise=denoise,
        encode=texts.condition,
        decode=partial(latents.decode, pipe.vae),
        guide=classifier_free,
        levels=levels_at(pipe.scheduler, tokens),
        shape=(config.in_channels, height, width),
        size=size,
        device=device,
        dtype=transformer.dtype,
        usual_prompt=latents.usual_text,
        config={"scheduler": plain_like(pipe.scheduler)},
    )
