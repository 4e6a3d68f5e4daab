"""What composed prompts ask for, and how pictures are asked whether they show it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exps.study.composed import (
    COLOURS,
    PROMPTS,
    Wanted,
    alone,
    centre,
    diversity,
    ground,
    half,
    names_of,
    nearest_colour,
    parse,
)
from src.text import read_prompts


def blob(x: slice, y: slice, colour: str = "blue") -> Tensor:
    """A red square on a colour."""
    back = torch.tensor(COLOURS[colour]) / 255
    image = back[:, None, None].expand(3, 64, 64).clone()
    image[:, y, x] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return image


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("ice cream", Wanted("one", ("ice cream",))),
        ("an airplane and a red heart", Wanted("two", ("airplane", "red heart"))),
        ("cat on light blue", Wanted("colour", ("cat",), colour="light blue")),
        ("a cat left of a sun", Wanted("relation", ("cat", "sun"), place="left")),
        ("a bus below an alien", Wanted("relation", ("bus", "alien"), place="bottom")),
        ("small cat at the top", Wanted("place", ("cat",), place="top")),
    ],
)
def test_a_prompt_is_taken_apart(prompt: str, wanted: Wanted) -> None:
    assert parse(prompt) == wanted


def test_the_list_asks_for_trained_names_alone_in_all_kinds() -> None:
    prompts = read_prompts(PROMPTS)
    trained = read_prompts(Path(PROMPTS).with_name("emoji-train.txt"))
    assert len(prompts) == len(set(prompts)) == 100
    assert set(names_of(prompts)) <= set(trained)
    assert {parse(p).colour for p in prompts} - {""} <= set(COLOURS)
    assert {parse(p).kind for p in prompts} == {"one", "two", "colour", "relation", "place"}


def test_ground_place_and_object_are_read_off_the_pixels() -> None:
    image = blob(slice(8, 24), slice(40, 56), "yellow")
    assert nearest_colour(ground(image)) == "yellow"
    assert centre(image) == pytest.approx((0.25, 0.75), abs=0.02)
    cut = alone(half(image, "left"), ground(image))
    assert cut.shape == (3, 64, 64)
    torch.testing.assert_close(cut.mean((1, 2)), torch.tensor([0.9, 0.1, 0.1]), atol=0.05, rtol=0)
    assert half(image, "top").shape == (3, 32, 64)
    assert bool((alone(half(image, "right"), ground(image)) == 1).all())  # nothing there


def test_diversity_is_between_seeds_and_between_prompts() -> None:
    levels = torch.tensor([[0.0, 0.1], [0.5, 0.6]])[..., None, None, None].expand(2, 2, 3, 4, 4)
    assert diversity(levels) == {"seeds_of_a_prompt": 0.1, "prompts": 0.5}
