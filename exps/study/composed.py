"""Does a text-to-image model of emoji draw what composed prompts say? A small GenEval.

    python -m exps.study.composed --model tiny-sd3 --outdir runs/composed

100 prompts (src/prompts/composed.txt): one object, two, one on a colour, one at a place. What
stands out from the ground, in the picture or in the half where it belongs, is named by
efficientnet-minilm, which no training sees: right if the name is among the first three of all
prompts' names. Colours and places are read off the pixels. Real emoji, laid out as the prompts
say (`--real runs/emoji`, unpacked for exps.build), reach 0.93. The idea is GenEval's: Ghosh et
al. 2023, arXiv:2310.11513.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import pi
from pathlib import Path
from random import Random

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.generate import Job, generate
from backends.load import load_backend
from exps.build.emoji_data import load_emoji, load_pictures
from exps.build.scenes import COLOURS, Placed, Scene, paint
from rewards.efficientnet_minilm import EmojiScore
from rewards.registry import load_reward
from solvers.classic import Euler
from solvers.sampler import Sampler
from src.files import write_json
from src.images import grid, save_png
from src.options import OneLineCommand, SeedList
from src.stats import mean_of
from src.text import read_prompts

PROMPTS = Path(__file__).parents[2] / "src" / "prompts" / "composed.txt"
FIRST = 3
APART = 0.15  # how much a pixel of an object differs from the ground, of 1


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for: objects by name, and one of a ground, a place and a relation."""

    kind: str
    names: tuple[str, ...]
    colour: str = ""
    place: str = ""


def parse(prompt: str) -> Wanted:
    """What a prompt of the list asks for."""
    plain = re.sub(r"\b(an?|small) ", "", prompt)
    for relation, place in (("left of", "left"), ("right of", "right"), ("above", "top"),
                            ("below", "bottom")):  # fmt: skip
        if f" {relation} " in plain:
            first, second = plain.split(f" {relation} ")
            return Wanted("relation", (first, second), place=place)
    if " and " in plain:
        return Wanted("two", tuple(plain.split(" and ")))
    if match := re.fullmatch(r"(.+) (?:on|at) the (left|right|top|bottom)", plain):
        return Wanted("place", (match[1],), place=match[2])
    if match := re.fullmatch(r"(.+) on (.+)", plain):
        return Wanted("colour", (match[1],), colour=match[2])
    return Wanted("one", (plain,))


def half(image: Tensor, place: str) -> Tensor:
    """The half of a picture [3, S, S] at a place."""
    middle = image.shape[-1] // 2
    if place in ("left", "right"):
        return image[:, :, :middle] if place == "left" else image[:, :, middle:]
    return image[:, :middle] if place == "top" else image[:, middle:]


def alone(part: Tensor, back: Tensor) -> Tensor:
    """What differs from the ground `back` in a part of a picture, on white and enlarged."""
    differs = (part - back[:, None, None]).abs().amax(0) > APART
    white = torch.where(differs, part, 1.0)
    (left, right), (top, bottom) = (
        (rows[0], rows[-1] + 1)
        for axis in (0, 1)
        for rows in [(differs.float().mean(axis) > 0.02).nonzero()[:, 0].tolist()
                     or [0, part.shape[2 - axis] - 1]]
    )  # fmt: skip
    cut = white[:, top:bottom, left:right]
    side = max(cut.shape[1:])
    wide, high = side - cut.shape[2], side - cut.shape[1]
    square = F.pad(cut, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=1.0)
    return F.interpolate(square[None], (64, 64), mode="bicubic", antialias=True)[0].clamp(0, 1)


def ground(image: Tensor) -> Tensor:
    """The median colour [3] of the two outermost pixels of a picture [3, S, S]."""
    edge = torch.ones(image.shape[1:], dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return image[:, edge].median(1).values


def centre(image: Tensor) -> tuple[float, float]:
    """x and y, in [0, 1], of the middle of what differs from the ground."""
    differs = ((image - ground(image)[:, None, None]).abs().amax(0) > APART).float()
    mass, line = differs.sum().clamp(min=1), torch.linspace(0, 1, image.shape[-1])
    return float((differs.sum(0) * line).sum() / mass), float((differs.sum(1) * line).sum() / mass)


def nearest_colour(colour: Tensor) -> str:
    """The name of the colour [3] of COLOURS that is nearest."""
    palette = torch.tensor(list(COLOURS.values())) / 255
    return list(COLOURS)[int((palette - colour).square().sum(1).argmin())]


def sees(score: EmojiScore, names: Sequence[str], texts: Tensor, part: Tensor, name: str) -> bool:
    """Whether the name is among the first few of `names`, whose embeddings are `texts`."""
    features = score.matrix(score.features(part[None]))
    cosines = (F.normalize(features, dim=-1) @ texts.T)[0]
    return int((cosines > cosines[names.index(name)]).sum()) < FIRST


def right(image: Tensor, wanted: Wanted, seen: Callable[[Tensor, str], bool]) -> bool:
    """Whether a picture shows all that is wanted; `seen` is asked of objects on white."""
    back = ground(image)
    if wanted.kind in ("two", "relation"):
        pairs = [("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")]
        both = [p for p in pairs if wanted.kind == "two" or p[0] == wanted.place]
        return any(
            all(
                seen(alone(half(image, place), back), name)
                for place, name in zip(pair, wanted.names, strict=True)
            )
            for pair in both
        )
    if wanted.colour and nearest_colour(back) != wanted.colour:
        return False
    x, y = centre(image)
    where = {"left": x < 0.42, "right": x > 0.58, "top": y < 0.42, "bottom": y > 0.58}
    return (not wanted.place or where[wanted.place]) and seen(alone(image, back), wanted.names[0])


def diversity(images: Tensor) -> dict[str, float]:
    """RMSE [P, S, *] between seeds of a prompt, and between prompts at a seed."""
    seeds, prompts = (
        float((images - images.roll(1, axis)).square().flatten(1).mean(1).sqrt().mean())
        for axis in (1, 0)
    )
    return {"seeds_of_a_prompt": round(seeds, 4), "prompts": round(prompts, 4)}


def real(prompts: Sequence[str], seeds: Sequence[int], data: Path) -> Tensor:
    """Real emoji where the prompts want them, [P * S, 3, 64, 64]; `data` as exps.build has it."""
    emoji, chance = load_emoji(data), Random(0)
    rows = {one.names[0]: row for row, one in enumerate(emoji) if not one.tone}
    at = {"": (0.5, 0.5), "left": (0.26, 0.5), "right": (0.74, 0.5), "top": (0.5, 0.26)}
    at |= {"bottom": (0.5, 0.74)}
    other = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    scenes = []
    for wanted in (parse(prompt) for prompt in prompts for _ in seeds):
        place = wanted.place or ("left" if len(wanted.names) > 1 else "")
        places, size = (place, other.get(place, "")), 0.5 if place else 0.9
        angles = [chance.uniform(-20, 20) * pi / 180 for _ in wanted.names]
        objects = tuple(
            Placed(rows[name], size, *at[where], angle)
            for name, where, angle in zip(wanted.names, places, angles, strict=False)
        )
        scenes.append(Scene(COLOURS[wanted.colour or "white"], objects, ""))
    return paint(scenes, load_pictures(data, emoji))


def names_of(prompts: Sequence[str]) -> list[str]:
    """All names of objects in the prompts, each once."""
    return list(dict.fromkeys(name for prompt in prompts for name in parse(prompt).names))


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="tiny-sd3")
@click.option("--seeds", type=SeedList(), default="0-3")
@click.option("--steps", type=click.IntRange(1), default=28, help="Of Euler.")
@click.option("--guidance_rate", type=float, default=4.0)
@click.option("--real", "data", type=click.Path(path_type=Path), help="Judge real emoji instead.")
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
def main(
    model: str, seeds: list[int], steps: int, guidance_rate: float, data: Path | None, outdir: Path
) -> None:
    """Write composed.json and composed.png, the prompts line by line, ten a row, to OUTDIR."""
    prompts, backend = read_prompts(PROMPTS), load_backend(model)
    score = load_reward("efficientnet-minilm")
    assert isinstance(score, EmojiScore)
    sigmas = backend.levels.grid("flowmatch", steps + 1).tolist()
    sampler = Sampler(Euler(), tuple(sigmas), backend.levels.process, guidance_rate=guidance_rate)
    jobs = [Job(seed, prompt) for prompt in prompts for seed in seeds]
    if data:
        parts = [real(prompts, seeds, data)]
    else:
        parts = [batch.images for batch in generate(backend, sampler, jobs, batch=20)]
    images = torch.cat(parts).unflatten(0, (len(prompts), len(seeds)))
    names = names_of(prompts)
    seen = partial(sees, score, names, score.texts(names))
    shares: dict[str, list[float]] = {"all": []}
    for row, prompt in zip(images, prompts, strict=True):
        wanted = parse(prompt)
        share = sum(right(image, wanted, seen) for image in row) / len(row)
        shares["all"].append(share)
        shares.setdefault(wanted.kind, []).append(share)
    by_kind = {kind: str(mean_of(torch.tensor(each))) for kind, each in shares.items()}
    report = {"diversity": diversity(images), **by_kind}
    save_png(outdir / "composed.png", grid(images[:, 0], columns=10))
    write_json(outdir / "composed.json", {"model": model, "seeds": len(seeds), **report})
    click.echo("\n".join(f"{name}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    main()
