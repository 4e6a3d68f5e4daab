"""Emoji composed to scenes, and captions that say some of what varies.

One object or two, of any size, place and angle, mirrored or not, on any ground: what a caption
does not say differs from picture to picture, so that a model of them has something to vary.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from random import Random

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from exps.build.emoji_data import Emoji, caption

COLOURS = {
    "white": (255, 255, 255),
    "black": (25, 25, 28),
    "grey": (150, 150, 150),
    "red": (225, 60, 55),
    "orange": (250, 150, 50),
    "yellow": (250, 225, 80),
    "green": (85, 180, 90),
    "blue": (65, 115, 220),
    "light blue": (160, 210, 245),
    "purple": (150, 85, 200),
    "pink": (250, 170, 200),
    "brown": (140, 95, 65),
}
WEIGHTS = {
    "Smileys & Emotion": 1.6,
    "Animals & Nature": 1.6,
    "Food & Drink": 1.6,
    "People & Body": 0.7,
    "Flags": 0.2,
    "Symbols": 0.6,
}
"""How often a category is drawn, for an average of about 1."""
TONE_WEIGHT = 0.08
"""How often one of the five tones of a concept is drawn, as a part of the concept's own share."""
JITTER = 14  # of a ground's red, green and blue
WHITE, PAIRS, PLAIN = 0.35, 0.5, 0.4
"""The shares of scenes on white, of two objects, and of single objects at full size."""
COMMON, COMMON_PAIRS = 0.65, 0.85
"""The shares of single objects and of pairs' that are common ones, where there are any."""
PAIRABLE = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Objects",
            "Activities")  # fmt: skip
ONE_WAY = ("left", "right", "facing", "button", "clockwise", "clock", "letter", "keycap", "flag")
"""Names with one of these are never mirrored, nor is a symbol."""


@dataclass(frozen=True)
class Placed:
    """An object: its row among the pictures, its size and centre as parts of the side."""

    row: int
    size: float
    x: float
    y: float
    angle: float = 0.0  # radians
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """What is seen, from back to front, and what is said of it."""

    ground: tuple[float, float, float]  # red, green, blue, 0 to 255
    objects: tuple[Placed, ...]
    caption: str


class Stage:
    """Draws scenes of the emoji that may be trained on; held out ones never.

    `common`: names that a share of the single objects, and more of the pairs, are drawn from;
    `apart`: two names each that are never drawn together.
    """

    def __init__(
        self,
        emoji: Sequence[Emoji],
        *,
        held_out: bool = False,
        common: Container[str] = (),
        apart: Container[frozenset[str]] = (),
    ) -> None:
        self.emoji, self.apart = emoji, apart
        shares = [WEIGHTS.get(e.category, 1.0) * (TONE_WEIGHT if e.tone else 1.0) for e in emoji]
        weights = torch.tensor(shares) * torch.tensor([e.held_out == held_out for e in emoji])
        pairable = torch.tensor([e.category in PAIRABLE and not e.tone for e in emoji])
        usual = torch.tensor([e.names[0] in common and not e.tone for e in emoji])
        self.single = _often(weights, usual, COMMON).cumsum(0).tolist()
        self.paired = _often(weights * pairable, usual, COMMON_PAIRS).cumsum(0).tolist()

    def draw(self, count: int, g: Generator) -> list[Scene]:
        """So many scenes, by the generator alone."""
        chance = Random(int(torch.randint(2**62, (), generator=g)))
        return [self.scene(chance) for _ in range(count)]

    def scene(self, chance: Random) -> Scene:
        """A scene and its caption by chance."""
        colour = "white" if chance.random() < WHITE else chance.choice(list(COLOURS))
        jitter = 0 if colour == "white" else JITTER
        ground = tuple(c + chance.uniform(-jitter, jitter) for c in COLOURS[colour])
        pair = chance.random() < PAIRS
        objects, text = self._two(chance) if pair else self._one(chance)
        if chance.random() < (0.25 if colour == "white" else 0.5):
            text += chance.choice((" on {}", " on {}", ", {} background", " on a {} background"))
            text = text.format(colour)
        return Scene(ground, objects, text)  # pyright: ignore[reportArgumentType]

    def _one(self, chance: Random) -> tuple[tuple[Placed, ...], str]:
        row = _row(self.single, chance)
        text = caption(self.emoji[row], chance)
        if chance.random() < PLAIN:
            shift = 4 / 64
            x, y = (0.5 + chance.uniform(-shift, shift) for _ in "xy")
            size = 1.0
        else:
            size = chance.uniform(0.35, 0.95)
            x, y = (0.5 + chance.uniform(-0.5, 0.5) * (1.04 - size) for _ in "xy")
        placed = self._turned(row, size, x, y, chance)
        if (size < 0.55 or size > 0.9) and chance.random() < 0.4:
            word = chance.choice(("small", "tiny") if size < 0.55 else ("big", "large"))
            text = f"{word} {text}"
        sides = [*(["left"] * (x < 0.36)), *(["right"] * (x > 0.64))]
        heights = [*(["top"] * (y < 0.36)), *(["bottom"] * (y > 0.64))]
        if (sides or heights) and chance.random() < 0.5:
            if sides and heights and chance.random() < 0.5:
                text += f" in the {heights[0]} {sides[0]} corner"
            else:
                place = chance.choice([*sides, *heights])
                text += f" {'on' if place in sides else 'at'} the {place}"
        return (placed,), text

    def _two(self, chance: Random) -> tuple[tuple[Placed, ...], str]:
        rows: tuple[int, ...] = ()
        while not rows or frozenset(self.emoji[row].names[0] for row in rows) in self.apart:
            rows = (_row(self.paired, chance), _row(self.paired, chance))
        across = chance.random() < 0.6
        objects = []
        for row, along in zip(rows, (0.26, 0.74), strict=True):
            size, aside = chance.uniform(0.4, 0.54), chance.uniform(0.32, 0.68)
            along += chance.uniform(-0.03, 0.03)
            x, y = (along, aside) if across else (aside, along)
            objects.append(self._turned(row, size, x, y, chance))
        first, second = (named(self.emoji[row].name, chance) for row in rows)
        if chance.random() < 0.5:
            words = (" left of ", " right of ") if across else (" above ", " below ")
            text = chance.choice((first + words[0] + second, second + words[1] + first))
        else:
            text = " and ".join(chance.sample((first, second), 2))
        return tuple(objects), text

    def _turned(self, row: int, size: float, x: float, y: float, chance: Random) -> Placed:
        emoji = self.emoji[row]
        fixed = emoji.category in ("Symbols", "Flags") or any(w in emoji.name for w in ONE_WAY)
        mirrored = not fixed and chance.random() < 0.5
        angle = chance.uniform(-20, 20) * pi / 180 if chance.random() < 0.5 else 0.0
        return Placed(row, size, x, y, angle, mirrored)


def named(name: str, chance: Random) -> str:
    """A name with its article or without."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}" if chance.random() < 0.5 else name


def paint(scenes: Sequence[Scene], pictures: Tensor) -> Tensor:
    """Scenes of pictures uint8 [N, 4, 64, 64] -> floats [B, 3, 64, 64] in [0, 1]."""
    grounds = torch.tensor([scene.ground for scene in scenes]).clamp(0, 255) / 255
    canvas = grounds[:, :, None, None].repeat(1, 1, *pictures.shape[2:])
    for layer in range(max(len(scene.objects) for scene in scenes)):
        some = [i for i, scene in enumerate(scenes) if len(scene.objects) > layer]
        placed = [scenes[i].objects[layer] for i in some]
        drawn = _transformed(placed, pictures)
        canvas[some] = canvas[some] * (1 - drawn[:, 3:]) + drawn[:, :3]
    return canvas.clamp(0, 1)


def _transformed(placed: Sequence[Placed], pictures: Tensor) -> Tensor:
    """Each object where it belongs, colours times opacity: [B, 4, 64, 64]."""
    source = pictures[[p.row for p in placed]] / 255
    source = torch.cat([source[:, :3] * source[:, 3:], source[:, 3:]], 1)
    small = torch.tensor([p.size < 0.7 for p in placed])
    if small.any():  # halved and enlarged again: no pixel is skipped when it is drawn small
        halved = F.interpolate(source[small], scale_factor=0.5, mode="area")
        source[small] = F.interpolate(halved, scale_factor=2.0, mode="bilinear")
    maps = []
    for p in placed:
        c, s, sign = cos(p.angle) / p.size, sin(p.angle) / p.size, -1 if p.mirrored else 1
        x, y = 2 * p.x - 1, 2 * p.y - 1
        maps.append([[sign * c, sign * s, -sign * (c * x + s * y)], [-s, c, s * x - c * y]])
    grid = F.affine_grid(torch.tensor(maps), list(source.shape), align_corners=False)
    return F.grid_sample(source, grid, mode="bilinear", align_corners=False)


def _often(weights: Tensor, usual: Tensor, share: float) -> Tensor:
    """Weights [N] of which the usual ones [N] make up a share, if there are any."""
    within, without = weights * usual, weights * ~usual
    if not within.any():
        return weights
    return within / within.sum() * share + without / without.sum() * (1 - share)


def _row(cumulative: list[float], chance: Random) -> int:
    return chance.choices(range(len(cumulative)), cum_weights=cumulative)[0]
