"""A comparison as text, CSV, curves, and a page of HTML that needs nothing else."""

import base64
import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from torch import Tensor

from eval.measure import Score
from src.figures import png
from src.files import write_text
from src.images import grid, png_bytes
from src.stats import Estimate
from src.text import aligned, number

COLOURS = ("#c1121f", "#003f88", "#0f7b3f", "#7b2cbf", "#e36414", "#00798c", "#8a5a00")
COLOURED = 6  # curves
PANEL = (6.0, 4.6)  # inches
NESTED = ("rewards", "gains", "frechets", "left_out")
NARROW_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Metric:
    """One quantity of the scores: its cell as text, what is compared, and which end is better."""

    name: str
    cell: Callable[[Score], str]
    value: Callable[[Score], float | None]
    less: bool = True

    def values(self, scores: Sequence[Score]) -> list[tuple[float, Score]]:
        """The scores that have a number, each behind it."""
        return [(v, s) for s in scores if (v := self.value(s)) is not None and not math.isnan(v)]

    def best(self, scores: Sequence[Score]) -> tuple[float, Score] | None:
        """The best score behind its number; what is no number is never the best."""
        pick = min if self.less else max
        return pick(self.values(scores), key=lambda pair: pair[0], default=None)


def metrics_of(scores: Sequence[Score]) -> list[Metric]:
    """What was measured: the error, Frechet distances, rewards."""
    spaces = list(dict.fromkeys(name for s in scores for name in s.frechets))
    rewards = list(dict.fromkeys(name for s in scores for name in s.rewards))

    def distance(name: str) -> Metric:
        title = "Frechet" if len(spaces) == 1 else f"Frechet {name}"

        def value(score: Score) -> float | None:
            """No number for a table that was fitted in these features: it is not compared."""
            frechet = score.frechets.get(name)
            return None if frechet is None or frechet.trained_on else frechet.value

        return Metric(title, lambda s: str(s.frechets.get(name, "-")), value)

    def reward(name: str) -> Metric:
        return Metric(
            name,
            lambda s: str(s.rewards.get(name, "-")),
            lambda s: s.rewards[name].value if name in s.rewards else None,
            less=False,
        )

    error = Metric("RMSE", error_of, lambda s: s.rmse)
    likeness = [
        Metric("precision", lambda s: number(s.precision), lambda s: s.precision, less=False),
        Metric("recall", lambda s: number(s.recall), lambda s: s.recall, less=False),
    ]
    likeness = [m for m in likeness if any(m.value(s) is not None for s in scores)]
    return [error, *map(distance, spaces), *likeness, *map(reward, rewards)]


def error_of(score: Score) -> str:
    """The RMSE with its interval, where it has one."""
    if score.rmse_low is None or score.rmse_high is None:
        return number(score.rmse)
    return str(Estimate(score.rmse, score.rmse_low, score.rmse_high))


def table(scores: Sequence[Score]) -> str:
    """Every score with all that belongs to it, a line each; 95 % intervals in brackets."""
    metrics = metrics_of(scores)
    head = ("solver", "NFE", *(m.name for m in metrics), "schedule", "AFS", "evaluations", "time")
    rows = [
        (
            *(s.name, str(s.nfe), *(m.cell(s) for m in metrics), s.schedule),
            *("yes" if s.afs else "no", f"{s.evaluations or s.rows:g}", f"{s.time:.2f}"),
        )
        for s in scores
    ]
    return aligned([head, *rows])


def ratios(scores: Sequence[Score], metric: Metric) -> str:
    """By NFE: the best learned solver, the best of one point, the best hand-made, by a metric.

    A ratio is of the best learned one over the best hand-made. Rows are evaluations of the
    network for an image, with those that guidance takes. "" where a table has not both kinds.
    """
    head = ("NFE", "best learned", "rows", "best of K=1", "rows", "best hand-made", "rows")
    lines: list[tuple[str, ...]] = []
    for n in sorted({s.nfe for s in scores}):
        learned = [s for s in scores if s.nfe == n and s.source]
        by_hand = metric.best([s for s in scores if s.nfe == n and not s.source])
        ours, single = metric.best(learned), metric.best([s for s in learned if s.points == 1])
        if ours and by_hand:
            cells: list[str] = []
            for best in (ours, single, by_hand):
                text = f"{best[1].name} {number(best[0])}" if best else "-"
                cells += text, f"{best[1].evaluations or best[1].rows:g}" if best else "-"
            ratio = f"{ours[0] / by_hand[0]:.3f}" if by_hand[0] else "-"
            lines.append((str(n), *cells, ratio))
    return aligned([(*head, f"{metric.name}: learned / hand-made"), *lines]) if lines else ""


def missing(scores: Sequence[Score]) -> list[str]:
    """What the scores are without and why, a line each."""
    return [
        f"{s.name}, {s.nfe} calls, without {what}: {why}"
        for s in scores
        for what, why in s.left_out.items()
    ]


def write_csv(path: Path, scores: Sequence[Score]) -> None:
    """One line a score, under the names of its fields; three columns a reward and a space."""
    plain = [f.name for f in fields(Score) if f.name not in NESTED]
    rewards = list(dict.fromkeys(name for s in scores for name in s.rewards))
    spaces = list(dict.fromkeys(name for s in scores for name in s.frechets))
    rows = []
    for score in scores:
        row = {name: getattr(score, name) for name in plain}
        for name in rewards:
            ends = ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high"))
            row |= {key: getattr(score.rewards.get(name), end, None) for key, end in ends}
        for name in (f"frechet {space}" for space in spaces):
            of = score.frechets.get(name.removeprefix("frechet "))
            row[name] = getattr(of, "value", None)
            row |= {f"{name} {end}": getattr(of, end, None) for end in ("spread", "trained_on")}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else plain, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def curves(scores: Sequence[Score], title: str, fine: Score) -> Figure:
    """Every quantity by the number of calls, a panel each.

    The best few curves are in colour, learned ones thicker; all others are grey. A black
    triangle is the fine solution.
    """
    metrics = metrics_of(scores)
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    size = (PANEL[0] * columns + 2.2, PANEL[1] * rows)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    colours = dict(zip(best_names(scores, metrics[:2]), COLOURS, strict=False))
    for metric, place in zip(metrics, axes, strict=False):
        _draw(place, metric, scores, colours, fine)
    for place in axes[len(metrics) :]:
        place.axis("off")
    handles = {line.get_label(): line for place in axes for line in place.get_lines()}
    named = {n: h for n, h in handles.items() if not str(n).startswith("_")}
    figure.legend(named.values(), [str(n) for n in named], loc="outside right upper")
    figure.suptitle(title, fontsize=11)
    return figure


def best_names(scores: Sequence[Score], metrics: Sequence[Metric]) -> list[str]:
    """The solvers that are the best of their kind at some calls, those most often so first."""
    wins: Counter[str] = Counter()
    for metric in metrics:
        for kind in {(s.nfe, bool(s.source)) for s in scores}:
            values = metric.values([s for s in scores if (s.nfe, bool(s.source)) == kind])
            best = metric.best([s for _, s in values])
            wins.update(s.name for v, s in values if best and v == best[0])
    return [name for name, _ in wins.most_common(COLOURED)]


def _draw(
    axes: Axes, metric: Metric, scores: Sequence[Score], colours: Mapping[str, str], fine: Score
) -> None:
    """One quantity by NFE."""
    axes.set(xlabel="sequential network calls (NFE)", ylabel=metric.name)
    learned = {s.name for s in scores if s.source}
    for name in dict.fromkeys(s.name for s in scores):
        points = [
            (s.nfe, v) for s in scores if s.name == name and (v := metric.value(s)) is not None
        ]
        if points:
            colour, order = colours.get(name, "0.8"), 2 + (name in colours)
            label = name if name in colours else "others"
            width = 2.4 if name in learned and name in colours else 1.2
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, "o-", color=colour, lw=width, ms=4, zorder=order, label=label)
    calls = sorted({s.nfe for s in scores})
    if floor := metric.value(fine):
        beside = calls[-1] + 0.06 * max(calls[-1] - calls[0], 1)
        axes.plot([beside], [floor], "k<", ms=7, label="fine solution")
    axes.set_xticks(calls, [str(n) for n in calls])
    axes.grid(True, which="both", color="0.92", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if metric.less:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        ticks = (1, 2, 5) if high > 10 * low else NARROW_TICKS
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())


Strip: TypeAlias = tuple[str, int, Tensor]
"""A solver, its calls, and its images [n, C, H, W] in [0, 1] of the first jobs."""


def page(
    scores: Sequence[Score],
    fine: Score,
    strips: Sequence[Strip],
    tables: Mapping[str, Figure],
    curve: Figure,
    *,
    title: str,
    facts: Mapping[str, str],
    meaning: Mapping[str, str],
    subjects: str,
) -> str:
    """The text of report.html.

    strips: the same jobs under every candidate, the fine solution last; tables: drawn tables by
    name; facts, meaning: what is said of the comparison and of its figures, by name; subjects:
    what the columns of the strips are.
    """
    calls = sorted({s.nfe for s in scores})
    lines = list(dict.fromkeys((s.name, bool(s.source)) for s in scores))
    matrices = []
    for metric in metrics_of(scores):
        better = "lower" if metric.less else "higher"
        caption = f"{metric.name}: {better} is better."
        if metric.value(fine):
            caption += f" The fine solution has {metric.cell(fine)}."
        top = {n: (metric.best([s for s in scores if s.nfe == n]) or (None,))[0] for n in calls}
        cells = {(s.name, s.nfe): (metric.cell(s), metric.value(s) == top[s.nfe]) for s in scores}
        matrices.append((caption, cells))
    for name in dict.fromkeys(name for s in scores for name in s.gains):
        caption = (
            f"{name}, minus that of the fine solution of the same seed and prompt. Bold: zero "
        )
        gains = {(s.name, s.nfe): s.gains[name] for s in scores if name in s.gains}
        cells = {key: (str(gain), not gain.low <= 0 <= gain.high) for key, gain in gains.items()}
        matrices.append((caption + "is outside of the interval.", cells))
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=folder, autoescape=True).get_template("report.html")
    *others, last = [
        (name, nfe, _data(png_bytes(grid(images.cpu().float(), len(images), 2))))
        for name, nfe, images in strips
    ]
    return template.render(
        calls=calls,
        lines=lines,
        matrices=matrices,
        curve=_data(png(curve)),
        strips=others,
        fine=last,
        tables={name: _data(png(figure)) for name, figure in tables.items()},
        title=title,
        facts=facts,
        missing=missing((fine, *scores)),
        meaning=meaning,
        subjects=subjects,
    )


def _data(content: bytes) -> str:
    """A PNG within the page."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
