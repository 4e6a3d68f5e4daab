"""`pickscore` on twins in transformers' layout, and at full size."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers as library
from PIL import Image
from torch import Tensor

from rewards import pickscore
from rewards.base import score
from rewards.mps import CLIP_H
from rewards.registry import Setup, Shelf
from rewards.towers import Cosine
from rewards.transformers_towers import load_state, padded_tokenizer
from src.images import to_bytes
from tests.rewards.twins import PROMPTS, images, letters_tokenizer, shaken

transformers: Any = library
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 12,
}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}


def twin(folder: Path, vocabulary: int = 49408) -> Any:
    """A random CLIPModel, also written to the folder."""
    text = {**TEXT, "vocab_size": vocabulary, "bos_token_id": vocabulary - 2}
    text["eos_token_id"] = vocabulary - 1
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(shaken(model))
    model.save_pretrained(folder)
    return model


def load(folder: Path, *, amp: bool = False) -> Cosine:
    return pickscore.load(Shelf(Setup(amp=amp, paths={"pickscore": folder})))


def by_processor(batch: Tensor) -> Tensor:
    """What transformers' image processor makes of images for models of 32 pixels."""
    levels = [Image.fromarray(to_bytes(i).permute(1, 2, 0).contiguous().numpy()) for i in batch]
    size, cut = {"shortest_edge": 32}, {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessorPil(size=size, crop_size=cut)
    return processor(levels, return_tensors="pt").pixel_values


@torch.no_grad()
def by_transformers(model: Any, tokens: Tensor) -> Tensor:
    pixels = by_processor(images())
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image.diagonal()


def test_it_is_the_logit_of_transformers_on_its_own_pixels(tmp_path: Path) -> None:
    model = twin(tmp_path)
    expected = by_transformers(model, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    ours = score(load(tmp_path), images(), PROMPTS)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_scores_as_its_images_one_by_one(tmp_path: Path) -> None:
    twin(tmp_path)
    reward = load(tmp_path)
    alone = [score(reward, images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    together = score(reward, images(), PROMPTS)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_in_the_folder_is_used(tmp_path: Path) -> None:
    own = letters_tokenizer()
    own.save_pretrained(tmp_path)
    model = twin(tmp_path, len(own))
    tokens = own(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    ours = score(load(tmp_path), images(), PROMPTS)
    torch.testing.assert_close(ours, by_transformers(model, tokens), rtol=1e-4, atol=1e-4)


def test_a_small_vocabulary_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    twin(tmp_path, 600)
    with pytest.raises(ValueError, match=r"600 tokens, fewer than CLIP's.*tokenizer\.json"):
        load(tmp_path)


def test_long_prompts_are_cut_and_short_ones_filled_with_the_end_of_text() -> None:
    tokens = padded_tokenizer(77, 49408, "")(["word " * 100, "a"])
    assert tokens.shape == (2, 77)
    assert tokens[0, [0, -1]].tolist() == [49406, 49407]
    assert tokens[1].tolist() == [49406, 320] + [49407] * 75


def test_the_published_size_loads_strictly() -> None:
    meta, config = torch.device("meta"), transformers.CLIPConfig(**CLIP_H)
    with meta:
        state = transformers.CLIPModel(config).state_dict()
    assert sum(v.numel() for v in state.values()) == 986_109_441
    shape = {name: list(v.shape) for name, v in state.items()}
    assert shape["vision_model.embeddings.patch_embedding.weight"] == [1280, 3, 14, 14]
    assert shape["vision_model.encoder.layers.31.mlp.fc1.weight"] == [5120, 1280]
    assert shape["text_model.encoder.layers.23.self_attn.q_proj.weight"] == [1024, 1024]
    assert shape["text_projection.weight"] == [1024, 1024]
    assert shape["visual_projection.weight"] == [1024, 1280]
    old = {**state, "text_model.embeddings.position_ids": torch.zeros(1, 77, device=meta)}
    load_state(old, config, "full", meta)
    with pytest.raises(ValueError, match=r"full: these are other weights: 1 not known \(more\)"):
        load_state({**state, "more": torch.zeros(1)}, config, "full", meta)


def test_a_folder_of_something_else_is_refused_in_a_line(tmp_path: Path) -> None:
    twin(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json: its model_type is not clip"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused_in_a_line(tmp_path: Path) -> None:
    twin(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pickscore: .*: the folder has no weights"):
        load(tmp_path)


def test_a_truncated_file_is_refused_in_a_line(tmp_path: Path) -> None:
    twin(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: it is cut short") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
