"""The small text-to-image models: cheaper training equals the stock pipeline; folders reopen."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backends.zeros import fold_zeros
from src.fitting import initialise

tiny: Any = pytest.importorskip("backends.tiny")
VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 7, "width": 16, "heads": 2, "layers": 2}
WORDS = ["red apple", "a red rocket", "green apple, fruit", "dog face"] * 3


@pytest.fixture
def transformer() -> Any:
    model = tiny.build_transformer(64, 2, 16, (4, 2)).eval()
    initialise(model, 0)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer(WORDS, 540, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random autoencoder and CLIP, as the scripts leave them."""
    root = tmp_path_factory.mktemp("tiny")
    text = {**TEXT, "vocab_size": len(tokenizer)}
    clip, vae = tiny.build_clip(16, VISION, text), tiny.build_vae((8, 8), 4)
    initialise(clip, 1)
    initialise(vae, 2)
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    tiny.save_clip(root / "clip", clip, tokenizer, {"model_cfg": config, "preprocess_cfg": {}})
    vae.register_to_config(shift_factor=0.1, scaling_factor=2.0)
    vae.half().save_pretrained(root / "vae")
    return root


@pytest.mark.parametrize("zeros", [3, 77, 256])
@torch.no_grad()
def test_one_row_of_zeros_counts_as_many(transformer: Any, zeros: int) -> None:
    g = torch.Generator().manual_seed(zeros)
    x, sigma = torch.randn(2, 4, 2, 2, generator=g), torch.tensor([0.3, 0.8])
    tokens = torch.randn(2, 5, 32, generator=g)
    pooled = torch.randn(2, 32, generator=g)
    stock = transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=F.pad(tokens, (0, 0, 0, zeros)),
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    assert fold_zeros(transformer, zeros, 2)
    counts = torch.full((2,), log(zeros))
    told = tiny.velocity(transformer, x, sigma, (tokens, pooled), counts)
    torch.testing.assert_close(told, stock, rtol=1e-4, atol=1e-5)


def test_the_vocabulary_has_all_bytes_and_ends_with_the_end_of_text(tokenizer: Any) -> None:
    start, red, apple, end = tokenizer("Red apple").input_ids
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.convert_ids_to_tokens([red, apple]) == ["red</w>", "apple</w>"]
    assert end not in tokenizer("zebra \u00fc \u4f60").input_ids[1:-1]


def test_a_clip_is_read_back_by_open_clip(folders: Path, tokenizer: Any) -> None:
    model, read = tiny.load_clip(folders / "clip")
    assert not model.training
    assert torch.equal(tiny.tokenise(read, WORDS), tiny.tokenise(tokenizer, WORDS))


def test_the_parts_read_a_prompt_as_the_written_pipeline_does(
    folders: Path, transformer: Any, tmp_path: Path
) -> None:
    parts = tiny.load_parts(folders / "vae", folders / "clip")
    for _ in range(2):  # the second replaces the first
        tiny.write_pipeline(transformer, parts, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    pipe = tiny.diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "whole", text_encoder_3=None, tokenizer_3=None
    )
    embeds, _, pooled, _ = pipe.to(torch.float32).encode_prompt(
        "red apple", None, None, do_classifier_free_guidance=False, max_sequence_length=9
    )
    tokens, together = parts.read(tiny.tokenise(parts.tokenizer, ["red apple"]))
    torch.testing.assert_close(embeds, F.pad(tokens, (0, 0, 0, 9)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pooled, together, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zero", [(), ("proj_out",)])
def test_weights_hang_on_the_seed(transformer: Any, zero: tuple[str, ...]) -> None:
    initialise(transformer, 5, zero)
    told = {name: p.clone() for name, p in transformer.named_parameters()}
    initialise(transformer, 5, zero)
    assert all(torch.equal(told[name], p) for name, p in transformer.named_parameters())
    assert bool(told["proj_out.weight"].any()) == (not zero)
