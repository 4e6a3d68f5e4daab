"""A folder of sampled pictures: named by seed, each of which says what it is of.

What a picture says in its text chunk `recipe` counts; samples.json lists what they say.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from src.files import from_json, read_json, to_json, write_json
from src.images import grid, png_text, read_png, save_png

INDEX = "samples.json"
Subject: TypeAlias = str | int | None
"""A prompt, the number of a class, or neither."""


@dataclass(frozen=True)
class Samples:
    """A folder for pictures of one recipe; `about` is all but a picture's seed and subject.

    `subdirs` makes a folder for every thousand seeds.
    """

    folder: Path
    about: dict[str, Any]
    subdirs: bool = False

    def path(self, seed: int) -> Path:
        """Where the picture of a seed lies."""
        folder = self.folder / f"{seed - seed % 1000:06d}" if self.subdirs else self.folder
        return folder / f"{seed:06d}.png"

    def recipe(self, seed: int, subject: Subject) -> dict[str, Any]:
        """What the picture of a seed says of itself."""
        key = "prompt" if isinstance(subject, str) else "class"
        return plain(self.about | {"seed": seed, key: subject})

    def write(
        self, names: Sequence[tuple[int, Subject]], images: Tensor, steps: Sequence[Tensor]
    ) -> None:
        """Write pictures [B, C, H, W] of B (seed, subject), and if there are such, their steps.

        The steps towards a picture make a strip in trajectory/. ValueError for NaN and infinity.
        """
        for i, (seed, subject) in enumerate(names):
            path, image = self.path(seed), images[i].cpu()
            if not image.isfinite().all():
                raise ValueError(f"seed {seed} became NaN or infinite: try --dtype float32")
            if steps:
                strip = grid(torch.stack([step[i] for step in steps]), len(steps))
                save_png(self.strip(path), strip)
            save_png(path, image, {"recipe": self.recipe(seed, subject)})

    def strip(self, path: Path) -> Path:
        """Where the steps towards a picture are."""
        return path.parent / "trajectory" / path.name

    def missing(self, wanted: Iterable[tuple[int, Subject]], strips: bool = False) -> set[int]:
        """Which seeds of these (seed, subject) have no picture yet; samples.json is brought up.

        With `strips` those too that lack the steps towards it.
        ValueError where the folder, or a picture in the place of one, is of something else, and
        where pictures lie in sub-folders without `subdirs`, or the other way about.
        """
        index = self.folder / INDEX
        written = read_json(index) if index.exists() else {"recipe": plain(self.about)}
        own = written.get("recipe") if isinstance(written, dict) else None
        if not isinstance(own, dict) or differing(own, plain(self.about)):
            raise ValueError(f"{index} tells of another recipe than this: choose another --outdir")
        other = "[0-9]*.png" if self.subdirs else "[0-9][0-9][0-9]*000/[0-9]*.png"
        if there := next(self.folder.glob(other), None):
            change = "leave --subdirs out" if self.subdirs else "add --subdirs"
            raise ValueError(f"{there} is there already: {change}, or choose another --outdir")
        lacking = set()
        for seed, subject in wanted:
            path, recipe = self.path(seed), self.recipe(seed, subject)
            if not path.exists():
                lacking.add(seed)
                continue
            own = recipe_in(path)
            for name in differing(own, recipe):
                other = f"says {name} {own.get(name)!r}, this would be {recipe[name]!r}"
                raise ValueError(f"{path} {other}: choose another --outdir")
            if strips and not self.strip(path).exists():
                lacking.add(seed)
        self.write_index()
        return lacking

    def write_index(self) -> None:
        """List every picture of the recipe that is there, by what it says itself."""
        images = []
        for path in self.folder.glob("*/[0-9]*.png" if self.subdirs else "[0-9]*.png"):
            own = recipe_in(path)
            subject = own.get("prompt", own.get("class"))
            if own and not differing(own, self.recipe(own.get("seed", -1), subject)):
                key = "prompt" if isinstance(subject, str) else "class"
                file = path.relative_to(self.folder).as_posix()
                images.append({"file": file, "seed": own["seed"], key: subject})
        images.sort(key=lambda entry: entry["seed"])
        write_json(self.folder / INDEX, {"recipe": self.about, "images": images})

    def write_grid(self, seeds: Iterable[int]) -> None:
        """Lay the pictures of these seeds side by side, in grid.png."""
        images = torch.stack([read_png(self.path(seed))[0] for seed in seeds])
        save_png(self.folder / "grid.png", grid(images, gap=2))


def usual_folder(about: Mapping[str, Any]) -> Path:
    """The place samples/MODEL/METHOD; a dot may be of a name (3.5-medium), and not of a suffix."""
    model, method = (
        path.stem if path.suffix in (".pkl", ".json", ".ckpt", ".safetensors") else path.name
        for path in (Path(about["model"]), Path(about["predictor"] or about["solver"]))
    )
    return Path("samples") / model / f"{method}_nfe{about['nfe']}"


def differing(own: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What a picture's recipe says otherwise than another; older ones do not say their table."""
    names = dict.fromkeys([*recipe, *own])
    return [n for n in names if own.get(n) != recipe.get(n) and (n in own or n != "table")]


def recipe_in(path: Path) -> dict[str, Any]:
    """What a PNG says of itself, nothing if it says nothing; ValueError if it is no PNG."""
    recipe = from_json(png_text(path).get("recipe", "{}"), str(path))
    return recipe if isinstance(recipe, dict) else {}


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it is read again from a file: tuples have become lists."""
    return from_json(to_json(value), INDEX)
