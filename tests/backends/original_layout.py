"""A diffusers Stable Diffusion pipeline's tensors under the names of its makers' checkpoints."""

import re
from typing import Any

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def replaced(name: str, names: dict[str, str]) -> str:
    """The name with the first of `names` that it starts with replaced."""
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def unet_name(name: str, layers: int) -> str:
    """A U-Net tensor's name, for `layers` residual blocks a level."""
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if block:
        way, level, part, i, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        per = layers + 1
        place = level * per + i + (1 if way == "down" else 0)
        folder = "input_blocks" if way == "down" else "output_blocks"
        if part == "downsamplers":
            return f"{folder}.{(level + 1) * per}.0.{rest.replace('conv', 'op', 1)}"
        if part == "upsamplers":
            attended = 2 if level else 1
            return f"{folder}.{level * per + layers}.{attended}.{rest}"
        if part == "attentions":
            return f"{folder}.{place}.1.{rest}"
        return f"{folder}.{place}.0.{replaced(rest, RESNET)}"
    middle = re.match(r"mid_block\.(\w+)\.(\d+)\.(.+)", name)
    if middle:
        if middle[1] == "attentions":
            return f"middle_block.1.{middle[3]}"
        return f"middle_block.{2 * int(middle[2])}.{replaced(middle[3], RESNET)}"
    return replaced(name, TOP)


def vae_name(name: str, levels: int) -> str:
    """A VAE tensor's name; decoders count their levels from the other end."""
    shortcut = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    block = re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", shortcut)
    if block:
        side, way, level, part, i, rest = block.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        if part == "resnets":
            return f"{side}.{way}.{level}.block.{i}.{rest}"
        return f"{side}.{way}.{level}.{part.removesuffix('rs')}.{rest}"
    middle = re.match(r"(encoder|decoder)\.mid_block\.(\w+)\.(\d+)\.(.+)", shortcut)
    if middle:
        side, part, i, rest = middle.groups()
        if part == "attentions":
            return f"{side}.mid.attn_1.{replaced(rest, VAE_ATTENTION)}"
        return f"{side}.mid.block_{int(i) + 1}.{rest}"
    return shortcut


def original(pipe: Any) -> dict[str, Tensor]:
    """All the tensors of a StableDiffusionPipeline as a checkpoint of its makers has them."""
    tensors: dict[str, Tensor] = {}
    layers = pipe.unet.config.layers_per_block
    for name, t in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, layers)}"] = t
    levels = len(pipe.vae.config.block_out_channels)
    for name, t in pipe.vae.state_dict().items():
        wide = t[:, :, None, None] if "attentions" in name and t.ndim == 2 else t
        tensors[f"first_stage_model.{vae_name(name, levels)}"] = wide
    for name, t in pipe.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{bare}"] = t
    return {name: t.detach().clone().contiguous() for name, t in tensors.items()}
