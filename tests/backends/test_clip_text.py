"""open_clip's text side and its copy for diffusers read alike."""

from typing import Any

import pytest
import torch

open_clip: Any = pytest.importorskip("open_clip")
text_tower: Any = pytest.importorskip("backends.clip_text").text_tower

VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
END = 29


@pytest.fixture(scope="module")
def clip() -> Any:
    text = open_clip.CLIPTextCfg(context_length=7, vocab_size=END + 1, width=16, heads=4, layers=3)
    model = open_clip.CLIP(12, VISION, text).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.4, generator=generator)
    return model


@torch.no_grad()
def test_the_copy_embeds_texts_of_any_length_the_same(clip: Any) -> None:
    tokens = torch.randint(0, END, (6, 7), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(range(1, 7)):
        tokens[row, length:] = END
    told = text_tower(clip)(tokens).text_embeds
    torch.testing.assert_close(told, clip.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_the_copy_knows_its_end_of_text(clip: Any) -> None:
    assert text_tower(clip).config.eos_token_id == END
