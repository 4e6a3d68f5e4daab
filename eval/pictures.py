"""Pictures to measure: those of a folder or a zip, and what each says that it is.

sample.py writes into every PNG which seed and prompt it was made from, and an index, samples.json.
Where the two differ, the picture is believed. Pictures are read by threads ahead of the network.
Shapes: n pictures of one size, [n, 3, H, W] uint8.
"""

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
from src.samples import INDEX, differing, recipe_in

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
THREADS = 4
AHEAD = 256  # pictures whose texts are read at once
LARGEST = 1 << 28  # bytes of a picture in a zip, which may claim any number
UNREADABLE = (
    *(OSError, ValueError, KeyError, RuntimeError, SyntaxError, NotImplementedError),
    *(EOFError, struct.error, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError),
)

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

    A folder that has a samples.json has the pictures that it lists, and those of other seeds that
    say the same recipe: a stopped run's index may lag behind. Raises ValueError where
    there are none.
    """
    if not place.exists():
        raise ValueError(f"no such folder or file: {place}")
    folder = place.parent if place.suffix != ".zip" and place.is_file() else place
    if place.suffix == ".zip":
        try:
            with zipfile.ZipFile(place) as archive:
                names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{place} is no whole zip: {error}") from error
        files = (n for n in names if not n.startswith("__MACOSX/") and not n.endswith("/"))
        items = _pictures(files)
    elif place.is_file() and _is_picture(place.name):
        raise ValueError(f"{place} is one picture: give its folder")
    elif place.is_file():
        items = _listed(place)
    else:
        files = (p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir())
        items = _pictures(files)
        if (place / INDEX).is_file():
            listed = _listed(place / INDEX)
            there = {picture.name for picture in listed}
            rest = [i for i, picture in enumerate(items) if picture.name not in there]
            of_rest = identities(Pictures(place, tuple(items)), rest, by_recipe=True)
            recipe = read_json(place / INDEX).get("recipe")  # of all, where it says so
            by_seed: dict[int, Picture] = {}
            for i, one in of_rest.items():
                if not isinstance(one, Identity) or one.seed is None:
                    continue
                own = of_all(recipe_in(place / items[i].name))
                if not isinstance(recipe, dict) or not differing(own, of_all(recipe)):
                    by_seed.setdefault(one.seed, Picture(items[i].name, one.seed, one.prompt))
            seeds = {picture.seed for picture in listed}
            items = listed + [p for seed, p in by_seed.items() if seed not in seeds]
    items = [p for p in items if fnmatch(PurePosixPath(p.name).name, pattern)]
    if not items:
        which = "" if pattern == "*" else f" whose names match {pattern}"
        raise ValueError(f"no images in {place}{which}: PNG, JPEG, WebP, BMP, GIF, TIFF are read")
    return Pictures(folder, tuple(items))


def of_all(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what is of one picture."""
    return {name: v for name, v in recipe.items() if name not in ("seed", "prompt", "class")}


def _pictures(files: Iterable[str]) -> list[Picture]:
    """The pictures among the files, sorted; not the grids and strips that sample.py adds."""
    names = sorted(files)
    sampled = {path.parent for path in map(PurePosixPath, names) if path.name == INDEX}

    def is_added(path: PurePosixPath) -> bool:
        strip = path.parent.name == "trajectory" and not sampled.isdisjoint(path.parents)
        return strip or (path.name == "grid.png" and path.parent in sampled)

    return [Picture(n) for n in names if _is_picture(n) and not is_added(PurePosixPath(n))]


def _is_picture(name: str) -> bool:
    """By its name; a hidden file is what a killed run or another system left behind."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _listed(index: Path) -> list[Picture]:
    """The pictures that a samples.json lists; ValueError where it is none."""
    content = read_json(index)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("file"), str) for e in entries
    ):
        raise ValueError(f"{index} lists no images: it should be written by sample.py")
    return [Picture(e["file"], *_seed_and_prompt(e)) for e in entries]


def _seed_and_prompt(entry: dict[str, Any]) -> tuple[int | None, str | int | None]:
    """What an entry of samples.json, or a recipe, says; a prompt may be the number of a class."""
    seed, prompt, label = (entry.get(name) for name in ("seed", "prompt", "class"))
    text = prompt if isinstance(prompt, str) else label if isinstance(label, int) else None
    return seed if isinstance(seed, int) else None, text


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
    return replace(pictures, items=tuple(pictures.items[i] for i in np.sort(order[:count])))


def identities(
    pictures: Pictures, which: Sequence[int], *, by_recipe: bool = False
) -> dict[int, Identity | str]:
    """What the pictures `which` are, by their places; a reason where one cannot be read.

    The seed is the picture's own, else that of samples.json, else a number that is its name;
    `by_recipe`: the picture's own alone.
    """

    def identify(picture: Picture, content: bytes) -> Identity:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # its pixels are not read
            text = image.info.get("recipe", "{}")
        try:
            recipe = json.loads(text)
        except (TypeError, ValueError):
            recipe = {}
        seed, prompt = _seed_and_prompt(recipe if isinstance(recipe, dict) else {})
        listed = (picture.seed, picture.prompt)
        differs = seed not in (None, listed[0]) or prompt not in (None, listed[1])
        stem = PurePosixPath(picture.name).stem
        if seed is None and not by_recipe:
            by_name = int(stem) if stem.isdecimal() else None
            seed = by_name if picture.seed is None else picture.seed
        prompt = picture.prompt if prompt is None else prompt
        digest = hashlib.sha256(content).hexdigest()[:32]
        return Identity(digest, seed, prompt, differs and listed != (None, None))

    return dict(_each(pictures, which, identify, AHEAD))


@dataclass(frozen=True)
class Alike:
    """Pictures of one size, and which of the items they are."""

    which: list[int]
    images: Tensor  # [n, 3, H, W] uint8


def read_batches(
    pictures: Pictures,
    which: Sequence[int],
    *,
    batch: int,
    bad: dict[str, str] | None = None,
    hint: str = "",
) -> Iterator[Alike]:
    """Read the items `which`, up to `batch` of them at once, those of one size together.

    Grey is repeated to three channels, what is transparent shows white. What cannot be read goes
    into `bad`, with the reason, by its name; without, it is a ValueError that ends in `hint`.
    """

    def read(picture: Picture, content: bytes) -> Tensor:
        where = str(pictures.place / picture.name)
        return read_image(io.BytesIO(content), where)[0].expand(3, -1, -1)

    group: list[tuple[int, Tensor]] = []
    for n, (i, pixels) in enumerate(_each(pictures, which, read, batch), 1):
        if not isinstance(pixels, str):
            group.append((i, pixels))
        elif bad is None:
            raise ValueError(pixels + hint)
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
    with ExitStack() as stack:
        archive = None
        if not pictures.place.is_dir():
            archive = stack.enter_context(zipfile.ZipFile(pictures.place))
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))

        def done(i: int) -> R | str:
            picture = pictures.items[i]
            where = pictures.place / picture.name
            try:
                if archive and archive.getinfo(picture.name).file_size > LARGEST:
                    raise ValueError(f"it claims more than {LARGEST} bytes")
                return work(picture, archive.read(picture.name) if archive else where.read_bytes())
            except FileNotFoundError:
                return f"no such file: {where}"
            except UNREADABLE as error:
                reason = re.sub(r" image file <_io.*>", " it", str(error))
                named = reason.startswith(str(where))
                return reason if named else f"{where} is not a readable image: {reason}"

        ahead = [pool.submit(done, i) for i in parts[0]] if parts else []
        for at, part in enumerate(parts):
            now = ahead
            ahead = [pool.submit(done, i) for i in parts[at + 1]] if at + 1 < len(parts) else []
            yield from ((i, one.result()) for i, one in zip(part, now, strict=True))
