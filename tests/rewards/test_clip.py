"""`clip`, `hps`, `pickscore` and `aesthetic` on twins in the published layouts."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rewards import clip
from rewards.base import score
from rewards.clip import TextCache
from rewards.registry import Setup, load_rewards
from tests.rewards.networks import (
    OPEN_CLIP,
    PROMPTS,
    by_pillow,
    images,
    letters_tokenizer,
    open_clip_state,
    pictures,
    transformers,
    write_clip_folder,
    write_open_clip_folder,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def at(**paths: Path) -> Setup:
    return Setup(paths=paths)


@torch.no_grad()
def by_open_clip(
    state: dict[str, Tensor], pixels: Tensor, config: dict[str, Any] = OPEN_CLIP
) -> Tensor:
    """The cosines of open_clip's own calls."""
    network = open_clip.CLIP(**config).eval()
    network.load_state_dict(state)
    tokens = open_clip.get_tokenizer("ViT-L-14")(PROMPTS)
    seen = network.encode_image(pixels, normalize=True)
    return (seen * network.encode_text(tokens, normalize=True)).sum(-1)


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- open_clip --------------------------------------------------------------------------------


def test_the_score_of_a_folder_is_the_cosine_of_open_clip_on_pillows_pixels(
    tmp_path: Path,
) -> None:
    folder = write_open_clip_folder(tmp_path / "clip")
    pixels = by_pillow(images(), 32, [0.5] * 3, [0.25] * 3)
    expected = by_open_clip(load_file(folder / "open_clip_model.safetensors"), pixels)
    near(score(clip.load_clip(at(clip=folder)), images(), PROMPTS), expected)


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
    near(clip.load_clip(at(clip=tmp_path)).towers.texts(PROMPTS), expected.detach())


def test_openais_own_file_is_read_as_tensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**OPEN_CLIP, "quick_gelu": True}
    network, state = open_clip.CLIP(**config).eval(), open_clip_state(config)
    network.load_state_dict(state)
    network.register_buffer("input_resolution", torch.tensor(32))  # as that file has
    given = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 77).long()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(network, given, check_trace=False)
        torch.jit.save(traced, tmp_path / "ViT-L-14.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(clip, "config_named", lambda _: config)
    ours = score(clip.load_clip(at(clip=tmp_path)), images(), PROMPTS)
    near(ours, by_open_clip(state, by_pillow(images(), 32), config))


# --- transformers -----------------------------------------------------------------------------


def test_a_tokenizer_and_a_preprocessor_in_the_folder_are_used(tmp_path: Path) -> None:
    own, config = letters_tokenizer(), {"size": 32, "crop_size": 32}
    own.save_pretrained(tmp_path)
    model = write_clip_folder(tmp_path, len(own))
    tokens = own(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    for stated in ({}, {"size": 40, "image_mean": [0.9] * 3, "resample": 2}):
        if stated:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, **stated}))
        processor = transformers.CLIPImageProcessorPil(**{**config, **stated})
        pixels = processor(pictures(images()), return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = model(input_ids=tokens, pixel_values=pixels).logits_per_image.diagonal()
        ours = clip.load_pickscore(at(pickscore=tmp_path))
        near(score(ours, images(), PROMPTS), expected)


# --- all of them ------------------------------------------------------------------------------


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
    assert len(cache.rows) == 2


def test_wrong_folders_and_files_are_refused_in_a_line(tmp_path: Path) -> None:
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words) as error:
            clip.load_towers(folder, CPU, False, OPEN_CLIP)
        assert "\n" not in str(error.value)

    state = open_clip_state()
    state["visual.proj"] = state["visual.proj"][:, :8].clone()
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "a.pt")
    refused(
        tmp_path / "a.pt",
        r"a\.pt: these are other weights: Unexpected key.* \"more\".*mismatch for visual\.proj",
    )
    write_clip_folder(tmp_path, 600)
    refused(tmp_path, r"600 tokens, fewer than CLIP's.*tokenizer\.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(tmp_path, r"config\.json: its model_type is not clip")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    refused(tmp_path, r"neither open_clip_model\.safetensors nor")
    (tmp_path / "open_clip_config.json").write_text("{}")
    refused(tmp_path, "it has no object 'model_cfg'")


def test_half_precision_is_off_on_a_cpu_and_a_missing_library_is_said_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_open_clip_folder(tmp_path / "clip")
    with caplog.at_level(logging.WARNING):
        rewards: Any = load_rewards(["clip"], Setup(amp=True, paths={"clip": folder}))
    assert not rewards["clip"].towers.amp
    assert caplog.messages == ["rewards: half precision is off on a CPU: slower there"]
    torch.save(open_clip_state(), tmp_path / "hps.pt")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="hps needs the package open_clip: pip install"):
        load_rewards(["hps"], Setup(paths={"hps": tmp_path / "hps.pt"}))
