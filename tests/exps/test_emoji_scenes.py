"""Emoji as pictures and captions: names, tones, what is held out, what a scene says of itself."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Generator

from exps.build.emoji_data import (
    ALWAYS_TRAINED,
    Emoji,
    caption,
    load_emoji,
)
from exps.build.scenes import COLOURS, Placed, Scene, Stage, paint
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


def test_names_keywords_and_tones(folder: Path) -> None:
    emoji = load_emoji(folder)
    assert len(emoji) == 20 + 4 + 1 + 2
    assert not {"1F3FB.png", "pair.png"} & {e.file for e in emoji}
    base, dark = (e for e in emoji if e.file.startswith("1F44B"))
    assert base.names == ("waving hand", "hand")
    assert base.keywords == ("hello", "palm")
    assert dark.name == "waving hand, medium skin tone"


def test_a_tenth_is_held_out_with_its_tones_and_the_usual_prompts_never(folder: Path) -> None:
    for seed in range(20):
        emoji = load_emoji(folder, seed)
        out = {e.names[0] for e in emoji if e.held_out}
        assert len([e for e in emoji if e.held_out and not e.tone]) == 2
        assert not out & set(ALWAYS_TRAINED)
        assert all(e.held_out == (e.names[0] in out) for e in emoji)


def test_captions_hang_on_chance_alone_and_say_the_tone() -> None:
    emoji = Emoji("a.png", ("red apple", "apple"), ("fruit", "school", "food"), "Food & Drink")
    first, again = (
        [caption(emoji, chance) for _ in range(50)] for chance in (Random(3), Random(3))
    )
    assert first == again
    assert len(set(first)) > 5
    dark = replace(emoji, tone="dark skin tone")
    assert all(caption(dark, Random(i)).endswith(", dark skin tone") for i in range(50))


def test_scenes_hang_on_the_seed_show_what_is_trained_and_say_what_is_so(folder: Path) -> None:
    emoji = load_emoji(folder)
    drawn = Stage(emoji).draw(600, Generator().manual_seed(1))
    assert drawn == Stage(emoji).draw(600, Generator().manual_seed(1))
    assert not any(emoji[o.row].held_out for scene in drawn for o in scene.objects)
    unseen = Stage(emoji, held_out=True).draw(50, Generator().manual_seed(1))
    assert all(emoji[o.row].held_out for scene in unseen for o in scene.objects)
    for scene in drawn:
        colour = next((c for c in COLOURS if f"on {c}" in scene.caption), None)
        if colour:
            assert scene.ground == pytest.approx(COLOURS[colour], abs=14)
        if " left of " in scene.caption:
            left, right = sorted(scene.objects, key=lambda placed: placed.x)
            before, after = scene.caption.split(" left of ")
            assert emoji[left.row].name in before
            assert emoji[right.row].name in after
        if scene.caption.endswith("at the top"):
            assert scene.objects[0].y < 0.36
    said = [scene.caption for scene in drawn]
    assert all(any(words in text for text in said) for words in (" and ", " above ", "small "))


def test_a_scene_is_painted_as_it_is_described() -> None:
    picture = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    picture[:, 0, :, :32] = 255  # red on the left half, nothing on the right
    picture[:, 3, :, :32] = 255
    blue = (0.0, 0.0, 255.0)

    def painted(**changes: object) -> torch.Tensor:
        placed = replace(Placed(0, 0.5, 0.5, 0.5), **changes)  # pyright: ignore[reportArgumentType]
        return paint([Scene(blue, (placed,), "")], picture)[0]

    plain, other = painted(), painted(mirrored=True)
    assert plain[0, 32, 20] == pytest.approx(1, abs=0.02)
    assert plain[2, 32, 44] == other[2, 32, 20] == 1
    assert other[0, 32, 44] == pytest.approx(1, abs=0.02)
    assert painted(x=0.25, y=0.75)[0, 48, 4] == pytest.approx(1, abs=0.02)
    assert painted(x=0.25, y=0.75)[2, 16, 4] == 1
