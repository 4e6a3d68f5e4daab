"""Emoji scenes: what is held out, what hangs on the seed, what a caption says of its picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

from exps.build.emoji_data import ALWAYS_TRAINED, Emoji, load_emoji
from exps.build.scenes import COLOURS, Placed, Scene, Stage, paint
from src.files import write_json


@pytest.fixture
def emoji(tmp_path: Path) -> list[Emoji]:
    """Twenty things, the four that are always trained, a flag, a hand, and a component."""
    named = [(f"THING {i:02d}", f"{0x1F600 + i:X}", "Objects") for i in range(20)]
    named += [(n.upper(), f"{0x2600 + i:X}", "Objects") for i, n in enumerate(ALWAYS_TRAINED)]
    named += [("FLAG ONE", "1F1E6", "Flags"), ("TONE", "1F3FB", "Component")]
    named += [("HAND", "1F44B", "People & Body")]
    records = [
        {"name": name, "unified": code, "short_name": name.lower().replace(" ", "-"),
         "image": f"{code}.png", "category": category, "has_img_google": True}
        for name, code, category in named
    ]  # fmt: skip
    tones = {"1F3FD": {"image": "1F44B-tone.png"}, "1F3FB-1F3FD": {"image": "pair.png"}}
    records[-1]["skin_variations"] = tones
    write_json(tmp_path / "google/emoji.json", records)
    words = {"👋": ["waving_hand", "hello", ":)", "palm"], "🇦": ["flag_one", "nation"]}
    write_json(tmp_path / "emojilib/dist/emoji-en-US.json", words)
    for seed in range(20):
        every = load_emoji(tmp_path, seed)
        out = {e.names[0] for e in every if e.held_out}
        assert len([e for e in every if e.held_out and not e.tone]) == 2
        assert not out & set(ALWAYS_TRAINED)
        assert all(e.held_out == (e.names[0] in out) for e in every)
    return load_emoji(tmp_path)


def test_scenes_hang_on_the_seed_show_what_is_trained_and_say_what_is_so(
    emoji: list[Emoji],
) -> None:
    assert len(emoji) == 20 + 4 + 1 + 2
    base, tone = (e for e in emoji if e.file.startswith("1F44B"))
    assert (base.names, base.keywords) == (("waving hand", "hand"), ("hello", "palm"))
    assert tone.name == "waving hand, medium skin tone"
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


def test_common_things_are_drawn_more_often_and_pairs_that_are_to_judge_by_never(
    emoji: list[Emoji],
) -> None:
    pair = frozenset(("red apple", "rocket"))
    stage = Stage(emoji, common=[*pair, "dog face"], apart={pair})
    drawn = stage.draw(1000, Generator().manual_seed(0))
    ones = [emoji[s.objects[0].row].names[0] for s in drawn if len(s.objects) == 1]
    assert sum(name in (*pair, "dog face") for name in ones) / len(ones) == pytest.approx(
        0.65, abs=0.05
    )
    twos = [
        frozenset(emoji[o.row].names[0] for o in s.objects) for s in drawn if len(s.objects) > 1
    ]
    assert pair not in twos
    assert frozenset(("red apple", "dog face")) in twos


def test_a_scene_is_painted_as_it_is_described() -> None:
    picture = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    picture[:, 0, :, :32] = 255  # red on the left half, nothing on the right
    picture[:, 3, :, :32] = 255
    blue, middle = (0.0, 0.0, 255.0), Placed(0, 0.5, 0.5, 0.5)
    each = (middle, replace(middle, mirrored=True), replace(middle, x=0.25, y=0.75))
    plain, other, corner = paint([Scene(blue, (one,), "") for one in each], picture)
    reds = (plain[0, 32, 20], other[0, 32, 44], corner[0, 48, 4])
    assert [float(red) for red in reds] == pytest.approx([1, 1, 1], abs=0.02)
    assert plain[2, 32, 44] == other[2, 32, 20] == corner[2, 16, 4] == 1
