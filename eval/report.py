"""Scores as aligned text, CSV and a plot."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from eval.measure import Score
from src.files import write_atomically, write_text

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


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first being the head -> lines; the first column left, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def table(scores: Sequence[Score]) -> str:
    """Every score with all that belongs to it, a line each."""
    head = ("solver", "NFE", "RMSE", "Frechet", "schedule", "AFS", "evaluations", "time")
    rows = [
        (
            s.name,
            str(s.nfe),
            number(s.rmse),
            number(s.frechet),
            s.schedule,
            "yes" if s.afs else "no",
            f"{s.rows:g}",
            f"{s.time:.2f}",
        )
        for s in scores
    ]
    return aligned([head, *rows])


def pivot(scores: Sequence[Score], absent: Sequence[str] = ()) -> str:
    """A line for every solver, RMSE and Frechet distance by NFE; the best of each has a star.

    `absent` names get a line of dashes. Rows are the network's evaluations for an image.
    """
    calls = sorted({s.nfe for s in scores})
    heads = (f"{what} @{n} " for what in ("RMSE", "FD") for n in calls)
    rows = [["solver", *heads, f"rows @{'/'.join(map(str, calls))}"]]
    best = {n: least([s for s in scores if s.nfe == n]) for n in calls}
    for name in [*dict.fromkeys(s.name for s in scores), *absent]:
        found = {s.nfe: s for s in scores if s.name == name}
        errors = [cell(found.get(n) and found[n].rmse, best[n][0]) for n in calls]
        distances = [cell(found.get(n) and found[n].frechet, best[n][1]) for n in calls]
        evaluations = (f"{found[n].rows:g}" if n in found else "-" for n in calls)
        rows.append([name, *errors, *distances, "/".join(evaluations)])
    return aligned(rows)


def ratios(scores: Sequence[Score]) -> str:
    """By NFE: the best learned solver, the best of one point, the best hand-made, by RMSE.

    A ratio is of the best learned one over the best hand-made. Rows are evaluations of the
    network for an image. "" where a table has not both kinds.
    """
    head = ("NFE", "best learned", "rows", "best of K=1", "rows", "best hand-made", "rows")
    lines: list[tuple[str, ...]] = []
    for n in sorted({s.nfe for s in scores}):
        there = [s for s in scores if s.nfe == n]
        learned = lowest([s for s in there if s.source])
        single = lowest([s for s in there if s.source and s.points == 1])
        rival = lowest([s for s in there if not s.source])
        if learned and rival:
            cells = (c for best in (learned, single, rival) for c in named_error(best))
            lines.append((str(n), *cells, f"{learned.rmse / rival.rmse:.3f}"))
    return aligned([(*head, "learned / hand-made"), *lines]) if lines else ""


def lowest(scores: Sequence[Score]) -> Score | None:
    """The one with the least error, if there is any; what is no number comes last."""
    return min(scores, key=lambda s: math.inf if math.isnan(s.rmse) else s.rmse, default=None)


def named_error(score: Score | None) -> tuple[str, str]:
    """A score's name with its error, and its rows; dashes for none."""
    return (f"{score.name} {number(score.rmse)}", f"{score.rows:g}") if score else ("-", "-")


def least(scores: Sequence[Score]) -> tuple[float, float | None]:
    """The least RMSE and the least Frechet distance."""
    distances = [s.frechet for s in scores if s.frechet is not None]
    return min(s.rmse for s in scores), min(distances, default=None)


def cell(value: float | None, best: float | None) -> str:
    """A figure, with a star where it is the best."""
    return number(value) + ("*" if value is not None and value == best else " ")


def number(value: float | None) -> str:
    """Three to four digits, or a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:#.4g}"


def write_csv(path: Path, scores: Sequence[Score]) -> None:
    """One line a score, under the names of its fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(s) for s in scores)
    write_text(path, text.getvalue())


def plot(path: Path, scores: Sequence[Score], title: str, floor: Mapping[str, float]) -> None:
    """RMSE by NFE, and beside it the Frechet distance where measured; axes in powers.

    Learned solvers are strong, hand-made ones pale; labels stand at the lines' ends. `floor`
    names horizontal lines of the Frechet panel.
    """
    with_distance = any(s.frechet is not None for s in scores)
    panels = 2 if with_distance else 1
    figure = Figure((SIZE[0] * panels, SIZE[1]), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    errors = [(s, s.rmse) for s in scores]
    panel(axes[0], errors, "RMSE to the fine solution", {})
    if with_distance:
        distances = [(s, s.frechet) for s in scores if s.frechet is not None]
        panel(axes[1], distances, "Frechet distance", floor)
    figure.suptitle(title, fontsize=11)
    with write_atomically(path) as temp:
        figure.savefig(temp, dpi=130)


def panel(
    axes: Axes, points: Sequence[tuple[Score, float]], what: str, floor: Mapping[str, float]
) -> None:
    """One quantity by NFE."""
    axes.set_yscale("log")
    axes.set(xlabel="sequential network calls (NFE)", ylabel=what)
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
    for name, value in floor.items():
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
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else NARROW_TICKS))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(
    axes: Axes, ends: Sequence[tuple[str, float, float]], colours: Mapping[str, str]
) -> None:
    """Names beside the last points of their lines, moved apart, each with a thin leader."""
    low, high = (math.log(v) for v in axes.get_ylim())
    ordered = sorted(ends, key=lambda end: end[2])
    heights = spread([(math.log(end[2]) - low) / (high - low) for end in ordered], LABEL_GAP)
    first, last = axes.get_xlim()
    at = max(end[1] for end in ends) + 0.05 * (last - first)
    for (name, x, y), height in zip(ordered, heights, strict=True):
        place = math.exp(low + height * (high - low))
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
