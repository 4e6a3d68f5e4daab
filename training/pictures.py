"""Pictures of a run: the learned table, and how loss and error went. matplotlib, on no screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from solvers.epd import Directions
from src.figures import save, table_figure
from training.distill import Table


def draw_table(table: Table, sigmas: Sequence[float], path: Path) -> None:
    """Positions and weights for each interval; see `src.figures.table_figure`."""
    mix = table.weight * table.dir_scale if isinstance(table, Directions) else table.weight
    save(table_figure(table.r.tolist(), mix.tolist(), sigmas), path)


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
