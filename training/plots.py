"""Plots of a run: the learned table, and how loss and error went."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from solvers.epd import Directions
from solvers.predictor import Predictor
from src.figures import save, table_figure


def draw_table(predictor: Predictor, sigmas: Sequence[float], path: Path) -> None:
    """Write a picture of positions and weights for each interval."""
    table = predictor.table
    mix = table.weight * table.dir_scale if isinstance(table, Directions) else table.weight
    save(table_figure(table.r.tolist(), mix.tolist(), sigmas), path)


def draw_losses(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture of loss and errors by the tick."""
    figure = Figure((7, 4), layout="constrained")
    titles = {"learning": ("loss", "rmse_judged"), "on seeds apart": ("rmse_teacher", "rmse_fine")}
    for axes, (title, names) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axes.set_title(title)
        for name in names:
            points = [(record["step"], record[name]) for record in records if record.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                axes.set_yscale("log")
                axes.legend()
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("tick")
    save(figure, path)
