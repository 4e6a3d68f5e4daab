"""What each part of the method is worth: predictors learned with it and without it.

    python -m eval.ablate --nfe 5 --solvers epd-multistep --points 1,2
    python -m eval.ablate --study plug-in

Every cell is a run of train_distill.py, judged on seeds apart from training.
"""

import csv
import io
import math
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from backends.generate import Job
from backends.load import load_backend
from eval.candidates import FINE_STEPS, SCHEDULES, fine_solution, learned_one
from eval.candidates import variants as hand_made
from eval.compare import Names, counts
from eval.comparison import described_fine, runs_of
from eval.machine import provenance
from eval.measure import Fine, Study, measure, solve_finely
from eval.report import aligned, number
from eval.scripts import run_script
from solvers.catalog import SOLVERS, parse_name
from src.files import nearest, read_jsonl, write_json, write_text
from src.options import Device, OneLineCommand, SeedList, one_line_errors

ALONE = "alone"
VARIANTS: dict[str, tuple[str, ...]] = {
    "greedy": ("--rounds", "0", "--no-learn_grid"),
    "refined": ("--no-learn_grid",),
    "grid": ("--learn_grid",),
    "known": ("--learn_grid", "--known", "5"),
}
"""By name, what train_distill.py is told; each has what the one before has."""
MEANING = {
    "greedy": "weights by least squares and positions by search, interval by interval",
    "refined": "then Gauss-Newton steps on the whole table",
    "grid": "and on the levels",
    "known": "and the slopes that are known anyway in EPD's mixture",
    ALONE: "the base without a predictor, on the best of its schedules",
    "rmse": "to the fine solution, on seeds apart from training, over all numbers of the latents",
    "rows": "evaluations of the network for an image",
    "seconds": "of the ticks of train_distill.py",
}
STUDIES = {
    "parts": (("epd", "epd-ipndm", "epd-multistep"), (1, 2, 3), ("greedy", "refined", "grid")),
    "plug-in": (("epd", "epd-ipndm", "epd-dpmpp", "epd-unipc"), (2,), (ALONE, "grid")),
}
"""Solvers, numbers of points and variants."""


@dataclass(frozen=True)
class Cell:
    """One predictor to be learned, or one base to be run alone."""

    solver: str
    points: int
    variant: str
    nfe: int

    @property
    def base(self) -> str:
        """The solver that EPD stands on."""
        return "euler" if self.solver == "epd" else self.solver.removeprefix("epd-")

    def options(self, *, is_flow: bool) -> list[str]:
        """What train_distill.py is told; ValueError where the calls do not come out."""
        calls = 1
        if self.solver != "epd-multistep":
            calls += SOLVERS[parse_name(self.base)[0]].calls
        afs = self.nfe % calls > 0 and not is_flow
        intervals, odd = divmod(self.nfe + afs, calls)
        if odd or not intervals:
            raise ValueError(f"{self.solver} cannot make {self.nfe} calls here")
        told = [*("--solver", self.solver), *("--num_points", str(self.points))]
        told += ["--num_steps", str(intervals + 1), *VARIANTS[self.variant]]
        return [*told, "--afs" if afs else "--no-afs"]


@dataclass(frozen=True)
class Row:
    """What came of a cell: figures, or why there are none."""

    nfe: int
    solver: str
    points: int
    variant: str
    rows: float | None = None
    rmse: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Laboratory:
    """Where cells are tried."""

    model: str
    study: Study
    fine: Fine
    extra: tuple[str, ...]
    keep: Path
    distil: Callable[[Sequence[str]], object]

    def row(self, cell: Cell) -> Row:
        """A cell's figures; what is refused gives a row that says so."""
        try:
            return self.alone(cell) if cell.variant == ALONE else self.learned(cell)
        except ValueError as error:
            return Row(cell.nfe, cell.solver, cell.points, cell.variant, note=str(error))

    def learned(self, cell: Cell) -> Row:
        """Learn a predictor and judge it; its file is kept."""
        backend = self.study.backend
        told = ["--model", self.model, "--device", str(backend.device), *self.extra]
        told += cell.options(is_flow=backend.levels.process.name == "flow")
        with tempfile.TemporaryDirectory() as temp:
            folder = Path(temp) / "run"
            self.distil([*told, "--outdir", str(folder)])
            *_, last_tick = read_jsonl(folder / "metrics.jsonl")
            seconds = last_tick["seconds"]
            kept = self.keep / f"{cell.solver}-k{cell.points}-{cell.variant}-{cell.nfe}nfe.pkl"
            kept.parent.mkdir(parents=True, exist_ok=True)
            (folder / "predictor.pkl").replace(kept)
        (score,) = measure(self.study, [learned_one(kept, backend)], self.fine)
        if not math.isfinite(score.rmse):
            raise ValueError("its error is no number")
        figures = (score.rows, score.rmse, seconds)
        return Row(cell.nfe, cell.solver, cell.points, cell.variant, *figures)

    def alone(self, cell: Cell) -> Row:
        """The base itself at as many calls."""
        levels = self.study.backend.levels
        tried = hand_made(cell.base, cell.nfe, SCHEDULES[levels.process.name], levels)
        if not tried:
            raise ValueError(f"{cell.base} cannot make {cell.nfe} calls here")
        best = min(measure(self.study, tried, self.fine), key=lambda score: score.rmse)
        return Row(cell.nfe, cell.base, 1, ALONE, best.rows, best.rmse, None, best.schedule)


def cells(
    solvers: Sequence[str], points: Sequence[int], variants: Sequence[str], nfes: Sequence[int]
) -> list[Cell]:
    """All of them; a base alone is there once. ValueError for unknown variants."""
    for name in variants:
        if name not in (*VARIANTS, ALONE):
            near = nearest(name, [*VARIANTS, ALONE])
            raise ValueError(f"unknown variant {name!r}: did you mean {near}?")
    found = [
        Cell(solver, 1 if variant == ALONE else k, variant, nfe)
        for nfe in nfes
        for solver in solvers
        for k in points
        for variant in variants
        if not (solver == "epd-multistep" and variant in (ALONE, "known"))
    ]
    return list(dict.fromkeys(found))


def text(rows: Sequence[Row]) -> str:
    """The table for people, the best of each number of calls with a star."""
    best: dict[int, float] = {}
    for row in rows:
        if row.rmse is not None:
            best[row.nfe] = min(row.rmse, best.get(row.nfe, row.rmse))
    head = ("solver", "K", "variant", "NFE", "rows", "RMSE ", "seconds")
    lines = [
        (
            row.solver,
            str(row.points),
            row.variant,
            str(row.nfe),
            "-" if row.rows is None else f"{row.rows:g}",
            number(row.rmse) + ("*" if row.rmse == best.get(row.nfe, -1) else " "),
            "-" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    table = aligned([head, *lines]).splitlines()
    notes = ["", "", *(f"  {row.note}" if row.note else "" for row in rows)]
    return "\n".join(line + note for line, note in zip(table, notes, strict=True))


def write_results(outdir: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """results.json and results.csv, as far as the study is."""
    write_json(outdir / "results.json", {"about": about, "rows": [asdict(row) for row in rows]})
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(outdir / "results.csv", lines.getvalue())


def distil(options: Sequence[str]) -> None:
    """Run train_distill.py; ValueError with what it says where it refuses."""
    run_script("train_distill.py", options)


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--study", type=click.Choice(list(STUDIES)), default="parts", help="What is tried.")
@click.option("--nfe", type=Names(), default="5,9", help="Sequential calls.")
@click.option("--solvers", type=Names(), help="Students; else those of the study.")
@click.option("--points", type=Names(), help="Numbers of points K; else those of the study.")
@click.option("--variants", type=Names(), help=f"{', '.join(VARIANTS)} or {ALONE}.")
@click.option("--distil", "extra", default="", help="More for train_distill.py: '--rounds 6'.")
@click.option("--seeds", type=SeedList(), default="0-127", help="To judge by.")
@click.option("--batch", type=click.IntRange(1), default=64, help="Of them at once.")
@click.option("--fine", type=click.IntRange(2), default=FINE_STEPS, help="Heun steps to judge by.")
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/ablate")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(  # noqa: PLR0913 - one parameter an option
    model: str,
    study: str,
    nfe: list[str],
    solvers: list[str] | None,
    points: list[str] | None,
    variants: list[str] | None,
    extra: str,
    seeds: list[int],
    batch: int,
    fine: int,
    outdir: Path,
    device: torch.device,
) -> None:
    """Learn predictors with and without each part of the method, and print what each is worth.

    greedy is the least-squares fit, refined adds Gauss-Newton steps, grid learns the levels too,
    known adds known slopes to EPD's mixture; alone is the base without a predictor. The study
    plug-in holds EPD over several bases against these alone. Writes results.json, results.csv
    and the predictors to OUTDIR, after every cell; a cell of the shipped model takes up to a
    few minutes on 2 cores.

    \b
    python -m eval.ablate --nfe 5 --solvers epd-multistep --points 1,2 --variants greedy,grid
    python -m eval.ablate --study plug-in --nfe 5
    """  # noqa: D301 - click's mark for lines to keep
    usual = STUDIES[study]
    todo = cells(
        solvers or usual[0],
        counts(points, "points") if points else usual[1],
        variants or usual[2],
        counts(nfe),
    )
    backend = load_backend(model, device=device)
    jobs = tuple(Job(seed, backend.usual_prompt(seed)) for seed in seeds)
    on = Study(backend, jobs, fine_solution(backend.levels, fine), batch)
    there = Laboratory(
        model, on, solve_finely(on), tuple(shlex.split(extra)), outdir / "predictors", distil
    )
    about = {"model": model, "study": study, "seeds": runs_of(seeds), "distil": extra}
    about |= {"fine": described_fine(on), "variants": VARIANTS, "meaning": MEANING}
    about |= provenance(device)
    rows: list[Row] = []
    for cell in tqdm(todo, unit="cell", disable=None):
        rows.append(there.row(cell))
        write_results(outdir, rows, about)
    click.echo(text(rows))
    if all(row.rmse is None for row in rows):
        raise ValueError(f"nothing could be learned: {rows[0].note if rows else 'no cells'}")
    click.echo(f"results.json, results.csv and the predictors are in {outdir}")


if __name__ == "__main__":
    main()
