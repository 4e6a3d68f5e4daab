"""Pictures of a run: the learned table, and how loss and error went. matplotlib, on no screen."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from solvers.epd import Directions
from src.files import write_atomically
from training.distill import Table

LARGEST = 700.0


def draw_table(table: Table, sigmas: Sequence[float], path: Path) -> None:
    """Positions and weights for each interval: where on it, how large, red for a negative."""
    intervals = len(sigmas) - 1
    figure = Figure((7, 1.2 + 0.55 * intervals), layout="constrained")
    axes = figure.subplots()
    mix = table.weight * table.dir_scale if isinstance(table, Directions) else table.weight
    for n, (places, weights) in enumerate(zip(table.r.tolist(), mix.tolist(), strict=True)):
        axes.plot([0, 1], [n, n], color="0.8", zorder=1)
        for r, w in zip(places, weights, strict=True):
            size = min(60 + 300 * abs(w), LARGEST)
            axes.scatter(r, n, size, "tab:blue" if w >= 0 else "tab:red", alpha=0.6, zorder=2)
            axes.annotate(f"{w:.2f}", (r, n), xytext=(0, 9), textcoords="offset points", size=7)
    names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(sigmas)]
    axes.set_yticks(range(intervals), names)
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(intervals - 0.5, -0.6)
    axes.set_xlabel("position r in the interval (log sigma), size and number: weight")
    axes.set_ylabel("sigma")
    save(figure, path)


def draw_losses(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and errors by the number of trajectories, or by the tick where that stands still."""
    figure = Figure((7, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, records, ("loss", "rmse_train"))
    draw(right, records, ("rmse_teacher", "rmse_fine"))
    left.set_title("learning")
    right.set_title("on seeds apart from training")
    save(figure, path)


def draw(axes: Axes, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One line for each name that the records have."""
    for name in names:
        points = [(record["step"], record[name]) for record in records if record.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
            axes.set_yscale("log")
            axes.legend()
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("tick")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with write_atomically(path) as temp:
        temp.write_bytes(buffer.getvalue())
