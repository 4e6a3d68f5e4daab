"""The parts of tiny-sd3 and tiny-clip: read, run as in training, and written.

They are those of any StableDiffusion3Pipeline (Esser et al. 2024, arXiv:2403.03206) and of any
open_clip model. B images, L text tokens, D channels.
"""

import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as library
import open_clip
import torch
import torch.nn.functional as F
import transformers as texts_library
from safetensors.torch import save_file
from torch import Tensor

from src.files import read_json, write_atomically, write_json

diffusers: Any = library  # its own annotations are not those of what it returns
transformers: Any = texts_library
MODELS = Path(__file__).parents[2] / "src" / "models"
CLIP, PIPELINE = MODELS / "tiny-clip", MODELS / "tiny-sd3"
LATENT = (16, 8, 8)
RENAMED = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def load_part(kind: Any, part: str, start: Path | None) -> Any:
    """Return a part of a pipeline in float32: start's weights, or none in the shipped shape."""
    if start:
        return kind.from_pretrained(start).float()
    return kind.from_config(kind.load_config(PIPELINE / part))


def load_clip(start: Path | None = CLIP) -> tuple[Any, Any]:
    """Return an open_clip model in float32, and its tokenizer: start's weights, or none."""
    folder = start or CLIP
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=start is not None)
    return model.float().eval(), transformers.CLIPTokenizer.from_pretrained(folder)


def save_clip(clip: Any, folder: Path) -> None:
    """Write a folder that open_clip opens as local-dir:FOLDER; the shipped vocabulary, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in CLIP.glob("*.*"):
        if file.suffix in (".json", ".txt") and file.name != "scores.json":
            shutil.copy(file, folder)
    weights = {name: value.half().contiguous() for name, value in clip.state_dict().items()}
    with write_atomically(folder / "open_clip_model.safetensors") as part:
        save_file(weights, part)


def tokenise(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return [N, L], cut and filled to the tokenizer's length."""
    rows = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return rows.input_ids


def text_tower(clip: Any) -> Any:
    """Return the text side of tiny-clip as transformers' CLIPTextModelWithProjection.

    Both are the causal transformer of Radford et al. 2021, arXiv:2103.00020; only names differ.
    """
    state = clip.state_dict()
    renamed = {new: state[old] for old, new in WHOLE.items()}
    renamed["text_projection.weight"] = state["text_projection"].T.contiguous()
    for name in (name for name in state if name.startswith("transformer.resblocks.")):
        _, _, layer, rest = name.split(".", 3)
        into = f"text_model.encoder.layers.{layer}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, share in zip("qkv", state[name].chunk(3), strict=True):
                renamed[f"{into}self_attn.{part}_proj.{kind}"] = share.contiguous()
        else:
            old = next(old for old in RENAMED if rest.startswith(old))
            renamed[into + RENAMED[old] + rest.removeprefix(old)] = state[name]
    config = transformers.CLIPTextConfig.from_pretrained(PIPELINE / "text_encoder")
    tower = transformers.CLIPTextModelWithProjection(config).float()
    tower.load_state_dict(renamed, strict=True)
    return tower.eval().requires_grad_(False)


def as_input(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [-1, 1], channels last in memory."""
    return (2 * images - 1).contiguous(memory_format=torch.channels_last)


def velocity(
    transformer: Any, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], log_zeros: Tensor
) -> Tensor:
    """The estimate of eps - x0 for x [B, *] at sigma [B]; its rows of zeros are folded.

    text: tokens [B, L, D] without rows of zeros, and pooled [B, D].
    """
    tokens, pooled = text
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=F.pad(tokens, (0, 0, 0, 1)),
        pooled_projections=pooled,
        joint_attention_kwargs={"log_zeros": log_zeros},
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class Parts:
    """A pipeline without its transformer; the one text tower stands in both places."""

    vae: Any
    tower: Any
    tokenizer: Any

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] -> what the pipeline makes of them: [B, L, 2 D] and pooled [B, 2 D]."""
        read = self.tower(tokens, output_hidden_states=True)
        return read.hidden_states[-2].repeat(1, 1, 2), read.text_embeds.repeat(1, 2)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [0, 1] -> mean latents of the transformer's scale."""
        with torch.autocast("cpu", torch.bfloat16):
            mean = self.vae.encode(as_input(images)).latent_dist.mean
        return (mean.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor


def load_parts(vae: Path, clip: Path) -> Parts:
    """The autoencoder's folder and that of an open_clip model."""
    model, tokenizer = load_clip(clip)
    autoencoder = load_part(diffusers.AutoencoderKL, "vae", vae).eval()
    return Parts(autoencoder, text_tower(model), tokenizer)


def write_pipeline(transformer: Any, parts: Parts, folder: Path) -> None:
    """Write the shipped pipeline with these weights, in fp16; the folder is whole or as it was."""
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(PIPELINE, new, ignore=shutil.ignore_patterns("*.png", "*.md", "card.json"))
    towers = dict.fromkeys(("text_encoder", "text_encoder_2"), parts.tower)
    for name, part in {"transformer": transformer, "vae": parts.vae, **towers}.items():
        deepcopy(part).half().save_pretrained(new / name)
        config = read_json(new / name / "config.json")
        config.pop("_name_or_path", None)  # a folder of this machine
        write_json(new / name / "config.json", config)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
