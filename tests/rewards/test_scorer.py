"""The loop over images: any batch, sums with their parts, nothing twice."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rewards.base import Range, Reward, WeightedSum
from rewards.scorer import names_of, score_all

IMAGES = torch.randint(256, (7, 3, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
PROMPTS = [f"prompt {i}" for i in range(7)]


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3)) + 0 * len(prompts)


def last_digit(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(p[-1]) for p in prompts]).to(images.device)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_every_image_is_scored_under_its_prompt_in_any_batch(batch: int) -> None:
    rewards: dict[str, Reward] = {"bright": bright, "digit": last_digit}
    found = score_all(rewards, IMAGES, PROMPTS, batch=batch)
    assert torch.allclose(found["bright"], IMAGES.mean((1, 2, 3)))
    assert found["digit"].tolist() == list(range(7))


def test_a_sum_comes_with_its_parts_and_what_is_shared_is_computed_once() -> None:
    calls: list[int] = []

    def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        return bright(images, prompts)

    parts: dict[str, Reward] = {"bright": counted, "digit": last_digit}
    weighted = WeightedSum(parts, {"bright": 1.0, "digit": 3.0}, {"digit": Range(0.1)})
    rewards: dict[str, Reward] = {"multi": weighted, "bright": counted}
    found = score_all(rewards, IMAGES, PROMPTS)
    assert calls == [7]
    assert list(names_of(rewards)) == ["multi", "bright", "digit"]
    assert set(found) == {"multi", "bright", "digit"}
    expected = (found["bright"] + 0.3 * found["digit"]) / 4
    assert torch.allclose(found["multi"], expected)


def test_no_images_have_no_scores() -> None:
    assert score_all({"bright": bright}, IMAGES[:0], [])["bright"].shape == (0,)


def test_prompts_and_images_must_match_in_number() -> None:
    with pytest.raises(ValueError, match="7 images need as many prompts, not 6"):
        score_all({"bright": bright}, IMAGES, PROMPTS[:6])
