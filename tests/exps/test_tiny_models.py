"""The small text-to-image models as they are trained, against the stock libraries."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

tiny: Any = pytest.importorskip("exps.build.tiny_models")


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
