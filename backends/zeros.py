"""Rows of zeros in the place of a text encoder that is not there, one of them for all.

Without a T5 encoder StableDiffusion3Pipeline hands the transformer 256 rows of zeros after the
CLIP tokens. They stay alike in every layer, so that one of them whose attention weight is 256
times as large stands for all: ln(256) is added to its scores, and the numbers are the same. B
samples, T tokens of the image, L of the text, D channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = "JointAttnProcessor2_0"
TEXT_TOKENS = 256
"""T5's, in the pipeline's own default."""
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
        image = [attn.to_q, attn.to_k, attn.to_v]
        text = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        q, k, v = (heads(project(hidden_states), attn.heads) for project in image)
        tq, tk, tv = (heads(project(encoder_hidden_states), attn.heads) for project in text)
        q = torch.cat([normed(attn.norm_q, q), normed(attn.norm_added_q, tq)], 2)
        k = torch.cat([normed(attn.norm_k, k), normed(attn.norm_added_k, tk)], 2)
        v = torch.cat([v, tv], 2)
        scores = F.pad(log_zeros[:, None], (k.shape[2] - 1, 0))[:, None, None]
        mask = scores.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        seen, read = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](seen), read if attn.context_pre_only else attn.to_add_out(read)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, L, D] -> [B, count, L, D / count]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def normed(norm: Any, x: Tensor) -> Tensor:
    """x under a norm that not every model has."""
    return x if norm is None else norm(x)


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
    transformer.set_attn_processor(ours | {n: OneForAllZeros(p) for n, p in plain.items()})
    return True


def folding(pipe: Any, given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Arguments of a StableDiffusion3Pipeline's call that fold its zeros, for a batch of rows.

    None where there is a T5, where the caller has a say in attention or in the length of texts,
    or where the zeros are too few.
    """
    own = (
        "prompt_embeds",
        "max_sequence_length",
        "joint_attention_kwargs",
        "skip_guidance_layers",
    )
    taken = any(given.get(name) is not None for name in (*own, "ip_adapter_image"))
    if type(pipe).__name__ != "StableDiffusion3Pipeline" or pipe.text_encoder_3 or taken:
        return {}
    usual = pipe.default_sample_size * pipe.vae_scale_factor
    patch = pipe.vae_scale_factor * pipe.patch_size
    height, width = ((given.get(side) or usual) // patch for side in ("height", "width"))
    if not fold_zeros(pipe.transformer, TEXT_TOKENS, height * width + pipe.tokenizer_max_length):
        return {}
    log_zeros = torch.full((rows,), log(TEXT_TOKENS), device=pipe._execution_device)
    return {"max_sequence_length": 1, "joint_attention_kwargs": {"log_zeros": log_zeros}}
