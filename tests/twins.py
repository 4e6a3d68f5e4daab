"""Tiny random pipelines of every family, of the real code, by the configs in data/twins.json."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")
LTX2: Any = diffusers.pipelines.ltx2  # its connectors are not among the rest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "src" / "configs" / "stable-diffusion-v1-5"
CONFIGS = json.loads((ROOT / "tests" / "data" / "twins.json").read_text())
SD_SCHEDULER = {n: v for n, v in CONFIGS["sd"]["scheduler"].items() if n != "_class_name"}
MARKS = 512


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


def clip(kind: str = "CLIPTextModel", seed: int = 1, std: float = 0.3) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=MARKS + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=16, bos_token_id=MARKS,
        eos_token_id=MARKS + 1,
    )  # fmt: skip
    return seeded(getattr(transformers, kind)(config), seed, std)


def letters() -> Any:
    """T5's tokenizer, with the letters alone."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    vocab += [(letter, -2.0) for letter in "etaoinshrdlucmfwypvbgkqjxz"]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def t5(kind: str = "T5") -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(letters()), **sizes)
    return seeded(getattr(transformers, f"{kind}EncoderModel")(config), 7, 0.3)


def mclip() -> Any:
    """Kandinsky 2.1's text encoder."""
    config = diffusers.pipelines.kandinsky.text_encoder.MCLIPConfig(
        transformerDimSize=16, imageDimSize=16, vocab_size=MARKS + 2, hidden_size=16,
        intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=100,
    )  # fmt: skip
    return seeded(diffusers.pipelines.kandinsky.MultilingualCLIP(config), 1, 0.3)


def normalizer() -> Any:
    """What Stable unCLIP shifts and scales pictures' embeddings by: here, nothing."""
    module = diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer
    return module.StableUnCLIPImageNormalizer(embedding_dim=16)


class Chat:
    """What stands for a processor of chats, which pipelines ask for lengths and marks."""

    tokenizer = type("Marks", (), {"encode": staticmethod(lambda _text: [0])})

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


class Guard:
    """What stands for Cosmos' guardrail."""

    def to(self, _device: Any) -> None: ...

    def check_text_safety(self, _text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


TEXTS = {
    "chat": Chat,
    "guard": Guard,
    "bytes": tokenizer,
    "letters": letters,
    "clip": clip,
    "clip-projected": partial(clip, "CLIPTextModelWithProjection"),
    "t5": t5,
    "umt5": partial(t5, "UMT5"),
    "mclip": mclip,
    "normalizer": normalizer,
}
WEIGHTS: dict[str, tuple[int, float]] = {"vae": (3, 0.2), "vqvae": (4, 0.2), "movq": (4, 0.2)}
WEIGHTS |= dict.fromkeys(("transformer_2", "unconditional_transformer"), (5, 0.1))


def part(name: str, config: Any) -> Any:
    """A pipeline's part, by its name there."""
    if config is None:
        return None
    if isinstance(config, str):
        second = {"seed": 2} if (name, config) == ("text_encoder_2", "clip-projected") else {}
        return TEXTS[config](**second)
    config = dict(config)
    name_of_class = config.pop("_class_name")
    result = getattr(diffusers, name_of_class, None) or getattr(LTX2, name_of_class)
    if name == "scheduler":  # whose config may have more than its class knows (Cosmos)
        return result.from_config(config)
    result = result(**config)
    network = isinstance(result, torch.nn.Module)
    return seeded(result, *WEIGHTS.get(name, (0, 0.1))) if network else result


def twin(family: str, **changes: Any) -> Any:
    """The pipeline of a family; `changes` are other parts, or other entries of their configs."""
    parts = {n: v for n, v in CONFIGS[family].items() if n not in ("pipeline", "options")}
    for name, change in changes.items():
        parts[name] = {**parts[name], **change} if isinstance(change, dict) else change
    built = {name: part(name, config) for name, config in parts.items()}
    kind = getattr(diffusers, CONFIGS[family]["pipeline"])
    pipe = kind(**built, **CONFIGS[family].get("options", {}))
    pipe.set_progress_bar_config(disable=True)
    if family in STUBS:
        method, stub = STUBS[family]
        setattr(pipe, method, stub)
    others = {
        "kandinsky5": ("resolutions", [(16, 16)]),
        "hidream": ("default_sample_size", 8),
        "glm": ("generate_prior_tokens", tokens),
    }
    if family in others:
        setattr(pipe, *others[family])
    return pipe


def vae(**options: Any) -> Any:
    return part("vae", CONFIGS["sd3"]["vae"] | options)


def saved(folder: Path, pipe: Any) -> Path:
    pipe.save_pretrained(folder)
    return folder


# --- where the text encoder is large, `words` stands for it ---------------------------------


def words(texts: Any, length: int = 12, width: int = 16, count: int = 1) -> torch.Tensor:
    """Embeddings [B, length, width] that hang on each text alone."""
    rows = [
        torch.randn(
            length, width, generator=torch.Generator().manual_seed(sum(map(ord, text)) + 7)
        )
        for text in ([texts] if isinstance(texts, str) else texts)
    ]
    return torch.stack(rows).repeat_interleave(count, 0)


def mask(texts: Any, length: int = 12, count: int = 1) -> torch.Tensor:
    """Which of the tokens [B, length] there are: one more than letters."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.tensor([[i <= len(text) for i in range(length)] for text in texts]).long()
    return rows.repeat_interleave(count, 0)


def kandinsky5_prompts(prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> Any:
    n = num_images_per_prompt
    places = torch.arange(len(prompt) * n + 1, dtype=torch.int32) * 12
    return words(prompt, count=n), words(prompt, 1, count=n)[:, 0], places


def pooled(texts: Any) -> torch.Tensor:
    return words(texts, 1)[:, 0]


def layered(texts: Any) -> torch.Tensor:
    return torch.stack([words(texts)] * 2)


def encoded(*kinds: Callable[[Any], torch.Tensor], apart: bool = False) -> Callable[..., Any]:
    """An encode_prompt that gives each kind for the prompts, and for the negative ones."""

    def stub(
        prompt: Any = None,
        _device: Any = None,
        num_images_per_prompt: int = 1,
        negative_prompt: Any = None,
        num_videos_per_prompt: int = 1,
        **_: Any,
    ) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        negatives = negative_prompt or [""] * len(texts)
        negatives = [negatives] * len(texts) if isinstance(negatives, str) else negatives

        def of(kind: Any, texts: Any) -> torch.Tensor:
            copies = num_images_per_prompt * num_videos_per_prompt
            return kind([text for text in texts for _ in range(copies)])

        pairs = [(of(kind, texts), of(kind, negatives)) for kind in kinds]
        rows = list(zip(*pairs, strict=True)) if apart else pairs
        return tuple(value for row in rows for value in row)

    return stub


def alone(*kinds: Callable[[Any], Any]) -> Callable[..., Any]:
    """An encode_prompt that gives each kind for the prompts, called once more for the others."""

    def stub(
        prompt: Any = None,
        _device: Any = None,
        num_images_per_prompt: int = 1,
        num_videos_per_prompt: int = 1,
        batch_size: int = 1,
        **_: Any,
    ) -> Any:
        texts = prompt if isinstance(prompt, list) else [prompt or ""] * batch_size
        copies = num_images_per_prompt * num_videos_per_prompt
        return tuple(kind([text for text in texts for _ in range(copies)]) for kind in kinds)

    return stub


def layers(texts: Any) -> tuple[torch.Tensor, ...]:
    return (words(texts), words(texts))


def bools(texts: Any) -> torch.Tensor:
    return mask(texts).bool()


def tokens(prompt: Any, height: int, width: int, **_: Any) -> Any:
    """What GLM-Image's language model draws: a token for each place [B, S]."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    places = torch.arange(height // 4 * (width // 4))
    return torch.stack([places % len(text) for text in texts]), None, None


def packed(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
    """What Ideogram 4 makes of prompts: texts, then places for pictures [B, L + S, *]."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    lengths = [min(len(text), max_sequence_length) for text in texts]
    places = diffusers.Ideogram4Pipeline._prepare_ids(
        lengths, grid_h, grid_w, max_sequence_length, device
    )
    empty = torch.zeros(len(texts), grid_h * grid_w, 16)
    return torch.cat([words(texts, max_sequence_length), empty], 1), *places


STUBS: dict[str, tuple[str, Callable[..., Any]]] = {
    "flux2": ("_get_mistral_3_small_prompt_embeds", lambda prompt, **_: words(prompt)),
    "qwen": ("_get_qwen_prompt_embeds", lambda prompt, *_: (words(prompt), mask(prompt))),
    "sana": (
        "_get_gemma_prompt_embeds",
        lambda prompt, **_: (words(prompt, 300), mask(prompt, 300)),
    ),
    "lumina2": (
        "_get_gemma_prompt_embeds",
        lambda prompt, **_: (words(prompt), mask(prompt).bool()),
    ),
    "hunyuan_video": (
        "_get_llama_prompt_embeds",
        lambda p, _template, count, **_: (words(p, count=count), mask(p, count=count)),
    ),
    "cogview4": ("_get_glm_embeds", lambda prompt, *_: words(prompt, 16)),
    "z_image": ("_encode_prompt", lambda prompt, **_: list(words(prompt))),
    "kandinsky5": ("encode_prompt", kandinsky5_prompts),
    "flux2_klein": ("_get_qwen3_prompt_embeds", lambda prompt, **_: words(prompt)),
    "sana_video": (
        "_get_gemma_prompt_embeds",
        lambda prompt, *_, **__: (words(prompt, 300), mask(prompt, 300)),
    ),
    "ovis": (
        "_get_ovis_prompt_embeds",
        lambda prompt, num_images_per_prompt=1, **_: words(prompt, count=num_images_per_prompt),
    ),
    "kolors": ("encode_prompt", encoded(words, pooled)),
    "prx": ("encode_prompt", encoded(words, bools, apart=True)),
    "hunyuan_dit": ("encode_prompt", encoded(words, mask)),
    "hidream": ("encode_prompt", encoded(words, layered, pooled)),
    "hunyuan_video15": ("encode_prompt", alone(words, mask, words, mask)),
    "hunyuan_image": ("encode_prompt", alone(words, mask, words, mask)),
    "easy_animate": ("encode_prompt", encoded(words, mask)),
    "lumina": ("encode_prompt", encoded(words, mask, apart=True)),
    "longcat": ("encode_prompt", alone(words, lambda _texts: torch.zeros(12, 3))),
    "krea2": (
        "encode_prompt",
        alone(lambda texts: words(texts)[:, :, None].repeat(1, 1, 2, 1), bools),
    ),
    "qwen21": (
        "encode_prompt",
        alone(words, lambda texts: bools(texts) | True, lambda texts: bools(texts) & False),
    ),
    "nucleus": ("encode_prompt", alone(words, mask)),
    "glm": ("encode_prompt", encoded(words)),
    "prx_pixel": ("encode_prompt", encoded(words, bools, apart=True)),
    "cosmos2": ("encode_prompt", encoded(words)),
    "cosmos25": ("encode_prompt", encoded(words)),
    "ltx2": (
        "_get_gemma_prompt_embeds",
        lambda prompt, num_videos_per_prompt=1, **_: (
            words(prompt, count=num_videos_per_prompt),
            mask(prompt, count=num_videos_per_prompt),
        ),
    ),
    "motif": ("encode_prompt", encoded(words, mask)),
    "bria_fibo": ("get_prompt_embeds", alone(partial(words, width=32), layers, mask)),
    "ideogram": ("encode_prompt", packed),
    "dreamlite": (
        "encode_prompt",
        lambda prompts, **_: (words(prompts), mask(prompts)),
    ),
    "ernie": ("encode_prompt", lambda prompt, _device, count=1: list(words(prompt, count=count))),
}


sd, uncond, sd3, flux, sdxl, wan = (
    partial(twin, name) for name in ("sd", "uncond", "sd3", "flux", "sdxl", "wan")
)
MAKERS = {"sd": sd, "uncond": uncond, "sd3": sd3, "flux": flux}


def call_of(pipe: Any) -> Any:
    """The parameters of a pipeline's call by name."""
    return inspect.signature(pipe.__call__).parameters
