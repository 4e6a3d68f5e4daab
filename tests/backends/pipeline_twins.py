"""Tiny random pipelines of every family, saved as folders and read back by the real code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "src" / "configs" / "stable-diffusion-v1-5"
MARKS = 512
SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def seeded(module: Any, seed: int = 0, std: float = 0.1) -> Any:
    """The same module with weights that hang on the seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, std, generator=generator)
    return module.eval()


def tokenizer() -> Any:
    """CLIP's, with the bytes alone: their letters, the same at the end of a word, two marks."""
    whole = json.loads((CONFIG / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    vocab = {token: i for token, i in whole.items() if i < MARKS}
    vocab |= {"<|startoftext|>": MARKS, "<|endoftext|>": MARKS + 1}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_config(width: int) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=MARKS + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=MARKS,
        eos_token_id=MARKS + 1,
    )


def t5() -> tuple[Any, Any]:
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    vocab += [(letter, -2.0) for letter in letters]
    words = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(vocab), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return seeded(transformers.T5EncoderModel(config), 7, 0.3), words


def vae(channels: int, sides: int = 2, **options: Any) -> Any:
    return seeded(
        diffusers.AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(8,) * sides,
            down_block_types=("DownEncoderBlock2D",) * sides,
            up_block_types=("UpDecoderBlock2D",) * sides,
            layers_per_block=1,
            norm_num_groups=4,
            **options,
        ),
        3,
        0.2,
    )


def sd(prediction: str = "epsilon") -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(4, scaling_factor=0.5),
        text_encoder=seeded(transformers.CLIPTextModel(clip_config(16)), 1, 0.3),
        tokenizer=tokenizer(),
        unet=seeded(unet),
        scheduler=diffusers.DDIMScheduler(**SD_SCHEDULER, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def uncond() -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    vq = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )
    return diffusers.LDMPipeline(vqvae=seeded(vq, 4, 0.2), unet=seeded(unet), scheduler=scheduler)


def sd3(with_t5: bool = False, shift: float = 3.0, sample_size: int = 8) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    encoder, words = t5() if with_t5 else (None, None)
    return diffusers.StableDiffusion3Pipeline(
        transformer=seeded(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=seeded(transformers.CLIPTextModelWithProjection(clip_config(16)), 1, 0.3),
        tokenizer=tokenizer(),
        text_encoder_2=seeded(transformers.CLIPTextModelWithProjection(clip_config(16)), 2, 0.3),
        tokenizer_2=tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=words,
    )


def flux(guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    encoder, words = t5()
    return diffusers.FluxPipeline(
        transformer=seeded(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=vae(4, scaling_factor=0.36, shift_factor=0.11),
        text_encoder=seeded(transformers.CLIPTextModel(clip_config(16)), 1, 0.3),
        tokenizer=tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=words,
    )


MAKERS = {"sd": sd, "uncond": uncond, "sd3": sd3, "flux": flux}


def saved(folder: Path, pipe: Any) -> Path:
    """The folder of a pipeline."""
    pipe.save_pretrained(folder)
    return folder
