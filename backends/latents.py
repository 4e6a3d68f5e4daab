"""What models on latents have in common: prompts as tensors, sizes, the VAE's way to pixels."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import ModelOptions, Prompt, pixels
from solvers.field import Condition
from src.text import read_prompts

Embedding: TypeAlias = dict[str, Tensor]
"""What a network is given for one prompt: tensors without the dimension of the batch."""

LOG = logging.getLogger(__name__)
MOST_TEXTS = 1024
"""Embeddings that are kept while they can be made again: those of a T5 have megabytes."""
USUAL = Path(__file__).resolve().parent.parent / "src" / "prompts" / "test.txt"


# --- prompts ------------------------------------------------------------------------------


@dataclass
class Texts:
    """The text encoders, until they are let go, and what they gave so far (on the CPU).

    Each text is encoded alone, so that its numbers do not depend on the others. `negative` is
    what guidance leads away from; None where the network has no such thing. After `first`, if
    there are any, the encoders are let go.
    """

    encoder: Callable[[str], Embedding] | None
    device: torch.device
    negative: str | None = ""
    first: Sequence[str] = ()
    cache: dict[str, Embedding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.first:
            for text in self.first if self.negative is None else (*self.first, self.negative):
                self.stacked([text])
            self.encoder = None

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """Texts -> [B, ...] tensors, None being the empty text; ValueError for class numbers."""
        given = self.stacked(texts_of(prompts))
        if self.negative is None:
            return Condition(given)
        return Condition(given, self.stacked([self.negative] * len(prompts)))

    @torch.no_grad()
    def stacked(self, texts: Sequence[str]) -> Embedding:
        """The embeddings of these texts, one row each; ValueError where encoders are let go."""
        for text in texts:
            if text not in self.cache:
                encoder = self.encoder
                if encoder is None:
                    reason = f"the text encoders were let go before {text[:80]!r} was encoded"
                    raise ValueError(reason)
                self.cache[text] = {n: t.cpu() for n, t in encoder(text).items()}
            self.cache[text] = self.cache.pop(text)  # the last one used is the last to go
        rows = [self.cache[text] for text in texts]
        while self.encoder and len(self.cache) > MOST_TEXTS:
            self.cache.pop(next(iter(self.cache)))
        return {n: torch.stack([row[n] for row in rows]).to(self.device) for n in rows[0]}


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """Prompts as texts, None being the empty one; ValueError for class numbers."""
    for prompt in prompts:
        if not isinstance(prompt, str | None):
            raise ValueError(f"this model takes a text for every image, not {prompt!r}")
    return ["" if prompt is None else str(prompt) for prompt in prompts]


def say_what_is_cut(text: str, *readers: tuple[Any, int]) -> None:
    """Log which end of a text is beyond what its encoders read."""
    for tokenizer, limit in readers:
        tokens = tokenizer(text, truncation=False, verbose=False).input_ids if tokenizer else []
        if len(tokens) > limit:
            end = tokenizer.decode(tokens[limit - 1 :], skip_special_tokens=True).strip()
            name = type(tokenizer).__name__.removesuffix("Fast").removesuffix("Tokenizer")
            LOG.warning("the prompt %r is too long: %s does not read %r", text[:40], name, end)


def usual_text(seed: int) -> str:
    """A prompt of src/prompts/test.txt, by the seed."""
    prompts = read_prompts(USUAL)
    return prompts[seed % len(prompts)]


# --- sizes and pixels ---------------------------------------------------------------------


def image_size(options: ModelOptions, usual: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of `multiple`; ValueError for any other."""
    size = options.size or (usual, usual)
    for side in size:
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise ValueError(f"resolution {side} is no multiple of {multiple}: try {near}")
    return size


def vae_factor(vae: Any) -> int:
    """Pixels a latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def prepare_vae(vae: Any, options: ModelOptions) -> None:
    """Decode in tiles or one image at a time; ValueError for a VAE that cannot."""
    try:
        if options.vae_tiling:
            vae.enable_tiling()
        if options.vae_slicing:
            vae.enable_slicing()
    except NotImplementedError:
        name = type(vae).__name__
        raise ValueError(f"{name} decodes neither in tiles nor in slices: leave it out") from None


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], by the VAE's scale and shift."""
    shift = vae.config.get("shift_factor") or 0.0
    x, dtype = latents / vae.config.scaling_factor + shift, vae.dtype
    upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        return pixels(vae.decode(x.to(vae.dtype), return_dict=False)[0])
    finally:
        if upcast:
            vae.to(dtype)
