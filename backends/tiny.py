"""The small text-to-image models that are trained here: how they are built, read and written.

The parts are those of any StableDiffusion3Pipeline (Esser et al. 2024, arXiv:2403.03206), so that
the real code runs on them. B images, T image tokens, L text tokens, D channels.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as library
import open_clip
import tokenizers
import torch
import torch.nn.functional as F
import transformers as texts_library
from safetensors.torch import save_file
from torch import Tensor

from backends.clip_text import text_tower
from src.files import write_atomically, write_json, write_text

diffusers: Any = library  # its own annotations are not those of what it returns
transformers: Any = texts_library
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_vae(channels: Sequence[int], latent: int) -> Any:
    """-> an untrained AutoencoderKL: images [B, 3, H, W], latents 1/8 of the size at 4 levels."""
    levels = len(channels)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def load_vae(folder: Path) -> Any:
    """-> an AutoencoderKL in float32 and eval mode."""
    return diffusers.AutoencoderKL.from_pretrained(folder).float().eval()


def build_tokenizer(texts: Sequence[str], size: int, length: int) -> Any:
    """-> CLIP's own tokenizer with a vocabulary of at most `size`, of pairs learnt from the texts.

    In CLIP's order: all bytes, all bytes that end a word, merges, start and end of text.
    """
    plain = transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(SPECIAL)}, merges=[])
    learner = plain.backend_tokenizer
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    single = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(alphabet) - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: size - len(single) - len(SPECIAL)]
    words = dict.fromkeys([*single, *("".join(pair) for pair in merges), *SPECIAL])
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def tokenise(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """-> [N, L], cut and filled to the tokenizer's length."""
    told = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return told.input_ids


def build_clip(embedding: int, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    """-> an untrained open_clip.CLIP with these sections of an open_clip config."""
    return open_clip.CLIP(
        embedding, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
    )


def save_clip(folder: Path, clip: Any, tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Write a folder that open_clip opens as local-dir:FOLDER; weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "open_clip_config.json", config)
    save_tokenizer(folder, tokenizer)
    weights = {name: value.half().contiguous() for name, value in clip.state_dict().items()}
    with write_atomically(folder / "open_clip_model.safetensors") as part:
        save_file(weights, part)


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer's files, those of older readers among them."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")


def load_clip(folder: Path) -> tuple[Any, Any]:
    """-> the open_clip model in float32 and eval mode, and its tokenizer."""
    model = open_clip.create_model(f"local-dir:{folder}")
    return model.float().eval(), transformers.CLIPTokenizer.from_pretrained(folder)


def build_transformer(width: int, layers: int, text: int, latent: tuple[int, int]) -> Any:
    """-> an untrained MMDiT for latents [B, latent[0], latent[1], latent[1]].

    text is the width of each of the two text towers.
    """
    return diffusers.SD3Transformer2DModel(
        sample_size=latent[1],
        patch_size=1,
        in_channels=latent[0],
        out_channels=latent[0],
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * text,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text,
        pos_embed_max_size=2 * latent[1],
        qk_norm="rms_norm",
    )


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
        told = self.tower(tokens, output_hidden_states=True)
        return told.hidden_states[-2].repeat(1, 1, 2), told.text_embeds.repeat(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents of the transformer's scale -> images in [0, 1]."""
        config = self.vae.config
        shown = self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        return (shown / 2 + 0.5).clamp(0, 1)


def load_parts(vae: Path, clip: Path) -> Parts:
    """The autoencoder's folder and that of an open_clip model."""
    model, tokenizer = load_clip(clip)
    return Parts(load_vae(vae), text_tower(model).requires_grad_(False), tokenizer)


def write_pipeline(transformer: Any, parts: Parts, folder: Path) -> None:
    """The pipeline in fp16; the folder is there whole or as it was."""
    made, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    shutil.rmtree(made, ignore_errors=True)
    tower = deepcopy(parts.tower).half()
    diffusers.StableDiffusion3Pipeline(
        transformer=deepcopy(transformer).half(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=deepcopy(parts.vae).half(),
        text_encoder=tower,
        tokenizer=parts.tokenizer,
        text_encoder_2=tower,
        tokenizer_2=parts.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(made)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(made / name, parts.tokenizer)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
