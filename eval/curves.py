"""Scores as curves by the number of calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from eval.measure import Score
from eval.report import reward_names
from src.files import write_atomically

SIZE = (7.6, 6.0)  # inches a panel
LABEL_GAP = 0.034  # of the panel's height, between the lines of labels
ROOM = 1.06 / 1.44
NARROW_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)
LEADER = {"arrowstyle": "-", "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 1}
MUTED = (
    *("#9bb8d3", "#f2b888", "#a7cfa0", "#e5a3a3", "#c5b0d5", "#c49c94"),
    *("#f0b6d8", "#a0a0a0", "#cfcf7a", "#8fd0d8", "#d8b365", "#7fa8a0"),
)
STRONG = ("#c1121f", "#003f88", "#0f7b3f", "#7b2cbf", "#e36414", "#00798c", "#000000", "#8a5a00")


@dataclass(frozen=True)
class Panel:
    """One quantity of the plot; `floor` names horizontal lines."""

    what: str
    points: Sequence[tuple[Score, float]]
    scale: str
    floor: Mapping[str, float]


def plot(
    path: Path,
    scores: Sequence[Score],
    title: str,
    floor: Mapping[str, float],
    fine: Score | None = None,
) -> None:
    """RMSE by NFE, and beside it what else was measured: Frechet distance and rewards.

    Learned solvers are strong, hand-made ones pale; labels stand at the lines' ends. `floor`
    names horizontal lines of the Frechet panel; rewards have that of the fine solution.
    """
    panels = [Panel("RMSE to the fine solution", [(s, s.rmse) for s in scores], "log", {})]
    distances = [(s, s.frechet) for s in scores if s.frechet is not None]
    if distances:
        panels.append(Panel("Frechet distance", distances, "log", floor))
    for name in reward_names(scores):
        points = [(s, s.rewards[name].value) for s in scores if name in s.rewards]
        known = fine.rewards.get(name) if fine else None
        lines = {"fine solution": known.value} if known else {}
        panels.append(Panel(f"{name}, higher is better", points, "linear", lines))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure((SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for one, place in zip(panels, axes, strict=False):
        draw(place, one)
    for place in axes[len(panels) :]:
        place.axis("off")
    figure.suptitle(title, fontsize=11)
    with write_atomically(path) as temp:
        figure.savefig(temp, dpi=130)


def draw(axes: Axes, panel: Panel) -> None:
    """One quantity by NFE."""
    points = panel.points
    axes.set_yscale(panel.scale)
    axes.set(xlabel="sequential network calls (NFE)", ylabel=panel.what)
    names = list(dict.fromkeys(s.name for s, _ in points))
    colours = palette([(n, any(s.source for s, _ in points if s.name == n)) for n in names])
    ends: list[tuple[str, float, float]] = []
    for name in names:
        line = sorted((s.nfe, value) for s, value in points if s.name == name)
        strong = colours[name] in STRONG
        width, size, order = (2.2, 6, 3) if strong else (1.2, 4, 2)
        axes.plot(
            *zip(*line, strict=True), "o-", color=colours[name], lw=width, ms=size, zorder=order
        )
        ends.append((name, *line[-1]))
    for name, value in panel.floor.items():
        axes.axhline(value, 0, ROOM, color="0.35", lw=1, ls=":", zorder=1)
        axes.annotate(name, (0, value), (4, 2), xycoords=("axes fraction", "data"), fontsize=8,
                      textcoords="offset points", color="0.35")  # fmt: skip
    finish(axes, sorted({s.nfe for s, _ in points}))
    label_ends(axes, ends, colours)


def palette(names: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """Strong colours for the learned, pale ones for the hand-made."""
    learned = [name for name, is_learned in names if is_learned]
    others = [name for name, is_learned in names if not is_learned]
    strong = {name: STRONG[i % len(STRONG)] for i, name in enumerate(learned)}
    return strong | {name: MUTED[i % len(MUTED)] for i, name in enumerate(others)}


def finish(axes: Axes, calls: Sequence[int]) -> None:
    """Ticks at the numbers of calls that there are, room for labels, a light grid."""
    axes.set_xticks(calls, [str(n) for n in calls])
    first, last = calls[0], calls[-1]
    span = max(last - first, 1)
    axes.set_xlim(first - 0.06 * span, last + 0.38 * span)  # the lines take ROOM of it
    axes.grid(True, which="both", color="0.92", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else NARROW_TICKS))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_ends(
    axes: Axes, ends: Sequence[tuple[str, float, float]], colours: Mapping[str, str]
) -> None:
    """Names beside the last points of their lines, moved apart, each with a thin leader."""
    to_panel = axes.transScale + axes.transLimits
    ordered = sorted(ends, key=lambda end: end[2])
    heights = spread([to_panel.transform((x, y))[1] for _, x, y in ordered], LABEL_GAP)
    first, last = axes.get_xlim()
    at = max(end[1] for end in ends) + 0.05 * (last - first)
    for (name, x, y), height in zip(ordered, heights, strict=True):
        place = to_panel.inverted().transform((0, height))[1]
        colour = colours[name]
        strong = colour in STRONG
        axes.annotate(
            name, (x, y), (at, place), fontsize=9, va="center", annotation_clip=False,
            color=colour if strong else "0.3", weight="bold" if strong else "normal",
            arrowprops={**LEADER, "color": colour},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places in [0, 1], moved as little as may be until each is `gap` above the last.

    Pools neighbours that overlap around their common middle (isotonic regression), and closes
    the gap where so many do not fit.
    """
    gap = min(gap, 1 / max(len(places) - 1, 1))
    groups: list[tuple[float, int]] = []  # the sum of (place - index * gap), and how many
    for i, place in enumerate(places):
        total, count = place - i * gap, 1
        while groups and groups[-1][0] / groups[-1][1] > total / count:
            before, more = groups.pop()
            total, count = total + before, count + more
        groups.append((total, count))
    highest = 1 - (len(places) - 1) * gap
    bases = [total / count for total, count in groups for _ in range(count)]
    return [min(max(base, 0.0), highest) + i * gap for i, base in enumerate(bases)]
