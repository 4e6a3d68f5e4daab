"""The tensors of diffusers' networks under the names of their makers' checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYOUTS = json.loads((Path(__file__).parents[1] / "data" / "layouts.json").read_text())
"""Their names by diffusers', and what CompVis' own network gives for weights by rule."""


def original(network: Any, kind: str) -> dict[str, Tensor]:
    """A network's tensors as in a checkpoint; `kind` is one of LAYOUTS."""
    tensors: dict[str, list[Tensor]] = {}
    own, blocks = network.state_dict(), getattr(network.config, "num_layers", 0)
    shifted = ("norm_out", f"transformer_blocks.{blocks - 1}.norm1_context.linear")
    for name, theirs in LAYOUTS[kind].items():
        t = own[name]
        if kind == "sd3.transformer" and name.startswith(shifted):
            t = torch.cat(t.chunk(2)[::-1])  # theirs is shift, scale
        if "attentions" in name and t.ndim == 2 and theirs.startswith("first_stage_model."):
            t = t[:, :, None, None]
        tensors.setdefault(theirs, []).append(t)
    return {name: torch.cat(parts).detach().clone() for name, parts in tensors.items()}


def original_sd(pipe: Any) -> dict[str, Tensor]:
    """All the tensors of a StableDiffusionPipeline as a checkpoint of its makers has them."""
    texts = {
        f"cond_stage_model.transformer.text_model.{n.removeprefix('text_model.')}": t.clone()
        for n, t in pipe.text_encoder.state_dict().items()
    }
    return original(pipe.unet, "sd.unet") | original(pipe.vae, "sd.vae") | texts
