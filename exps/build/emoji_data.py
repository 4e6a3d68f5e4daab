r"""The Noto emoji with their names and keywords: what the small text-to-image models learn from.

Pictures (64x64, Apache-2.0) and names from the npm package emoji-datasource-google 16.0.0,
keywords from emojilib 4.0.3; neither is needed to run a trained model. In a folder of your choice:

    npm pack emoji-datasource-google@16.0.0 emojilib@4.0.3
    tar -xzf emoji-datasource-google-16.0.0.tgz --wildcards 'package/img/google/64/*' \
        package/emoji.json && mv package google
    tar -xzf emojilib-4.0.3.tgz && mv package emojilib
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.files import read_json

PACKAGES = ("emoji-datasource-google@16.0.0", "emojilib@4.0.3")
IMAGES = "google/img/google/64"
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
ALWAYS_TRAINED = ("red apple", "smiling face", "rocket", "dog face")
"""Concepts that are never held out: the prompts that the model is judged by at first sight."""
TEMPLATES = ("{}", "{}", "{}", "{} emoji", "an emoji of {}", "a picture of {}")


@dataclass(frozen=True)
class Emoji:
    """A picture's file name and what may be said of it; names[0] is the usual name."""

    file: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    category: str
    tone: str = ""
    held_out: bool = False

    @property
    def name(self) -> str:
        """The usual name, with the skin tone where there is one."""
        return ", ".join(filter(None, (self.names[0], self.tone)))


def load_emoji(folder: Path, seed: int = 0) -> list[Emoji]:
    """All base concepts, and their variants of one skin tone; a tenth of the concepts held out.

    folder holds the two unpacked packages as google/ and emojilib/. Which are held out depends
    on the names and the seed alone. ValueError where a file is missing.
    """
    records = read_json(folder / "google" / "emoji.json")
    keywords = read_json(folder / "emojilib" / "dist" / "emoji-en-US.json")
    shown = [r for r in records if r["category"] != "Component" and r["has_img_google"]]
    bases = [(_described(r, keywords), r) for r in shown]
    free = sorted({emoji.names[0] for emoji, _ in bases} - set(ALWAYS_TRAINED))
    held_out = set(Random(seed).sample(free, len(bases) // 10))
    every: list[Emoji] = []
    for emoji, record in bases:
        base = replace(emoji, held_out=emoji.names[0] in held_out)
        every.append(base)
        variants = record.get("skin_variations", {})
        every += [
            replace(base, file=variants[code]["image"], tone=tone)
            for code, tone in TONES.items()
            if code in variants
        ]
    return every


def load_pictures(folder: Path, emoji: Sequence[Emoji]) -> Tensor:
    """Return uint8 [N, 4, 64, 64]: red, green, blue, and how opaque a pixel is.

    ValueError where a file is missing.
    """
    pictures = np.empty((len(emoji), 64, 64, 4), np.uint8)
    for pixels, path in zip(pictures, (folder / IMAGES / e.file for e in emoji), strict=True):
        try:
            with Image.open(path) as image:
                pixels[:] = np.array(image.convert("RGBA"))
        except FileNotFoundError as error:
            raise ValueError(f"no such file: {path}; unpack {PACKAGES[0]} of npm") from error
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def on_white(pictures: Tensor) -> Tensor:
    """Pictures uint8 [N, 4, H, W] -> on white, floats [N, 3, H, W] in [0, 1]."""
    colour, opaque = pictures[:, :3] / 255, pictures[:, 3:] / 255
    return colour * opaque + 1 - opaque


def caption(emoji: Emoji, chance: Random) -> str:
    """One of the ways to say it: a name, in a template or not, or keywords."""
    name = emoji.names[0] if chance.random() < 0.75 else chance.choice(emoji.names)
    parts = [chance.choice(TEMPLATES).format(name)]
    few = chance.sample(emoji.keywords, min(len(emoji.keywords), chance.randint(2, 3)))
    if few and (kind := chance.random()) < 0.35:
        parts = few if kind < 0.1 else [name, *few]
    return ", ".join(filter(None, (*parts, emoji.tone)))


def _described(record: Mapping[str, Any], keywords: Mapping[str, Sequence[str]]) -> Emoji:
    points = [int(code, 16) for code in record["unified"].split("-")]
    character = "".join(map(chr, points))
    words = keywords.get(character) or keywords.get(character.replace("\ufe0f", "")) or ()
    plain = [_plain(word) for word in words if word != "keycap"]
    short = _plain(record["short_name"].replace("-", " "))
    names = (*plain[:1], _plain(record["name"] or ""), short)
    usual = dict.fromkeys(name for name in names if len(name) > 1)
    others = dict.fromkeys(w for w in plain[1:] if len(w) > 2 and w not in usual)
    return Emoji(record["image"], tuple(usual), tuple(others), record["category"])


def _plain(text: str) -> str:
    """Lower case, words apart; what is no word (":D") becomes empty."""
    text = text.lower().replace("_", " ").replace("\u201c", "").replace("\u201d", "")
    return re.sub(r"\s+", " ", text).strip() if re.search(r"[a-z0-9]{2}", text) else ""
