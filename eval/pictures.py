"""Pictures to measure: a folder, a zip, or what sample.py's samples.json lists.

They are read by threads ahead of the network. Shapes: n pictures alike, [n, 3, H, W] uint8.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from src.files import from_json, read_json
from src.images import read_image

INDEX = "samples.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
THREADS = 4

Opener = Callable[[str], IO[bytes]]


@dataclass(frozen=True)
class Picture:
    """One picture, and what samples.json says of it."""

    name: str  # relative to the folder, or in the zip
    seed: int | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures of one place, in the order of their names or as listed."""

    place: Path  # a folder or a zip
    items: tuple[Picture, ...]

    def stamp(self, item: Picture) -> str:
        """What changes when the file does: its size and time; a zip's for those inside."""
        file = self.place if self.place.is_file() else self.place / item.name
        try:
            found = file.stat()
        except OSError as error:
            raise ValueError(f"no such file: {file}") from error
        return f"{found.st_size}-{found.st_mtime_ns}"


def find_pictures(place: Path) -> Pictures:
    """The pictures of a folder, a zip or a samples.json; ValueError where there are none.

    Of a folder that has a samples.json, those that it lists.
    """
    if not place.exists():
        raise ValueError(f"no such folder or file: {place}")
    if place.suffix == ".zip":
        found = Pictures(place, tuple(map(Picture, names_in_zip(place))))
    elif place.is_file():
        found = Pictures(place.parent, listed(place))
    elif (place / INDEX).is_file():
        found = Pictures(place, listed(place / INDEX))
    else:
        files = (p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        names = sorted(p.relative_to(place).as_posix() for p in files)
        found = Pictures(place, tuple(map(Picture, names)))
    if not found.items:
        raise ValueError(f"no images in {place}: PNG, JPEG, WebP, BMP, GIF or TIFF are read")
    return found


def names_in_zip(path: Path) -> list[str]:
    """The pictures in a zip; ValueError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no whole zip: {error}") from error
    wanted = (n for n in names if PurePosixPath(n).suffix.lower() in SUFFIXES)
    return sorted(n for n in wanted if not n.startswith("__MACOSX/"))


def listed(index: Path) -> tuple[Picture, ...]:
    """The images of a samples.json; ValueError where it is not one."""
    content = read_json(index)
    entries = content.get("images") if isinstance(content, dict) else None
    pictures = [listed_one(e) for e in entries] if isinstance(entries, list) else [None]
    whole = tuple(p for p in pictures if p)
    if len(whole) < len(pictures):
        raise ValueError(f"{index} lists no images: it should be written by sample.py")
    return whole


def listed_one(entry: Any) -> Picture | None:
    """An entry of samples.json; None for another thing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        return None
    seed, prompt = entry.get("seed"), entry.get("prompt")
    return Picture(
        entry["file"],
        seed if isinstance(seed, int) else None,
        prompt if isinstance(prompt, str) else None,
    )


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


@contextmanager
def opened(place: Path) -> Iterator[Opener]:
    """How to open a picture by its name, while the block lasts."""
    if place.is_dir():
        yield lambda name: (place / name).open("rb")
        return
    with zipfile.ZipFile(place) as archive:
        yield lambda name: BytesIO(archive.read(name))


def read_picture(opener: Opener, place: Path, name: str) -> tuple[Tensor, dict[str, str]]:
    """-> a picture [3, H, W] uint8, grey repeated, on white, and its text chunks.

    ValueError, naming it, where it cannot be read.
    """
    where = f"{place / name}"
    try:
        with opener(name) as file:
            pixels, text = read_image(file, where)
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {where}") from error
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    return pixels.expand(3, -1, -1), text


def prompt_in(text: dict[str, str], name: str) -> str | None:
    """The prompt in the text chunks that sample.py writes; None where there is none."""
    if "recipe" not in text:
        return None
    recipe = from_json(text["recipe"], f"the recipe in {name}")
    prompt = recipe.get("prompt") if isinstance(recipe, dict) else None
    return prompt if isinstance(prompt, str) else None


@dataclass(frozen=True)
class Alike:
    """Pictures of one size, and which of the items they are."""

    which: list[int]
    images: Tensor  # [n, 3, H, W] uint8
    texts: list[dict[str, str]]

    def only(self, at: int) -> "Alike":
        """One of them."""
        return Alike([self.which[at]], self.images[at : at + 1], [self.texts[at]])


def read_batches(
    pictures: Pictures, which: Sequence[int], *, batch: int, bad: dict[str, str] | None = None
) -> Iterator[Alike]:
    """Read the items `which`, up to `batch` of them at once, those of one size together.

    The next batch is read while the caller works. What cannot be read goes into `bad`, with the
    reason, by its name; without `bad` it is a ValueError.
    """
    parts = [which[i : i + batch] for i in range(0, len(which), batch)]
    with opened(pictures.place) as opener, ThreadPoolExecutor(THREADS) as pool:

        def read(i: int) -> tuple[Tensor, dict[str, str]] | str:
            try:
                return read_picture(opener, pictures.place, pictures.items[i].name)
            except ValueError as error:
                return str(error)

        ahead = [pool.submit(read, i) for i in parts[0]] if parts else []
        for at, part in enumerate(parts):
            now = ahead
            ahead = [pool.submit(read, i) for i in parts[at + 1]] if at + 1 < len(parts) else []
            results = [(i, one.result()) for i, one in zip(part, now, strict=True)]
            yield from grouped(pictures, results, bad)


def grouped(
    pictures: Pictures,
    results: Sequence[tuple[int, tuple[Tensor, dict[str, str]] | str]],
    bad: dict[str, str] | None,
) -> Iterator[Alike]:
    """What was read, by size; a reason in place of a picture goes into `bad`."""
    sizes: dict[torch.Size, list[tuple[int, Tensor, dict[str, str]]]] = {}
    for i, result in results:
        if not isinstance(result, str):
            sizes.setdefault(result[0].shape, []).append((i, *result))
        elif bad is None:
            raise ValueError(f"{result} (--skip-bad leaves such images out)")
        else:
            bad[pictures.items[i].name] = result
    for alike in sizes.values():
        which, images, texts = zip(*alike, strict=True)
        yield Alike(list(which), torch.stack(images), list(texts))
