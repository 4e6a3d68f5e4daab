"""A comparison as one page of HTML that needs nothing else: no script, no file beside it."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from backends.generate import Job, generate
from eval.candidates import Candidate
from eval.measure import Score, Study
from eval.report import error_of, interval, number, reward_names
from solvers.epd import Directions
from src.figures import png, table_figure
from src.images import grid, png_bytes
from src.intervals import Estimate

SHOWN = 8
GAP = 2
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin-bottom: .3rem; } figure, .wide { margin: 0 0 1.2rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: normal; }
thead th { border-bottom: 1px solid #888; font-weight: bold; }
tr.learned { background: #eef4fb; } td.best { font-weight: bold; }
small { color: #666; font-weight: normal; }
.curves { width: 100%; } .strip { height: 4.5rem; image-rendering: pixelated; display: block; }
.strips td { padding: .1rem .7rem; } dt { font-weight: bold; float: left; clear: left;
  min-width: 9rem; } dd { margin-left: 9.5rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem; }
.tables img { max-width: 34rem; width: 100%; }
"""


@dataclass(frozen=True)
class Strip:
    """The images of the first jobs under one solver."""

    name: str
    nfe: int
    images: Tensor  # [n, C, H, W] in [0, 1]


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    title: str
    facts: Mapping[str, str]
    scores: Sequence[Score]
    fine: Score
    curves: Path  # a PNG
    strips: Sequence[Strip]
    jobs: Sequence[Job]  # of the strips
    tables: Mapping[str, bytes]  # PNGs of learned tables, by name
    meaning: Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """One quantity: its cell, what is compared, and whether less of it is better."""

    name: str
    cell: Callable[[Score], str]
    value: Callable[[Score], float | None]
    less: bool


def strips(study: Study, candidates: Sequence[Candidate], count: int = SHOWN) -> list[Strip]:
    """The first `count` images under each candidate, the fine solution last."""
    jobs = study.jobs[:count]
    return [
        Strip(c.name, c.nfe, next(generate(study.backend, c.method, jobs, batch=len(jobs))).images)
        for c in (*candidates, study.fine)
    ]


def drawn_tables(candidates: Sequence[Candidate]) -> dict[str, bytes]:
    """The learned tables of those that have one, as PNGs by name and calls."""
    found = {}
    for candidate in candidates:
        table = candidate.method.table
        if table is not None:
            mix = table.weight * table.dir_scale if isinstance(table, Directions) else table.weight
            sigmas = candidate.method.sigmas.tolist()
            figure = table_figure(table.r.tolist(), mix.tolist(), sigmas)
            found[f"{candidate.name}, {candidate.nfe} calls"] = png(figure)
    return found


def metrics(scores: Sequence[Score]) -> list[Metric]:
    """What was measured: the error, the Frechet distance, every reward."""
    found = [Metric("RMSE to the fine solution", error_of, lambda s: s.rmse, True)]
    if any(s.frechet is not None for s in scores):
        found.append(
            Metric("Frechet distance", lambda s: number(s.frechet), lambda s: s.frechet, True)
        )
    return found + [reward(name) for name in reward_names(scores)]


def reward(name: str) -> Metric:
    """A reward's mean with its interval."""

    def value(score: Score) -> float | None:
        known = score.rewards.get(name)
        return known.value if known else None

    return Metric(name, lambda s: interval(s.rewards.get(name)), value, False)


def html(page: Page) -> str:
    """-> the whole file."""
    title = escape(page.title)
    parts = [
        f"<h1>{title}</h1>",
        listed(page.facts),
        "<h2>Figures</h2>",
        *(pivot(metric, page.scores, page.fine) for metric in metrics(page.scores)),
        *(gains(name, page.scores) for name in reward_names(page.scores)),
        "<h2>Curves</h2>",
        f"<figure>{image(page.curves.read_bytes(), 'curves', 'every quantity by calls')}</figure>",
        "<h2>The same seeds</h2>",
        *by_calls(page),
        "<h2>Learned tables</h2>" if page.tables else "",
        '<div class="tables">',
        *(
            f"<figure><h3>{escape(n)}</h3>{image(p, '', n)}</figure>"
            for n, p in page.tables.items()
        ),
        "</div>",
        "<h2>What the figures are</h2>",
        listed(page.meaning),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


def listed(facts: Mapping[str, str]) -> str:
    """Names and what is said of them."""
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def image(content: bytes, kind: str, about: str) -> str:
    """A PNG within the page."""
    data = base64.b64encode(content).decode()
    return f'<img class="{kind}" alt="{escape(about)}" src="data:image/png;base64,{data}">'


def pivot(metric: Metric, scores: Sequence[Score], fine: Score) -> str:
    """A line for every solver, a column for every number of calls; the best of each is bold."""
    cells: dict[tuple[str, int], str] = {}
    for nfe in sorted({s.nfe for s in scores}):
        there = [s for s in scores if s.nfe == nfe]
        values = [v for s in there if (v := metric.value(s)) is not None]
        best = (min if metric.less else max)(values, default=None)
        for s in there:
            cells[s.name, nfe] = cell(metric.cell(s), metric.value(s) == best)
    said = f"{metric.name}: {'lower' if metric.less else 'higher'} is better."
    if metric.value(fine):
        said += f" The fine solution has {metric.cell(fine)}."
    return matrix(said, scores, cells)


def gains(name: str, scores: Sequence[Score]) -> str:
    """What a reward gains over the fine solution, image by image; bold where it is not chance."""
    cells = {(s.name, s.nfe): gain(s.gains[name]) for s in scores if name in s.gains}
    said = f"{name}, minus that of the fine solution of the same seed and prompt."
    return matrix(f"{said} Bold: zero is outside of the interval.", scores, cells)


def gain(estimate: Estimate) -> str:
    """A difference."""
    return cell(interval(estimate), not estimate.low <= 0 <= estimate.high)


def cell(text: str, bold: bool) -> str:
    """A figure, its interval small."""
    value, bracket, rest = text.partition(" [")
    small = f" <small>{escape(bracket.strip() + rest)}</small>" if bracket else ""
    return f"<td{' class=best' * bold}>{escape(value)}{small}</td>"


def matrix(caption: str, scores: Sequence[Score], cells: Mapping[tuple[str, int], str]) -> str:
    """Solvers by calls."""
    calls = sorted({s.nfe for s in scores})
    learned = {s.name for s in scores if s.source}
    heads = "".join(f"<th>{n} calls</th>" for n in calls)
    rows = "".join(
        f"<tr{' class=learned' * (name in learned)}><th>{escape(name)}</th>"
        f"{''.join(cells.get((name, n), '<td></td>') for n in calls)}</tr>"
        for name in dict.fromkeys(s.name for s in scores)
    )
    head = f"<thead><tr><th>solver</th>{heads}</tr></thead>"
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"{head}<tbody>{rows}</tbody></table></div>"
    )


def by_calls(page: Page) -> list[str]:
    """For each number of calls a line of images a solver, the fine solution below."""
    *others, fine = page.strips
    said = "; ".join(
        f"{job.seed}" if job.prompt is None else f"{job.seed}: {job.prompt}" for job in page.jobs
    )
    found = [f"<p>From the left, the seeds {escape(said)}.</p>"]
    for nfe in sorted({s.nfe for s in others}):
        rows = [s for s in others if s.nfe == nfe]
        found.append(f'<h3>{nfe} calls</h3><div class="wide"><table class="strips">')
        found += [line(s.name, s) for s in rows]
        found.append(f"{line(f'fine, {fine.nfe} calls', fine)}</table></div>")
    return found


def line(name: str, strip: Strip) -> str:
    """A solver's images side by side."""
    row = grid(strip.images.cpu().float(), len(strip.images), GAP)
    shown = image(png_bytes(row), "strip", f"images by {name}")
    return f"<tr><th>{escape(name)}</th><td>{shown}</td></tr>"
