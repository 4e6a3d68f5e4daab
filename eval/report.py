"""Scores as aligned text and CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from eval.measure import Score
from src.files import write_text
from src.intervals import Estimate


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
    """Every score with all that belongs to it, a line each; 95 % intervals in brackets."""
    named = reward_names(scores)
    head = ("solver", "NFE", "RMSE", "Frechet", *named, "schedule", "AFS", "evaluations", "time")
    rows = [
        (
            s.name,
            str(s.nfe),
            error_of(s),
            number(s.frechet),
            *(interval(s.rewards.get(name)) for name in named),
            s.schedule,
            "yes" if s.afs else "no",
            f"{s.rows:g}",
            f"{s.time:.2f}",
        )
        for s in scores
    ]
    return aligned([head, *rows])


def reward_names(scores: Sequence[Score]) -> list[str]:
    """The rewards that some score has, in their order."""
    return list(dict.fromkeys(name for s in scores for name in s.rewards))


def error_of(score: Score) -> str:
    """The RMSE with its interval, where it has one."""
    if score.rmse_low is None or score.rmse_high is None:
        return number(score.rmse)
    return interval(Estimate(score.rmse, score.rmse_low, score.rmse_high))


def interval(estimate: Estimate | None) -> str:
    """`0.2731 [0.2712, 0.2749]`, or a dash."""
    if estimate is None:
        return "-"
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


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
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:#.4g}"


def write_csv(path: Path, scores: Sequence[Score]) -> None:
    """One line a score, under the names of its fields; three columns a reward."""
    plain = [f.name for f in fields(Score) if f.name not in ("rewards", "gains")]
    ends = [(name, end) for name in reward_names(scores) for end in ("value", "low", "high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *(n if end == "value" else f"{n}_{end}" for n, end in ends)])
    for score in scores:
        cells = asdict(score)
        seen = cells["rewards"]
        writer.writerow([cells[n] for n in plain] + [seen.get(n, {}).get(end) for n, end in ends])
    write_text(path, text.getvalue())
