"""CompVis' unconditional latent diffusion (LSUN, FFHQ) as the parts of diffusers' LDMPipeline.

Rombach et al. 2022, arXiv:2112.10752: a U-Net with attention of 32 channels a head, and a VQ
autoencoder. The sizes are read off the checkpoint's tensors, whose names and layouts are those of
`ldm.modules.diffusionmodules` there.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers as library
import torch
from accelerate import init_empty_weights
from torch import Tensor

from backends.vp import PUBLISHED

diffusers: Any = library  # its own annotations are not those of what it returns
HEAD = 32
UNET, FIRST = "model.diffusion_model.", "first_stage_model."
MARKS = (f"{UNET}input_blocks.0.0.weight", f"{FIRST}quantize.embedding.weight")
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
VQ_ATTENTION = {
    **{"group_norm": "norm", "to_out.0": "proj_out"},
    **{"to_q": "q", "to_k": "k", "to_v": "v"},
}


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
    filled(unet, lambda name: unet_tensor(name, layers, attended, unet_of))
    filled(vq, lambda name: first[vq_name(name, depth)])
    betas = {**PUBLISHED["lsun_bedroom_ldm"], "clip_sample": False, "set_alpha_to_one": False}
    return diffusers.LDMPipeline(
        vqvae=vq.to(dtype).eval(),
        unet=unet.to(dtype).eval(),
        scheduler=diffusers.DDIMScheduler(**betas),
    )


def filled(network: torch.nn.Module, tensor_of: Callable[[str], Tensor]) -> None:
    """Give an empty network its tensors, convolutions of size 1 as matrices where it has those."""
    state = {name: (tensor_of(name), like) for name, like in network.state_dict().items()}
    fit = {n: t.reshape(like.shape) if t.ndim > like.ndim else t for n, (t, like) in state.items()}
    network.load_state_dict(fit, assign=True)


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


def replaced(name: str, names: Mapping[str, str]) -> str:
    """The name with the first of `names` that it starts with replaced."""
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def unet_tensor(
    name: str, layers: int, attended: list[bool], tensors: Mapping[str, Tensor]
) -> Tensor:
    """The tensor of a UNet2DModel's name; there, q, k and v of a head stand in one."""
    block, kind, i, rest = "", "", 0, name
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        way, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        folder = "input_blocks" if way == "down" else "output_blocks"
        first = level * (layers + 1) + (way == "down")
        if kind == "downsamplers":
            return tensors[f"{folder}.{first + layers}.0.{rest.replace('conv', 'op', 1)}"]
        if kind == "upsamplers":
            place = 2 if attended[::-1][level] else 1
            return tensors[f"{folder}.{first + layers}.{place}.{rest}"]
        block = f"{folder}.{first + i}.{int(kind == 'attentions')}"
    elif match := re.match(r"mid_block\.(\w+)\.(\d+)\.(.+)", name):
        kind, i, rest = match[1], int(match[2]), match[3]
        block = f"middle_block.{1 if kind == 'attentions' else 2 * i}"
    else:
        return tensors[replaced(name, UNET_TOP)]
    if kind == "attentions" and (part := re.match(r"to_([qkv])\.(\w+)", rest)):
        whole = tensors[f"{block}.qkv.{part[2]}"]
        heads = whole.unflatten(0, (-1, 3, HEAD))
        return heads[:, "qkv".index(part[1])].flatten(0, 1)
    return tensors[
        f"{block}.{replaced(rest, UNET_ATTENTION if kind == 'attentions' else UNET_RESNET)}"
    ]


def vq_name(name: str, levels: int) -> str:
    """A VQModel's tensor's name there; decoders count their levels from the other end."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    in_level = r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)"
    if match := re.match(in_level, name):
        side, way, level, part, i, rest = match.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        if part == "resnets":
            return f"{side}.{way}.{level}.block.{i}.{rest}"
        return f"{side}.{way}.{level}.{part.removesuffix('rs')}.{rest}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.(\w+)\.(\d+)\.(.+)", name):
        side, part, i, rest = match.groups()
        if part == "attentions":
            return f"{side}.mid.attn_1.{replaced(rest, VQ_ATTENTION)}"
        return f"{side}.mid.block_{int(i) + 1}.{rest}"
    return name
