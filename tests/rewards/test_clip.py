"""`clip`, `aesthetic` and `hps` on twins in open_clip's layouts, and at full size."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from rewards import aesthetic, clip, hps
from rewards.base import score
from rewards.open_clip_towers import build, known_config, load_state
from rewards.pixels import MEAN, STD
from rewards.registry import Setup, Shelf, load_rewards
from rewards.towers import Cosine, TextCache
from tests.rewards.test_pixels import by_pillow
from tests.rewards.twins import (
    OPEN_CLIP,
    PROMPTS,
    head_state,
    images,
    letters_tokenizer,
    open_clip_state,
    write_open_clip_folder,
)


def shelf(**paths: Path) -> Shelf:
    return Shelf(Setup(paths=paths))


@torch.no_grad()
def by_open_clip(state: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of length 1 from open_clip's own calls."""
    network = open_clip.CLIP(**OPEN_CLIP).eval()
    network.load_state_dict(state)
    tokens = open_clip.get_tokenizer("ViT-L-14")(PROMPTS)
    seen = network.encode_image(pixels, normalize=True)
    return seen, network.encode_text(tokens, normalize=True)


def test_the_score_of_a_folder_is_the_cosine_of_open_clip_on_pillows_pixels(
    tmp_path: Path,
) -> None:
    folder = write_open_clip_folder(tmp_path / "clip")
    middle, spread = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    plain = by_pillow(images(), 32) * spread + middle
    seen, read = by_open_clip(
        load_file(folder / "open_clip_model.safetensors"), (plain - 0.5) / 0.25
    )
    ours = score(clip.load(shelf(clip=folder)), images(), PROMPTS)
    torch.testing.assert_close(ours, (seen * read).sum(-1), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_in_an_open_clip_folder_is_used(tmp_path: Path) -> None:
    own = letters_tokenizer()
    own.save_pretrained(tmp_path)
    text = {**OPEN_CLIP["text_cfg"], "vocab_size": len(own), "context_length": 20}
    config = {**OPEN_CLIP, "text_cfg": {**text, "hf_tokenizer_name": "."}}
    write_open_clip_folder(tmp_path, config)
    network = open_clip.CLIP(**config).eval()
    network.load_state_dict(open_clip_state(config))
    tokens = own(PROMPTS, padding="max_length", max_length=20, return_tensors="pt").input_ids
    expected = network.encode_text(tokens, normalize=True)
    ours = clip.load(shelf(clip=tmp_path)).towers.texts(PROMPTS)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


def test_hps_reads_the_state_dict_of_the_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "HPS_v2.1_compressed.pt"
    state = open_clip_state()
    torch.save({"epoch": 1, "state_dict": {k: v.half() for k, v in state.items()}}, path)
    seen, read = by_open_clip(
        {k: v.half().float() for k, v in state.items()}, by_pillow(images(), 32)
    )
    ours = score(hps.load(shelf(hps=path), OPEN_CLIP), images(), PROMPTS)
    torch.testing.assert_close(ours, (seen * read).sum(-1), rtol=1e-4, atol=1e-5)


def test_the_aesthetic_score_is_the_head_on_clips_embedding(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "clip")
    path, head = tmp_path / "head.pth", head_state(16)
    torch.save(head, path)
    shared = shelf(clip=folder, aesthetic=path)
    x = clip.load(shared).towers.images(images())
    for place in (0, 2, 4, 6, 7):
        x = F.linear(x, head[f"layers.{place}.weight"], head[f"layers.{place}.bias"])
    ours = score(aesthetic.load(shared), images(), PROMPTS)
    torch.testing.assert_close(ours, x[:, 0], rtol=1e-4, atol=1e-5)


def test_clip_and_aesthetic_share_one_model(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save(head_state(16), path)
    paths = {"clip": write_open_clip_folder(tmp_path / "clip"), "aesthetic": path}
    rewards: dict[str, Any] = dict(load_rewards(["clip", "aesthetic"], Setup(paths=paths)))
    assert rewards["clip"].towers is rewards["aesthetic"].towers


@pytest.fixture(scope="module")
def tiny() -> Cosine:
    state = open_clip_state()
    return Cosine(load_state(state, OPEN_CLIP, "tiny", torch.device("cpu"), False), 10.0)


def test_a_batch_scores_as_its_images_one_by_one(tiny: Cosine) -> None:
    alone = [score(tiny, images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    together = score(tiny, images(), PROMPTS)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_half_precision_stays_near(tiny: Cosine) -> None:
    state = open_clip_state()
    amp = Cosine(load_state(state, OPEN_CLIP, "tiny", torch.device("cpu"), True), 10.0)
    whole = score(tiny, images(), PROMPTS)
    near = score(amp, images(), PROMPTS)
    assert near.dtype == torch.float32
    assert 0 < (near - whole).abs().max() < 0.5


def test_each_distinct_prompt_is_encoded_once() -> None:
    asked: list[list[str]] = []

    def encode(prompts: Sequence[str]) -> Tensor:
        asked.append(list(prompts))
        return torch.tensor([[float(len(p))] for p in prompts])

    cache = TextCache(encode, size=2)
    assert cache(["a", "bb", "a"]).tolist() == [[1], [2], [1]]
    assert cache(["bb", "a"]).tolist() == [[2], [1]]
    assert asked == [["a", "bb"]]
    assert cache(["ccc", "a", "dddd"]).tolist() == [[3], [1], [4]]
    assert len(cache.known) == 2


@pytest.mark.parametrize(
    ("model", "parameters"), [("ViT-H-14", 986_109_441), ("ViT-L-14-quickgelu", 427_616_513)]
)
def test_the_published_sizes_load_strictly(model: str, parameters: int) -> None:
    meta = torch.device("meta")
    with meta:
        state = open_clip.CLIP(**known_config(model)).state_dict()
    assert sum(v.numel() for v in state.values()) == parameters
    towers = load_state(state, known_config(model), "full", meta, False)
    assert towers.look.size == 224
    one = next(iter(state))
    with pytest.raises(ValueError, match=rf"^full: these are other weights: 1 missing \({one}\)$"):
        load_state(
            {k: v for k, v in state.items() if k != one}, known_config(model), "full", meta, False
        )


def test_the_names_of_vit_h_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        names = build(known_config("ViT-H-14")).state_dict()
    shape = {name: list(v.shape) for name, v in names.items()}
    assert shape["visual.conv1.weight"] == [1280, 3, 14, 14]
    assert shape["visual.positional_embedding"] == [257, 1280]
    assert shape["visual.proj"] == [1280, 1024]
    assert shape["visual.transformer.resblocks.31.mlp.c_fc.weight"] == [5120, 1280]
    assert shape["transformer.resblocks.23.attn.in_proj_weight"] == [3072, 1024]
    assert shape["text_projection"] == [1024, 1024]
    assert shape["token_embedding.weight"] == [49408, 1024]


def test_other_weights_are_refused_in_a_line(tmp_path: Path) -> None:
    state = open_clip_state()
    state["visual.proj"] = state["visual.proj"][:, :8].clone()
    state["more"] = torch.zeros(1)
    path = tmp_path / "hps.pt"
    torch.save(state, path)
    with pytest.raises(
        ValueError,
        match=r"hps\.pt: these are other weights: 1 not known \(more\), "
        r"1 of another shape \(visual\.proj \[24, 8\], not \[24, 16\]\)$",
    ):
        hps.load(shelf(hps=path), OPEN_CLIP)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    with pytest.raises(ValueError, match=r"neither open_clip_model\.safetensors nor"):
        clip.load_towers(tmp_path, torch.device("cpu"), False)


def test_a_library_that_is_not_installed_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(open_clip_state(), tmp_path / "hps.pt")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="hps needs the package open_clip: pip install"):
        load_rewards(["hps"], Setup(paths={"hps": tmp_path / "hps.pt"}))


def test_the_weights_of_all_rewards_are_checked_before_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^missing weights: clip: .*; hps: .*EPD_HPS") as caught:
        load_rewards(["multi:clip=1,hps=1,aesthetic=0"])
    assert "aesthetic" not in str(caught.value)
    assert "\n" not in str(caught.value)
