"""The judge of clothes: its shipped weights, its two uses, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewards.base import score
from rewards.fashion import SIZE, WEIGHTS, load_judge
from src.files import read_json


def test_the_shipped_file_is_small_and_its_card_says_how_sure_it_is() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    assert read_json(WEIGHTS.with_name("card.json"))["t10k"]["accuracy"] > 0.91


def test_it_scores_classes_by_number_and_name_and_its_features_have_a_gradient() -> None:
    judge = load_judge()
    g = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 32, 32, generator=g).requires_grad_()
    log_p = judge.log_probabilities(images)
    assert log_p.exp().sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    scores = score(judge, images.detach(), ["7", "sneaker", "T-shirt/top"])
    assert scores.tolist() == pytest.approx(log_p[[0, 1, 2], [7, 7, 0]].tolist(), abs=0.05)
    judge.features(images).sum().backward()
    assert images.grad is not None
    assert bool(images.grad.any())
    assert judge.features(images[:, :1, 2:30, 2:30]).shape == (3, SIZE)


def test_a_prompt_that_is_no_class_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'hat' is no class"):
        load_judge()(torch.rand(1, 3, 32, 32), ["hat"])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        load_judge(tmp_path / "other.safetensors")
