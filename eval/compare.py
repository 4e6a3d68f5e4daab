"""Solvers and predictors side by side, on any backend, by the number of sequential calls.

`compare` is the library's function; the command line adds files, a table and a plot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from backends.base import SCHEDULES as KNOWN
from backends.generate import Job
from backends.load import find_model, load_backend
from eval import report
from eval.candidates import (
    FINE_STEPS,
    SCHEDULES,
    SOLVERS,
    Candidate,
    fine_solution,
    learned,
    predictor_files,
    variants,
)
from eval.frechet import SHIPPED, load_reference
from eval.machine import provenance
from eval.measure import Fine, Judge, Score, Study, best, measure, solve_finely
from rewards.efficientnet import load_features
from solvers.catalog import make_solver
from src.files import write_json, write_text
from src.options import Device, DType, Number, OneLineCommand, SeedList, one_line_errors

CHOOSE_ON = 64
MEANING = {
    "rmse": "to the fine solution of the same seeds, over all numbers of the latents "
    "(pixels in [-1, 1] for pixel models)",
    "nfe": "network calls one after another for an image; guidance is not counted",
    "rows": "evaluations of the network for an image, each of the K points counted",
    "frechet": "on EfficientNet-lite0 features; biased upwards at small numbers of images, so "
    "compare within this table only",
    "time": "sampling a batch, in bare network calls of that batch timed just before it; "
    "median over the batches",
}


@dataclass(frozen=True)
class Comparison:
    """Scores, best schedules chosen, and the fine solution they were held against."""

    scores: list[Score]
    fine: Fine


def compare(
    study: Study,
    fixed: Sequence[Candidate],
    rivals: Sequence[Candidate] = (),
    *,
    judge: Judge | None = None,
    choose_on: int = CHOOSE_ON,
) -> Comparison:
    """Measure `fixed` candidates, and of the `rivals` the best of each name and NFE.

    The best has the least RMSE on the first `choose_on` jobs. Raises ValueError for candidates
    that solve another problem than the study's fine solution.
    """
    fine = solve_finely(study, judge)
    chosen = list(rivals)
    if len({(c.name, c.nfe) for c in rivals}) < len(rivals):
        few = replace(study, jobs=study.jobs[:choose_on])
        chosen = best(measure(few, rivals, fine), rivals)
    return Comparison(measure(study, [*chosen, *fixed], fine, judge), fine)


def rivals_for(
    solvers: Sequence[str], nfes: Sequence[int], schedules: Sequence[str], study: Study
) -> list[Candidate]:
    """Every hand-made candidate of these solvers, calls and schedules (["best"]: the usual).

    Combinations that do not exist are left out. ValueError for unknown names.
    """
    levels, rate = study.backend.levels, study.fine.method.guidance_rate
    unknown = [name for name in schedules if name not in ("best", *KNOWN)]
    if unknown or not schedules:
        raise ValueError(f"unknown schedule {unknown}: choose best or from {', '.join(KNOWN)}")
    for solver in solvers:
        make_solver(solver)
    if "best" in schedules:
        schedules = SCHEDULES[levels.process.name]
    return [
        candidate
        for solver in solvers
        for nfe in nfes
        for candidate in variants(solver, nfe, schedules, levels, rate)
    ]


class Names(click.ParamType):
    """Names with commas between them -> a list."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        if not isinstance(value, str):
            return list(value)
        return [part.strip() for part in value.split(",") if part.strip()]


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.argument("more", nargs=-1, metavar="[PREDICTOR]...")
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--solvers", type=Names(), default=",".join(SOLVERS), help="Hand-made; '' for none.")
@click.option("--nfe", type=Names(), default="3,5,7,9", help="Sequential calls of those.")
@click.option("--schedules", type=Names(), default="best", help="Names, or best of the usual.")
@click.option("--predictor", multiple=True, help="Path, name in exps/, or pattern; repeatable.")
@click.option("--fine", type=click.IntRange(2), default=FINE_STEPS, help="Its Heun steps.")
@click.option("--guidance_rate", type=Number(0), default=1.0, help="1 is no guidance.")
@click.option("--seeds", type=SeedList(), default="0-255")
@click.option("--batch", type=click.IntRange(1), default=64)
@click.option("--reference", type=click.Path(path_type=Path), help="Statistics to measure FD by.")
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/compare")
@click.option("--dtype", type=DType(), default="float32", help="Of the network; x stays float32.")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(  # noqa: PLR0913 - one parameter an option
    more: tuple[str, ...],
    model: str,
    solvers: list[str],
    nfe: list[str],
    schedules: list[str],
    predictor: tuple[str, ...],
    fine: int,
    guidance_rate: float,
    seeds: list[int],
    batch: int,
    reference: Path | None,
    outdir: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compare solvers and predictors: error to the fine solution, Frechet distance, cost.

    Writes results.txt, .csv, .json and .png to OUTDIR. Hand-made solvers take the best
    of their schedules, each with and without AFS, by RMSE on the first 64 seeds. The shipped
    model has its Frechet reference; other models need --reference for that column. All solvers
    on the shipped model take about a quarter of an hour on 2 cores.

    \b
    python -m eval.compare --predictor 'exps/fashion-mnist-32/*.pkl'
    python -m eval.compare --solvers euler,dpmpp-3 --nfe 5,10 --schedules polynomial --seeds 0-99
    """  # noqa: D301 - click's mark for lines to keep
    backend = load_backend(model, device=device, dtype=dtype)
    finely = fine_solution(backend.levels, fine, guidance_rate)
    jobs = tuple(Job(seed, backend.usual_prompt(seed)) for seed in seeds)
    study = Study(backend, jobs, finely, batch)
    fixed = learned(predictor_files([*predictor, *more]), backend)
    rivals = rivals_for(solvers, counts(nfe), schedules, study)
    if not fixed and not rivals:
        raise ValueError(
            "nothing to compare: name solvers that can make these calls, or predictors"
        )
    reference = reference or usual_reference(model)
    judge = Judge(load_features(device), load_reference(reference)) if reference else None
    result = compare(study, fixed, rivals, judge=judge)
    settings = {"model": model, "seeds": runs_of(seeds), "schedules": schedules}
    settings |= {"dtype": str(dtype), "reference": str(reference) if reference else None}
    write_results(outdir, result, study, settings)
    parts = [f(result.scores) for f in (report.table, report.pivot, report.ratios)]
    text = "\n\n".join(part for part in (*parts, summary(study, result.fine)) if part)
    write_text(outdir / "results.txt", text + "\n")
    click.echo(f"{text}\nresults.txt, .csv, .json and .png are in {outdir}")


def counts(texts: Sequence[str], option: str = "nfe") -> list[int]:
    """Numbers above 0 of an option; ValueError for what is none."""
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"--{option} {text!r} is no number from 1 on: write, say, 1,3,5")
    return [int(text) for text in texts]


def usual_reference(model: str) -> Path | None:
    """The reference statistics in the model's own folder, if there are some."""
    path = find_model(model) / SHIPPED.name
    return path if path.is_file() else None


def runs_of(seeds: Sequence[int]) -> str:
    """Seeds as they are written: [0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, run)) for run in runs)


def summary(study: Study, fine: Fine) -> str:
    """What the figures of a table are held against, for people."""
    distance = report.number(fine.score.frechet)
    return (
        f"{len(study.jobs)} images. Fine solution: {described_fine(study)}, its Frechet distance "
        f"{distance}.\nRMSE is over the latents (pixels in [-1, 1] for pixel models); Frechet "
        f"distances are biased upwards at few images: compare within this table only."
    )


def described_fine(study: Study) -> str:
    """The fine solution in words."""
    steps = len(study.fine.method.sigmas) - 1
    return f"{study.fine.name} in {steps} steps on {study.fine.schedule} ({study.fine.nfe} calls)"


def write_results(
    outdir: Path, result: Comparison, study: Study, settings: Mapping[str, Any]
) -> None:
    """results.csv, results.json and results.png; `settings` go into the JSON as they are.

    Where they hold "real_images", the Frechet distance of real ones, the plot shows it.
    """
    about = {
        **settings,
        "images": len(study.jobs),
        "batch": study.batch,
        "fine": described_fine(study),
        "chosen_on": f"the first {min(CHOOSE_ON, len(study.jobs))} images",
        "meaning": MEANING,
        **provenance(study.backend.device),
    }
    rows = [asdict(score) for score in result.scores]
    write_json(
        outdir / "results.json",
        {"about": about, "fine": asdict(result.fine.score), "scores": rows},
    )
    report.write_csv(outdir / "results.csv", result.scores)
    lines = {
        "fine solution": result.fine.score.frechet,
        "real images": settings.get("real_images"),
    }
    floor = {name: distance for name, distance in lines.items() if distance is not None}
    title = f"{settings['model']}, {len(study.jobs)} images, against {described_fine(study)}"
    report.plot(outdir / "results.png", result.scores, title, floor)


if __name__ == "__main__":
    main()
