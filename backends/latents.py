"""What models on latents have in common: sizes, and the VAE's way back to pixels."""

from typing import Any

import torch
from torch import Tensor

from backends.base import ModelOptions, pixels


def image_size(options: ModelOptions, usual: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of `multiple`; ValueError for any other."""
    size = options.size or (usual, usual)
    for pixels_ in size:
        if pixels_ < multiple or pixels_ % multiple:
            near = max(multiple, round(pixels_ / multiple) * multiple)
            raise ValueError(f"resolution {pixels_} is no multiple of {multiple}: try {near}")
    return size


def vae_factor(vae: Any) -> int:
    """Pixels a latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def prepare_vae(vae: Any, options: ModelOptions) -> None:
    """Decode in tiles or one image at a time, where memory is short."""
    try:
        if options.vae_tiling:
            vae.enable_tiling()
        if options.vae_slicing:
            vae.enable_slicing()
    except NotImplementedError:
        name = type(vae).__name__
        raise ValueError(f"{name} decodes neither in tiles nor in slices: leave it out") from None


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], by the VAE's scale and shift.

    A VAE in float16 whose config says force_upcast decodes in float32.
    """
    shift = vae.config.get("shift_factor") or 0.0
    x, dtype = latents / vae.config.scaling_factor + shift, vae.dtype
    upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    images = pixels(vae.decode(x.to(vae.dtype), return_dict=False)[0])
    if upcast:
        vae.to(dtype)
    return images
