"""What people write: prompts, which image gets which, rates of guidance; and tables they read."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

COLUMN = "text"
LINE_END = re.compile(r"\r\n|\n|\r")
"""Nothing else ends a line: a prompt may hold Unicode's separators."""


@cache
def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a .txt file, one a line, or of the column `text` of a .csv file.

    Blank lines and cells are left out. ValueError, naming the file, where it cannot be read or
    has no prompt, and for lines of a .csv that have more cells than columns.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".csv"):
        raise ValueError(f"{path}: a file of prompts ends in .txt or .csv")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: it is not UTF-8 text") from None
    lines = column(content, path) if path.suffix == ".csv" else LINE_END.split(content)
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path}: it has no prompts")
    return prompts


def column(content: str, path: Path) -> Iterator[str]:
    """The cells of the column `text`; where it is the only one, commas need no quotes.

    ValueError for a file without that column, and for lines of more cells than columns.
    """
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        head = next(reader, [])
        if COLUMN not in head:
            raise ValueError(f"{path}: no column {COLUMN!r} in its first line")
        for cells in reader:
            if 1 < len(head) < len(cells):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells for {len(head)} columns, "
                    'so write texts with commas in quotes: "a fox, red"'
                )
            by_name = dict(zip(head, cells, strict=False))
            yield ",".join(cells) if len(head) == 1 else by_name.get(COLUMN, "")
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV that can be read: {error}") from None


def chosen_prompts(
    prompt: tuple[str, ...], prompt_file: str | None, label: int | None
) -> tuple[str, ...]:
    """The prompts that a command asks for, perhaps none; ValueError for two sources."""
    options = {"--prompt": prompt or None, "--prompt-file": prompt_file, "--class": label}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: choose one of them")
    return read_prompts(prompt_file) if prompt_file else prompt


def meet(seeds: Sequence[int], prompts: Sequence[str]) -> list[tuple[int, str]]:
    """Each seed with its prompt: the i-th prompt for the i-th seed, again from the first.

    Four seeds and two prompts a, b make a, b, a, b; one prompt serves all seeds. ValueError
    where there are more prompts than seeds, as some would make no image.
    """
    if len(prompts) > len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds, not {len(seeds)}: "
            f"give --seeds 0-{len(prompts) - 1}"
        )
    return [(seed, prompts[i % len(prompts)]) for i, seed in enumerate(seeds)]


def digest(prompts: Sequence[str]) -> str:
    """A short name for these prompts in this order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]


def guidance_rates(text: str, sigmas: Sequence[float]) -> tuple[float, ...]:
    """A guidance rate for the step at each of the levels `sigmas`, from a text.

    "4"; one a step, "1,4,6,4"; or "4@0.2-0.8", rate 4 at the levels of an interval and none
    elsewhere (Kynkaanniemi et al. 2024, arXiv:2404.07724). ValueError for anything else.
    """
    rate, at, interval = text.partition("@")
    try:
        rates = tuple(float(part) for part in rate.split(","))
        low, high = map(float, interval.split("-")) if at else (0.0, math.inf)
    except ValueError:
        rates, low, high = (), 0.0, math.inf
    if len(rates) == 1:
        inside = [low <= sigma <= high for sigma in sigmas]
        if at and not any(inside):
            raise ValueError(f"guidance {text!r}: no step begins between these levels, low first")
        rates = tuple(rates[0] if guided else 1.0 for guided in inside)
    wrong = len(rates) != len(sigmas) or (at and "," in rate)
    if wrong or not all(0 <= rate < math.inf for rate in rates):
        forms = f"one rate, {len(sigmas)} with commas between, or RATE@LOW-HIGH"
        raise ValueError(f"guidance {text!r}: write {forms}")
    return rates


# --- what they read -------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Four digits, or a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:#.4g}"


def aligned(
    rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), *, rule: bool = True
) -> str:
    """A line for each row of cells; the columns `left` begin alike, others end alike.

    The first row is the head, with a `rule` below it.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], *["-" * max(map(len, lines))] * rule, *lines[1:]])
