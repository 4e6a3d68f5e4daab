"""Pictures to measure: those of a folder or a zip, and what each says that it is.

sample.py writes into every PNG which seed and prompt it was made from, and an index, samples.json.
Where the two differ, the picture is believed. Pictures are read by threads ahead of the network.
Shapes: n pictures of one size, [n, 3, H, W] uint8.
"""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.files import read_json
from src.images import FORMATS, read_image

INDEX = "samples.json"
RECIPE = "recipe"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
THREADS = 4
AHEAD = 256  # pictures that are told apart at once
UNREADABLE = (
    *(OSError, ValueError, KeyError, RuntimeError, SyntaxError, NotImplementedError),
    *(EOFError, struct.error, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError),
)

Reader = Callable[[str], bytes]
R = TypeVar("R")


@dataclass(frozen=True)
class Picture:
    """One picture, and what samples.json says of it."""

    name: str  # relative to the folder, or in the zip
    seed: int | None = None
    prompt: str | int | None = None  # an int is a class


@dataclass(frozen=True)
class Pictures:
    """Pictures of one place, in the order of their names or as listed."""

    place: Path  # a folder or a zip
    items: tuple[Picture, ...]


@dataclass(frozen=True)
class Identity:
    """What one picture is: the hash of its file, and the seed and prompt that it was made from."""

    digest: str
    seed: int | None
    prompt: str | int | None
    disagrees: bool  # whether samples.json says another seed or prompt


def find_pictures(place: Path, pattern: str = "*") -> Pictures:
    """The pictures of a folder, a zip or a samples.json whose file names match `pattern`.

    A folder that has a samples.json has the pictures that it lists, and those beside it that
    carry a recipe of their own: a stopped run's index may lag behind. Raises ValueError where
    there are none.
    """
    if not place.exists():
        raise ValueError(f"no such folder or file: {place}")
    if place.suffix == ".zip":
        found = Pictures(place, tuple(map(Picture, _names_in_zip(place))))
    elif place.is_file():
        found = Pictures(place.parent, _listed(place))
    else:
        files = (p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        names = sorted(p.relative_to(place).as_posix() for p in files)
        listed = _listed(place / INDEX) if (place / INDEX).is_file() else None
        items = tuple(map(Picture, names)) if listed is None else _with_rest(place, names, listed)
        found = Pictures(place, items)
    kept = tuple(p for p in found.items if fnmatch(PurePosixPath(p.name).name, pattern))
    if not kept:
        which = "" if pattern == "*" else f" whose names match {pattern}"
        raise ValueError(f"no images in {place}{which}: PNG, JPEG, WebP, BMP, GIF, TIFF are read")
    return replace(found, items=kept)


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no whole zip: {error}") from error
    wanted = (n for n in names if PurePosixPath(n).suffix.lower() in SUFFIXES)
    return sorted(n for n in wanted if not n.startswith("__MACOSX/"))


def _listed(index: Path) -> tuple[Picture, ...]:
    """The pictures that a samples.json lists; ValueError where it is none."""
    content = read_json(index)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("file"), str) for e in entries
    ):
        raise ValueError(f"{index} lists no images: it should be written by sample.py")
    return tuple(Picture(e["file"], _seed_in(e), _prompt_in(e)) for e in entries)


def _with_rest(
    place: Path, names: Sequence[str], listed: tuple[Picture, ...]
) -> tuple[Picture, ...]:
    """The listed pictures, and those of `names` that say themselves that sample.py made them."""
    index = {picture.name for picture in listed}
    rest = []
    for name in (name for name in names if name not in index):
        try:
            recipe = _recipe_in(_chunks((place / name).read_bytes()))
        except UNREADABLE:
            continue
        if _seed_in(recipe) is not None:
            rest.append(Picture(name, _seed_in(recipe), _prompt_in(recipe)))
    return (*listed, *rest)


def subset(pictures: Pictures, count: int | None, seed: int) -> Pictures:
    """`count` of the pictures, drawn as EDM's fid.py draws them; ValueError for too few.

    All in their order where there are no more, or `count` is None.
    """
    there = len(pictures.items)
    if count is None or count == there:
        return pictures
    if count > there:
        raise ValueError(f"{pictures.place} has {there} images, not {count}: lower --num")
    order = np.arange(there)
    np.random.RandomState(seed % 2**31).shuffle(order)
    chosen = np.sort(order[:count])
    return replace(pictures, items=tuple(pictures.items[i] for i in chosen))


def identities(pictures: Pictures, which: Sequence[int]) -> dict[int, Identity | str]:
    """What the pictures `which` are, by their places; a reason where one cannot be read."""

    def identify(picture: Picture, content: bytes) -> Identity:
        recipe = _recipe_in(_chunks(content))
        seed, prompt = _seed_in(recipe), _prompt_in(recipe)
        differs = seed not in (None, picture.seed) or prompt not in (None, picture.prompt)
        disagrees = differs and (picture.seed, picture.prompt) != (None, None)
        seed = picture.seed if seed is None else seed
        stem = PurePosixPath(picture.name).stem
        if seed is None and stem.isdecimal():
            seed = int(stem)
        digest = hashlib.sha256(content).hexdigest()[:32]
        return Identity(digest, seed, picture.prompt if prompt is None else prompt, disagrees)

    return dict(_each(pictures, which, identify, AHEAD))


def _chunks(content: bytes) -> dict[str, Any]:
    """The text of an image file, whose pixels are not decoded."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return dict(image.info)


def _recipe_in(text: dict[str, Any]) -> dict[str, Any]:
    """What sample.py wrote into a picture; empty where it did not."""
    try:
        recipe = json.loads(text.get(RECIPE, "{}"))
    except (TypeError, ValueError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _seed_in(entry: dict[str, Any]) -> int | None:
    return entry["seed"] if isinstance(entry.get("seed"), int) else None


def _prompt_in(entry: dict[str, Any]) -> str | int | None:
    """The prompt, or the number of the class."""
    if isinstance(entry.get("prompt"), str):
        return entry["prompt"]
    return entry["class"] if isinstance(entry.get("class"), int) else None


@dataclass(frozen=True)
class Alike:
    """Pictures of one size, and which of the items they are."""

    which: list[int]
    images: Tensor  # [n, 3, H, W] uint8


def read_batches(
    pictures: Pictures, which: Sequence[int], *, batch: int, bad: dict[str, str] | None = None
) -> Iterator[Alike]:
    """Read the items `which`, up to `batch` of them at once, those of one size together.

    Grey is repeated to three channels, what is transparent shows white. What cannot be read goes
    into `bad`, with the reason, by its name; without `bad` it is a ValueError.
    """

    def read(picture: Picture, content: bytes) -> Tensor:
        where = str(pictures.place / picture.name)
        return read_image(io.BytesIO(content), where)[0].expand(3, -1, -1)

    group: list[tuple[int, Tensor]] = []
    for n, (i, pixels) in enumerate(_each(pictures, which, read, batch), 1):
        if not isinstance(pixels, str):
            group.append((i, pixels))
        elif bad is None:
            raise ValueError(f"{pixels} (--skip-bad leaves such images out)")
        else:
            bad[pictures.items[i].name] = pixels
        if n % batch == 0 or n == len(which):
            for size in dict.fromkeys(pixels.shape for _, pixels in group):
                alike = [(i, pixels) for i, pixels in group if pixels.shape == size]
                yield Alike([i for i, _ in alike], torch.stack([p for _, p in alike]))
            group.clear()


def _each(
    pictures: Pictures, which: Sequence[int], work: Callable[[Picture, bytes], R], batch: int
) -> Iterator[tuple[int, R | str]]:
    """What `work` makes of each file, in order, a batch ahead; a reason where one is broken."""
    parts = [which[i : i + batch] for i in range(0, len(which), batch)]
    with _opened(pictures.place) as read, ThreadPoolExecutor(THREADS) as pool:

        def done(i: int) -> R | str:
            picture = pictures.items[i]
            where = pictures.place / picture.name
            try:
                return work(picture, read(picture.name))
            except FileNotFoundError:
                return f"no such file: {where}"
            except UNREADABLE as error:
                reason = str(error)
                return (
                    reason
                    if reason.startswith(str(where))
                    else f"{where} is not a readable image: {reason}"
                )

        ahead = [pool.submit(done, i) for i in parts[0]] if parts else []
        for at, part in enumerate(parts):
            now = ahead
            ahead = [pool.submit(done, i) for i in parts[at + 1]] if at + 1 < len(parts) else []
            yield from ((i, one.result()) for i, one in zip(part, now, strict=True))


@contextmanager
def _opened(place: Path) -> Iterator[Reader]:
    """How to read a file by its name, while the block lasts."""
    if place.is_dir():
        yield lambda name: (place / name).read_bytes()
        return
    with zipfile.ZipFile(place) as archive:
        yield archive.read
