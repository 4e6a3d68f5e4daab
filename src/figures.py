"""Figures as PNG, on no screen: a learned table, and the same seeds by several methods."""

import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import click
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from src.files import read_json, write_atomically
from src.images import read_png
from src.options import OneLineCommand, one_line_errors

LARGEST = 700.0
CELL = 0.8  # inches


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
            size = min(60 + 300 * abs(w), LARGEST)
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
    """Write a PNG whole or not at all."""
    with write_atomically(path) as temp:
        temp.write_bytes(png(figure))


def labelled_grid(rows: Sequence[tuple[str, Tensor]], heads: Sequence[str]) -> Figure:
    """Images under `heads`, a row for each method with its name at the left.

    rows: (name, images [N, C, H, W] in [0, 1]), C = 1 or 3; heads: N texts.
    """
    count = len(heads)
    figure = Figure((CELL * (count + 2.6), CELL * (len(rows) + 0.5)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for cell, image in zip(line, images, strict=True):
            cell.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            cell.axis("off")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    for cell, head in zip(axes[0], heads, strict=True):
        cell.set_title("\n".join(textwrap.wrap(head, 14)[:2]), fontsize=7, pad=3)
    left, top = 2.5 / (count + 2.6), 1 - 0.45 / (len(rows) + 0.5)
    figure.subplots_adjust(left, 0.01, 0.995, top, wspace=0.04, hspace=0.04)
    return figure


@click.command(cls=OneLineCommand)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .png to write.")
@one_line_errors
def main(folders: tuple[Path, ...], output: Path) -> None:
    """Lay what sample.py wrote into FOLDERS side by side, and print how far each is from the last.

    \b
    python -m src.figures samples/euler samples/epd samples/fine --output compared.png
    """  # noqa: D301
    rows, heads = [], []
    for folder in folders:
        index = read_json(folder / "samples.json")
        recipe = index["recipe"]
        images = torch.stack([read_png(folder / e["file"])[0] for e in index["images"]])
        if rows and images.shape != rows[0][2].shape:
            raise ValueError(f"{folder} and {folders[0]} differ in seeds or size")
        heads = [str(e.get("prompt") or f"class {e.get('class')}") for e in index["images"]]
        method = Path(recipe["predictor"] or recipe["solver"]).stem
        rows.append((method, recipe["nfe"], images))
    save(labelled_grid([(f"{name}, {nfe} calls", x) for name, nfe, x in rows], heads), output)
    click.echo(f"{'method':28} calls   RMSE of pixels in [-1, 1] to the last")
    for name, nfe, images in rows:
        error = 2 * (images - rows[-1][2]).square().mean().sqrt().item()
        click.echo(f"{name:28} {nfe:5}   {error:.3f}")
    click.echo(f"picture: {output}")


if __name__ == "__main__":
    main()
