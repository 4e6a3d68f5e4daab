"""Tiny random pipelines of every family, whose code is the real one's."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
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
    pipe.save_pretrained(folder)
    return folder


# --- other families; where the text encoder is large, `words` stands for it ----------------


def words(texts: Any, length: int, width: int) -> torch.Tensor:
    """Embeddings [B, length, width] that hang on each text alone."""
    rows = [
        torch.randn(
            length, width, generator=torch.Generator().manual_seed(sum(map(ord, text)) + 7)
        )
        for text in ([texts] if isinstance(texts, str) else texts)
    ]
    return torch.stack(rows)


def mask(texts: Any, length: int) -> torch.Tensor:
    """Which of the tokens [B, length] there are: as many as letters."""
    texts = [texts] if isinstance(texts, str) else texts
    return torch.tensor([[i < len(text) for i in range(length)] for text in texts]).long()


def flow_scheduler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}
HEADS = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}


def sdxl(**scheduler: Any) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    config = {**SD_SCHEDULER, "timestep_spacing": "leading", **scheduler}
    config = {n: v for n, v in config.items() if n not in ("clip_sample", "set_alpha_to_one")}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.5),
        text_encoder=seeded(transformers.CLIPTextModel(clip_config(16)), 1, 0.3),
        tokenizer=tokenizer(),
        text_encoder_2=seeded(transformers.CLIPTextModelWithProjection(clip_config(16)), 2, 0.3),
        tokenizer_2=tokenizer(),
        unet=seeded(unet),
        scheduler=diffusers.EulerDiscreteScheduler(**config),
        add_watermarker=False,
    )


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        **HEADS, sample_size=8, cross_attention_dim=32, caption_channels=32,
        use_additional_conditions=False,
    )  # fmt: skip
    encoder, tokens = t5()
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokens,
        text_encoder=encoder,
        vae=vae(4, scaling_factor=0.5),
        transformer=seeded(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(**betas),
    )


def flux2() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        **HEADS, in_channels=16, num_single_layers=1, joint_attention_dim=16,
        timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae2 = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = diffusers.Flux2Pipeline(
        scheduler=flow_scheduler(**DYNAMIC), vae=seeded(vae2, 3, 0.2), text_encoder=None,
        tokenizer=None, transformer=seeded(transformer),
    )  # fmt: skip
    pipe._get_mistral_3_small_prompt_embeds = lambda prompt, **_: words(prompt, 12, 16)
    return pipe


def qwen() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 4, 8)
    )
    vae2 = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        scheduler=flow_scheduler(**DYNAMIC), vae=seeded(vae2, 3, 0.2), text_encoder=None,
        tokenizer=None, transformer=seeded(transformer),
    )  # fmt: skip
    pipe._get_qwen_prompt_embeds = lambda prompt, *_: (words(prompt, 12, 16), mask(prompt, 12))
    return pipe


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        **HEADS, in_channels=16, num_single_layers=1, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    encoder, tokens = t5()
    return diffusers.ChromaPipeline(
        scheduler=flow_scheduler(use_beta_sigmas=True),
        vae=vae(4, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=encoder, tokenizer=tokens, transformer=seeded(transformer),
    )  # fmt: skip


def wan(**scheduler: Any) -> Any:
    transformer = diffusers.WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=16, ffn_dim=32,
        rope_max_seq_len=32,
    )  # fmt: skip
    vae2 = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    _, tokens = t5()
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
    )
    return diffusers.WanPipeline(
        tokenizer=tokens, text_encoder=seeded(encoder, 7, 0.3), vae=seeded(vae2, 3, 0.2),
        scheduler=diffusers.UniPCMultistepScheduler(**config | scheduler),
        transformer=seeded(transformer),
    )  # fmt: skip


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=32
    )
    vae2 = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    encoder, tokens = t5()
    return diffusers.LTXPipeline(
        scheduler=flow_scheduler(**{**DYNAMIC, "shift_terminal": 0.1}), vae=seeded(vae2, 3, 0.2),
        text_encoder=encoder, tokenizer=tokens, transformer=seeded(transformer),
    )  # fmt: skip


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16, sample_size=4,
    )  # fmt: skip
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    dc = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(
        tokenizer=t5()[1], text_encoder=None, vae=seeded(dc, 3, 0.2),
        transformer=seeded(transformer), scheduler=diffusers.DPMSolverMultistepScheduler(**config),
    )  # fmt: skip
    pipe._get_gemma_prompt_embeds = lambda prompt, **_: (words(prompt, 300, 16), mask(prompt, 300))
    return pipe


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=2, multiple_of=8, axes_dim_rope=(8, 4, 4),
        axes_lens=(32, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(
        transformer=seeded(transformer), scheduler=flow_scheduler(shift=6.0),
        vae=vae(4, scaling_factor=0.4, shift_factor=0.1), text_encoder=None, tokenizer=None,
    )  # fmt: skip
    pipe._get_gemma_prompt_embeds = lambda prompt, **_: (
        words(prompt, 12, 16), mask(prompt, 12).bool()
    )  # fmt: skip
    return pipe


def hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    vae2 = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=seeded(transformer),
        vae=seeded(vae2, 3, 0.2), scheduler=flow_scheduler(shift=7.0),
        text_encoder_2=seeded(transformers.CLIPTextModel(clip_config(16)), 1, 0.3),
        tokenizer_2=tokenizer(),
    )  # fmt: skip
    pipe._get_llama_prompt_embeds = lambda prompt, _template, count, **_k: (
        words(prompt, 12, 16).repeat_interleave(count, 0),
        mask(prompt, 12).repeat_interleave(count, 0),
    )
    return pipe


def cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        **HEADS, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=16,
        condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    config = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True}
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=vae(4, scaling_factor=0.4),
        transformer=seeded(transformer),
        scheduler=flow_scheduler(**config, time_shift_type="linear"),
    )  # fmt: skip
    pipe._get_glm_embeds = lambda prompt, *_: words(prompt, 16, 16)
    return pipe


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    )  # fmt: skip
    pipe = diffusers.ZImagePipeline(
        scheduler=flow_scheduler(shift=3.0), vae=vae(4, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=None, tokenizer=None, transformer=seeded(transformer),
    )  # fmt: skip
    pipe._encode_prompt = lambda prompt, **_: list(words(prompt, 12, 16))
    return pipe


def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    encoder, tokens = t5()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokens, text_encoder=encoder, vae=vae(4, scaling_factor=0.4),
        transformer=seeded(transformer), scheduler=flow_scheduler(shift=1.73),
    )  # fmt: skip


def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        **HEADS, pooled_projection_dim=16, in_channels=12, text_embed_dim=32, time_embed_dim=8,
        max_sequence_length=256,
    )  # fmt: skip
    vae2 = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False,) * 5,
    )  # fmt: skip
    encoder, tokens = t5()
    return diffusers.MochiPipeline(
        scheduler=flow_scheduler(invert_sigmas=True), vae=seeded(vae2, 3, 0.2),
        text_encoder=encoder, tokenizer=tokens, transformer=seeded(transformer),
    )  # fmt: skip


def kandinsky5() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16,
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(8, 4, 4),
    )  # fmt: skip
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=seeded(transformer), vae=vae(4, scaling_factor=0.4), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, scheduler=flow_scheduler(shift=3.0),
    )  # fmt: skip
    pipe.resolutions = [(16, 16)]
    pipe.encode_prompt = lambda prompt, num_images_per_prompt=1, **_: (
        words(prompt, 12, 16).repeat_interleave(num_images_per_prompt, 0),
        words(prompt, 1, 16)[:, 0].repeat_interleave(num_images_per_prompt, 0),
        torch.arange(len(prompt) * num_images_per_prompt + 1, dtype=torch.int32) * 12,
    )
    return pipe


def call_of(pipe: Any) -> Any:
    """The parameters of a pipeline's call by name."""
    return inspect.signature(pipe.__call__).parameters
