"""CompVis' unconditional latent diffusion (LSUN, FFHQ) as the parts of diffusers' LDMPipeline.

Rombach et al. 2022, arXiv:2112.10752: a U-Net with attention of 32 channels a head, and a VQ
autoencoder. The sizes are read off the checkpoint's tensors, whose names and layouts are those of
`ldm.modules.diffusionmodules` there.
"""

import re
from collections.abc import Mapping
from typing import Any

import diffusers as library
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from solvers.vp import PUBLISHED

diffusers: Any = library  # its own annotations are not those of what it returns
HEAD = 32
UNET, FIRST = "model.diffusion_model.", "first_stage_model."
MARKS = (f"{UNET}input_blocks.0.0.weight", f"{FIRST}quantize.embedding.weight")


def is_unconditional(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is of such a model: no text or class stage beside it."""
    return all(mark in tensors for mark in MARKS) and not any(
        name.startswith("cond_stage_model.") for name in tensors
    )


def ldm_pipeline(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The LDMPipeline of a checkpoint's tensors, which it shares; KeyError for one that lacks."""
    unet_of = {n.removeprefix(UNET): t for n, t in tensors.items() if n.startswith(UNET)}
    first = {n.removeprefix(FIRST): t for n, t in tensors.items() if n.startswith(FIRST)}
    layers, widths, attended = unet_shape(unet_of)
    factor = 2 ** sum(f"encoder.down.{i}.downsample.conv.weight" in first for i in range(8))
    kinds = [("Attn" if a else "") for a in attended]
    with init_empty_weights(include_buffers=False):
        unet = diffusers.UNet2DModel(
            sample_size=256 // factor,
            in_channels=unet_of["input_blocks.0.0.weight"].shape[1],
            out_channels=unet_of["out.2.weight"].shape[0],
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            block_out_channels=widths,
            layers_per_block=layers,
            attention_head_dim=HEAD,
        )
        depth = factor.bit_length()
        vq = diffusers.VQModel(
            down_block_types=["DownEncoderBlock2D"] * depth,
            up_block_types=["UpDecoderBlock2D"] * depth,
            block_out_channels=[
                first[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(depth)
            ],
            layers_per_block=sum(
                f"encoder.down.0.block.{i}.norm1.weight" in first for i in range(8)
            ),
            latent_channels=first["quantize.embedding.weight"].shape[1],
            num_vq_embeddings=len(first["quantize.embedding.weight"]),
            sample_size=256,
            scaling_factor=float(tensors.get("scale_factor", torch.ones(()))),
        )
    names = convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))
    filled(unet, {name: t for key, value in names.items() for name, t in attention(key, value)})
    codes = {"quantize.embedding.weight": first["quantize.embedding.weight"]}
    filled(vq, convert_ldm_vae_checkpoint(dict(tensors), dict(vq.config)) | codes)
    betas = {**PUBLISHED["lsun_bedroom_ldm"], "clip_sample": False, "set_alpha_to_one": False}
    return diffusers.LDMPipeline(
        vqvae=vq.to(dtype).eval(),
        unet=unet.to(dtype).eval(),
        scheduler=diffusers.DDIMScheduler(**betas),
    )


def filled(network: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give an empty network its tensors, convolutions of size 1 as matrices where it has those."""
    like = network.state_dict()
    network.load_state_dict({n: t.reshape(like[n].shape) for n, t in tensors.items()}, assign=True)


def attention(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor under the names of UNet2DModel's attention; there, q, k, v of a head are one."""
    block, middle, rest = name.partition(".attentions.")
    place, _, rest = rest.partition(".")
    if not middle:
        return [(name, tensor)]
    whole = f"{block}.attentions.{place}"
    if rest.startswith("qkv."):
        heads = tensor.unflatten(0, (-1, 3, HEAD))
        parts = (heads[:, i].flatten(0, 1) for i in range(3))
        names = (f"{whole}.{rest.replace('qkv', f'to_{part}')}" for part in "qkv")
        return list(zip(names, parts, strict=True))
    renamed = rest.replace("proj_out", "to_out.0").replace("norm", "group_norm")
    return [(f"{whole}.{renamed}", tensor)]


def unet_shape(tensors: Mapping[str, Tensor]) -> tuple[int, list[int], list[bool]]:
    """Blocks a level, channels by level, and which levels have attention."""
    downs = sorted(
        int(n.split(".")[1])
        for n in tensors
        if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n)
    )
    layers = downs[0] - 1
    firsts = [1 + level * (layers + 1) for level in range(len(downs) + 1)]
    widths = [tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts]
    return layers, widths, [f"input_blocks.{i}.1.qkv.weight" in tensors for i in firsts]
