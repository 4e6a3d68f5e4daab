"""The emoji as captioned pictures: names, tones, what is held out, and how often each is drawn."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from src.emoji import (
    ALWAYS_TRAINED,
    Emoji,
    captions,
    drawing_weights,
    load_emoji,
    load_pictures,
    shifted,
)
from src.files import write_json


def record(
    name: str, code: str, category: str = "Objects", tones: bool = False
) -> dict[str, object]:
    variants = {"1F3FD": {"image": f"{code}-tone.png"}, "1F3FB-1F3FD": {"image": "pair.png"}}
    return {
        "name": name,
        "unified": code,
        "short_name": name.lower().replace(" ", "-"),
        "image": f"{code}.png",
        "category": category,
        "has_img_google": True,
        "skin_variations": variants if tones else {},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty things, the four that are always trained, a flag, a hand, and a component."""
    things = [record(f"THING {i:02d}", f"{0x1F600 + i:X}") for i in range(20)]
    usual = [record(n.upper(), f"{0x2600 + i:X}") for i, n in enumerate(ALWAYS_TRAINED)]
    flag, hand = record("FLAG ONE", "1F1E6", "Flags"), record("HAND", "1F44B", tones=True)
    other = record("TONE", "1F3FB", "Component")
    write_json(tmp_path / "google/emoji.json", [*things, *usual, flag, hand, other])
    words = {"👋": ["waving_hand", "hello", ":)", "palm"], "🇦": ["flag_one", "nation"]}
    write_json(tmp_path / "emojilib/dist/emoji-en-US.json", words)
    return tmp_path


def test_components_and_pairs_of_tones_are_left_out(folder: Path) -> None:
    emoji = load_emoji(folder)
    assert len(emoji) == 20 + 4 + 1 + 2
    assert not {"1F3FB.png", "pair.png"} & {e.file for e in emoji}


def test_the_usual_name_comes_first_and_the_tone_is_told(folder: Path) -> None:
    base, dark = (e for e in load_emoji(folder) if e.file.startswith("1F44B"))
    assert base.names == ("waving hand", "hand")
    assert base.keywords == ("hello", "palm")
    assert dark.name == "waving hand, medium skin tone"


def test_a_tenth_is_held_out_and_the_usual_prompts_never(folder: Path) -> None:
    for seed in range(20):
        out = [e.names[0] for e in load_emoji(folder, seed) if e.held_out and not e.tone]
        assert len(out) == 2
        assert not set(out) & set(ALWAYS_TRAINED)


def test_a_tone_is_held_out_with_its_concept(folder: Path) -> None:
    held_out: dict[str, set[bool]] = {}
    for seed in range(40):
        for e in load_emoji(folder, seed):
            held_out.setdefault(f"{seed} {e.names[0]}", set()).add(e.held_out)
    assert all(len(told) == 1 for told in held_out.values())


def test_captions_hang_on_the_seed_and_begin_with_the_name() -> None:
    emoji = Emoji("a.png", ("red apple", "apple"), ("fruit", "school", "food"), "Food & Drink")
    told = captions(emoji, 50, 3)
    assert told == captions(emoji, 50, 3) != captions(emoji, 50, 4)
    assert told[0] == "red apple"
    assert len(set(told)) > 5


def test_every_caption_of_a_tone_says_it() -> None:
    emoji = Emoji("a.png", ("hand",), ("hello", "palm"), "People & Body", "dark skin tone")
    assert all(text.endswith(", dark skin tone") for text in captions(emoji, 50, 0))


def test_flags_and_tones_are_drawn_seldom() -> None:
    kinds = [("Flags", ""), ("Objects", ""), ("Food & Drink", ""), ("Objects", "dark skin tone")]
    flag, thing, food, tone = drawing_weights([Emoji("", ("a",), (), c, t) for c, t in kinds])
    assert flag < thing < food
    assert tone < 0.1 * thing


def test_what_is_transparent_becomes_white(folder: Path) -> None:
    (folder / "google/img/google/64").mkdir(parents=True)
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(folder / "google/img/google/64/a.png")
    pictures = load_pictures(folder, [Emoji("a.png", ("a",), (), "Objects")])
    assert pictures.shape == (1, 3, 64, 64)
    assert bool((pictures == 255).all())


def test_a_missing_picture_is_named_with_its_package(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.png.*emoji-datasource-google"):
        load_pictures(folder, [Emoji("nothing.png", ("a",), (), "Objects")])


def test_shifted_pictures_keep_their_pixels_but_for_a_white_edge() -> None:
    pictures = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    moved = shifted(pictures, 2, torch.Generator().manual_seed(0))
    white = (moved == 255).flatten(1).sum(1)
    assert moved.shape == pictures.shape
    assert int(white.min()) == 0
    assert int(white.max()) == 3 * (64 - 36)
