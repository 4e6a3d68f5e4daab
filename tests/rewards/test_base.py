"""Calling rewards, summing them, and finding them by name."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rewards.base import RANGES, Range, WeightedSum, score
from rewards.registry import load_reward, load_rewards, parse
from tests.rewards.twins import PROMPTS, images


def brightness(batch: Tensor, _prompts: Sequence[str]) -> Tensor:
    return batch.mean((1, 2, 3))


def wrong_shape(batch: Tensor, _prompts: Sequence[str]) -> Tensor:
    return batch.mean((2, 3))


def no_numbers(_batch: Tensor, _prompts: Sequence[str]) -> Tensor:
    return torch.tensor([1.0, float("nan"), 2.0, float("nan")])


def test_an_image_in_memory_scores_as_its_bytes() -> None:
    batch = images()
    assert torch.equal(score(brightness, batch + 0.4 / 255, PROMPTS), brightness(batch, PROMPTS))


def test_no_images_have_no_scores() -> None:
    assert score(brightness, images(0), []).shape == (0,)


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 4, 8, 8), (3, 8, 8)])
def test_grey_and_transparent_images_are_refused_in_a_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rewards take floats \[B, 3, H, W\], not .*grey"):
        score(brightness, torch.zeros(shape), PROMPTS)


def test_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floats.*uint8"):
        score(brightness, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), PROMPTS)


def test_an_image_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        score(brightness, images() * float("nan"), PROMPTS)


@pytest.mark.parametrize("prompts", [["one"], "four"])
def test_another_number_of_prompts_is_refused(prompts: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="4 images need as many prompts"):
        score(brightness, images(), prompts)


def test_a_result_of_the_wrong_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"mine must return a tensor \[4\], not \[4, 3\]"):
        score(wrong_shape, images(), PROMPTS, "mine")


def test_a_result_with_nan_names_the_image() -> None:
    with pytest.raises(ValueError, match=r"mine gave nan for image 1 of 4 \(and 1 more\)"):
        score(no_numbers, images(), PROMPTS, "mine")


def test_a_weighted_sum_is_the_mean_of_scores_in_a_common_range() -> None:
    values = {"pickscore": 20.8, "imagereward": -1.5}
    rewards = {n: lambda b, _, v=v: torch.full((len(b),), v) for n, v in values.items()}
    both = WeightedSum(rewards, {"pickscore": 1.0, "imagereward": 3.0}, RANGES)
    expected = (20.8 / 26 - 3 * 1.5 / 10) / 4
    assert both(images(), PROMPTS).tolist() == pytest.approx([expected] * 4)


def test_every_range_keeps_the_order_and_the_sign() -> None:
    for to in RANGES.values():
        assert to.scale > 0
        assert to.shift == 0


def test_a_range_that_is_not_named_is_the_score_itself() -> None:
    one = WeightedSum({"mine": brightness}, {"mine": 2.0}, {"other": Range(5.0)})
    assert torch.equal(one(images(), PROMPTS), brightness(images(), PROMPTS))


def test_names_become_weights_and_zero_weights_go() -> None:
    assert parse("hps") == {"hps": 1}
    assert parse("multi:hps=2,clip=0,mine:score=0.5") == {"hps": 2, "mine:score": 0.5}
    assert set(parse("multi")) == set(RANGES)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("clp", "did you mean clip"),
        ("multi:clp=1", "did you mean clip"),
        ("multi:clip=-1", "weight '-1'"),
        ("multi:clip", "no reward ''"),
        ("multi:clip=x", "weight 'x'"),
        ("multi:clip=0", "a weight above zero"),
        ("multi:clip=1,clip=2", "each reward once"),
    ],
)
def test_a_wrong_name_is_refused_in_a_line(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        parse(name)
    assert "\n" not in str(caught.value)


def test_a_function_of_your_own_is_a_reward() -> None:
    name = f"{__name__}:brightness"
    sums = f"multi:{name}=2"
    rewards = load_rewards([name, sums])
    expected = brightness(images(), PROMPTS)
    assert torch.equal(score(rewards[name], images(), PROMPTS), expected)
    assert torch.allclose(score(rewards[sums], images(), PROMPTS), expected)


@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}:nothing", f"{__name__}:RANGES"])
def test_what_cannot_be_imported_or_called_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be imported|is no function"):
        load_reward(name)
