"""The tensors of diffusers' pipelines under the names of their makers' checkpoints."""

import re
from typing import Any

import torch
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
    tensors |= original_vae(pipe.vae)
    for name, t in pipe.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{bare}"] = t
    return {name: t.detach().clone().contiguous() for name, t in tensors.items()}


SD3_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_QKV = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def original_sd3(transformer: Any) -> dict[str, Tensor]:
    """The tensors of an SD3 transformer as a checkpoint of its makers has them."""
    state, blocks = transformer.state_dict(), transformer.config.num_layers
    tensors = {"pos_embed": state.pop("pos_embed.pos_embed")}
    last = f"transformer_blocks.{blocks - 1}.norm1_context.linear"
    for name in [n for n in state if n.startswith(("norm_out", last))]:
        state[name] = torch.cat(state[name].chunk(2)[::-1])  # theirs is shift, scale
    for i in range(blocks):
        for block, names in SD3_QKV.items():
            for kind in ("weight", "bias"):
                parts = [state.pop(f"transformer_blocks.{i}.{n}.{kind}") for n in names]
                tensors[f"joint_blocks.{i}.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, t in state.items():
        if name.startswith("transformer_blocks."):
            _, i, rest = name.split(".", 2)
            tensors[f"joint_blocks.{i}.{replaced(rest, SD3_BLOCK)}"] = t
        else:
            own = name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")
            tensors[replaced(own, SD3_TOP)] = t
    return {f"model.diffusion_model.{n}": t.detach().clone() for n, t in tensors.items()}


def original_vae(vae: Any) -> dict[str, Tensor]:
    """The tensors of a VAE as they are in a checkpoint with a transformer."""
    levels = len(vae.config.block_out_channels)
    return {
        f"first_stage_model.{vae_name(n, levels)}": (
            t[:, :, None, None] if "attentions" in n and t.ndim == 2 else t
        )
        .detach()
        .clone()
        for n, t in vae.state_dict().items()
    }
