"""Figures as PNG, on no screen: a learned table, and the same seeds by several methods."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from src.files import read_json, write_atomically
from src.images import read_png
from src.options import OneLineCommand
from src.text import aligned

CELL = 0.8  # inches
SHOWN = 10
MODELS = Path(__file__).resolve().parent / "models"


def table_figure(
    places: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], sigmas: Sequence[float]
) -> Figure:
    """K points in each of N intervals: where on it, how large, red for a negative weight.

    places, weights: [N][K]; places in [0, 1] on the log-sigma axis. sigmas: N + 1 levels.
    """
    intervals = len(sigmas) - 1
    figure = Figure((7, 1.2 + 0.55 * intervals), layout="constrained")
    axes = figure.subplots()
    for n, (row, mix) in enumerate(zip(places, weights, strict=True)):
        axes.plot([0, 1], [n, n], color="0.8", zorder=1)
        for r, w in zip(row, mix, strict=True):
            size = min(60 + 300 * abs(w), 700)
            axes.scatter(r, n, size, "tab:blue" if w >= 0 else "tab:red", alpha=0.6, zorder=2)
            axes.annotate(f"{w:.2f}", (r, n), xytext=(0, 9), textcoords="offset points", size=7)
    names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(sigmas)]
    axes.set_yticks(range(intervals), names)
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(intervals - 0.5, -0.6)
    axes.set_xlabel("position r in the interval (log sigma), size and number: weight")
    axes.set_ylabel("sigma")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all. ValueError where it cannot be written."""
    with write_atomically(path) as temp:
        temp.write_bytes(png(figure))


def labelled_grid(rows: Sequence[tuple[str, Tensor]], heads: Sequence[str]) -> Figure:
    """Images under `heads`, a row for each method with its name at the left.

    rows: (name, images [N, C, H, W] in [0, 1]), C = 1 or 3; heads: N texts.
    """
    margin = 0.3 + 0.085 * max(len(name) for name, _ in rows)  # inches
    width, height = CELL * len(heads) + margin, CELL * (len(rows) + 0.5)
    figure = Figure((width, height))
    axes = figure.subplots(len(rows), len(heads), squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for cell, image in zip(line, images, strict=True):
            cell.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            cell.axis("off")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    for cell, head in zip(axes[0], heads, strict=True):
        cell.set_title("\n".join(textwrap.wrap(head, 14)[:2]), fontsize=7, pad=3)
    top = 1 - 0.45 * CELL / height
    figure.subplots_adjust(margin / width, 0.01, 0.995, top, wspace=0.04, hspace=0.04)
    return figure


def head_of(entry: Mapping[str, Any], model: str) -> str:
    """What an image of samples.json is of: its prompt, or the class by its name if it has one."""
    config = MODELS / model / "config.json"
    names = read_json(config).get("about", {}).get("classes", []) if config.exists() else []
    number = entry.get("class")
    name = names[number] if isinstance(number, int) and number < len(names) else f"class {number}"
    return str(entry.get("prompt") or name)


@click.command(cls=OneLineCommand)
@click.argument("folders", nargs=-1, required=True, metavar="[NAME=]FOLDER...")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .png to write.")
def main(folders: tuple[str, ...], output: Path) -> None:
    """Lay what sample.py wrote into folders side by side, and print how far each is from the last.

    Ten pictures are shown; the numbers are of all. A row without a NAME has its method's.

    \b
    python -m src.figures samples/euler EPD=samples/epd fine=samples/fine --output compared.png
    """  # noqa: D301
    rows, heads = [], []
    for name, _, folder in (text.rpartition("=") for text in folders):
        index = read_json(Path(folder) / "samples.json")
        recipe = index["recipe"]
        images = torch.stack([read_png(Path(folder) / e["file"])[0] for e in index["images"]])
        if rows and images.shape != rows[0][2].shape:
            raise ValueError(f"{folder} and {folders[0]} differ in seeds or size")
        heads = [head_of(entry, recipe["model"]) for entry in index["images"][:SHOWN]]
        method = Path(recipe["predictor"] or recipe["solver"]).stem
        rows.append((name or method, recipe["nfe"], images))
    shown = [(f"{name}, {nfe} calls", images[:SHOWN]) for name, nfe, images in rows]
    save(labelled_grid(shown, heads), output)
    lines = [("method", "calls", "RMSE of pixels in [-1, 1] to the last")]
    for name, nfe, images in rows:
        error = 2 * (images - rows[-1][2]).square().mean().sqrt().item()
        lines.append((name, str(nfe), f"{error:.3f}"))
    click.echo(f"{aligned(lines, (0, 2), rule=False)}\npicture: {output}")


if __name__ == "__main__":
    main()
