"""The small text-to-image models as they are trained, against the stock libraries."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

from backends.sd3 import fold_zeros

tiny: Any = pytest.importorskip("exps.build.tiny_models")
sd3: Any = pytest.importorskip("exps.build.fit_tiny_sd3")


@pytest.fixture(scope="module")
def parts() -> Any:
    return tiny.load_parts(tiny.PIPELINE / "vae", tiny.CLIP)


@torch.no_grad()
def test_the_tower_embeds_texts_of_any_length_as_open_clip_does(parts: Any) -> None:
    clip, tokenizer = tiny.load_clip()
    tokens = tiny.tokenise(tokenizer, ["", "dog", "a red apple and a rocket on blue", "x " * 40])
    torch.testing.assert_close(
        parts.tower(tokens).text_embeds, clip.encode_text(tokens), rtol=1e-4, atol=1e-5
    )


def test_a_written_pipeline_is_the_stock_one_with_these_parts(parts: Any, tmp_path: Path) -> None:
    transformer = tiny.load_part(tiny.diffusers.SD3Transformer2DModel, "transformer", None)
    for _ in range(2):  # the second replaces the first
        tiny.write_pipeline(transformer, parts, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    pipe = tiny.diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "whole", text_encoder_3=None, tokenizer_3=None
    ).to(torch.float32)
    embeds, _, pooled, _ = pipe.encode_prompt(
        "red apple", None, None, do_classifier_free_guidance=False, max_sequence_length=9
    )
    tokens, together = parts.read(tiny.tokenise(parts.tokenizer, ["red apple"]))
    torch.testing.assert_close(embeds, F.pad(tokens, (0, 0, 0, 9)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pooled, together, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_one_row_of_zeros_counts_as_many(parts: Any) -> None:
    transformer = tiny.load_part(
        tiny.diffusers.SD3Transformer2DModel, "transformer", tiny.PIPELINE / "transformer"
    )
    x, sigma = torch.randn(2, 16, 8, 8, generator=Generator().manual_seed(0)), torch.rand(2)
    tokens, pooled = parts.read(tiny.tokenise(parts.tokenizer, ["dog", "red apple"]))
    stock = transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=F.pad(tokens, (0, 0, 0, 77)),
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    assert fold_zeros(transformer, 77, 2)
    ours = tiny.velocity(transformer, x, sigma, (tokens, pooled), torch.full((2,), log(77)))
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4)
