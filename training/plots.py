"""Plots of a run: the learned table, how loss and error went, and what a reward gained."""

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


def draw_gains(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture of each score's gain over the start by the step, with its 95 % interval."""
    ending = "_gain"  # a reward's own name may end so, but has no interval
    gains = dict.fromkeys(n for r in records for n in r if n.endswith(ending) and f"{n}_low" in r)
    if not gains:
        return
    figure = Figure((4 * len(gains), 3.5), layout="constrained")
    for axes, gain in zip(figure.subplots(1, len(gains), squeeze=False)[0], gains, strict=True):
        rows = [r for r in records if gain in r]
        steps, values, low, high = (
            [r[name] for r in rows] for name in ("step", gain, f"{gain}_low", f"{gain}_high")
        )
        axes.fill_between(steps, low, high, alpha=0.2)
        axes.plot(steps, values, marker=".")
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.locator_params(axis="x", integer=True)
        axes.set(title=gain[5:-5], xlabel="step", ylabel="gain over the start, held out")
    save(figure, path)
