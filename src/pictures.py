"""Figures as PNG, on no screen, and the one drawing of a learned table."""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.files import write_atomically

LARGEST = 700.0


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
