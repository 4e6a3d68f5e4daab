"""The tour: the shipped model under every solver at few calls; a table, a grid, a plot.

python -m eval.demo
"""

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor

from backends.base import Backend
from backends.generate import Job, generate
from backends.load import find_model, load_backend
from eval import report
from eval.candidates import Candidate, fine_solution, learned, predictor_files, variants
from eval.comparison import compare, summary, write_results
from eval.demo_text import MODEL as TEXT_MODEL
from eval.demo_text import error_table, text_rows
from eval.frechet import SHIPPED, load_reference
from eval.measure import Judge, Study
from eval.reference import real_images
from rewards.efficientnet import load_features
from src.files import read_json, write_atomically
from src.options import Device, OneLineCommand, one_line_errors

MODEL = "fashion-mnist-32"
SOLVERS = ("euler", "ipndm-3", "dpmpp-3", "unipc-3", "heun")
NFE = (3, 5, 7, 9)
SHOWN_NFE = 5
POINTS = 2
EXPS = Path(__file__).resolve().parent.parent / "exps"
CELL = 0.72  # inches of the grid picture an image


def predictors(backend: Backend, folder: Path) -> list[Candidate]:
    """The predictors of a folder with K = 2, or all if none has; none if it is not there."""
    files = sorted(folder.glob("*.pkl"))
    found = learned(predictor_files([str(path) for path in files]), backend)
    return [c for c in found if c.points == POINTS] or found


def one_of_each(jobs: Sequence[Job]) -> list[Job]:
    """The first job of every class, in the order of the classes."""
    first: dict[int, Job] = {}
    for job in jobs:
        first.setdefault(job.prompt if isinstance(job.prompt, int) else 0, job)
    return [first[label] for label in sorted(first)]


def grid_rows(
    study: Study, candidates: Sequence[Candidate], jobs: Sequence[Job]
) -> list[tuple[str, Tensor]]:
    """The images [N, C, H, W] of the same jobs under each candidate, the fine solution last."""
    named = [(f"{c.name}, {c.nfe} calls", c) for c in candidates]
    named.append((f"fine, {study.fine.nfe} calls", study.fine))
    return [
        (name, next(generate(study.backend, c.method, jobs, batch=len(jobs))).images)
        for name, c in named
    ]


def draw_grid(path: Path, rows: Sequence[tuple[str, Tensor]], heads: Sequence[str]) -> None:
    """Rows of images with their names at the left and `heads` above the columns."""
    count = len(rows[0][1])
    figure = Figure((CELL * (count + 2.4), CELL * (len(rows) + 0.5)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for cell, image in zip(line, images.cpu(), strict=True):
            cell.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            cell.axis("off")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    for cell, head in zip(axes[0], heads, strict=True):
        cell.set_title(head, fontsize=7, pad=3)
    left = 2.3 / (count + 2.4)
    top = 1 - 0.45 / (len(rows) + 0.5)
    figure.subplots_adjust(left, 0.01, 0.995, top, wspace=0.04, hspace=0.04)
    with write_atomically(path) as temp:
        figure.savefig(temp, dpi=140)


def class_names(model: str) -> list[str]:
    """The names of the classes, if the model's config.json tells them."""
    config = read_json(find_model(model) / "config.json")
    return config.get("about", {}).get("classes", [])


def real_distance(judge: Judge, count: int) -> float | None:
    """The Frechet distance of as many real images; None where so many are not shipped."""
    images = real_images(count)
    return None if images is None else judge.reference.distance(judge.see(images))


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--images", type=click.IntRange(20), default=60, help="Of every solver.")
@click.option("--outdir", type=click.Path(path_type=Path), default="samples/demo")
@click.option("--model", default=MODEL, help="Another model folder with the same reference.")
@click.option("--batch", type=click.IntRange(1), default=20)
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(images: int, outdir: Path, model: str, batch: int, device: torch.device) -> None:
    """Sample the shipped model with hand-made and learned solvers at 3, 5, 7 and 9 calls.

    Prints how far each ends from the fine solution of the same seeds and its Frechet distance
    to the test images. Hand-made solvers are on the polynomial schedule with rho 7, Heun with an
    analytic first step (its calls are even without one); learned ones as their files say.
    Then the text-to-image model under its own Euler and under EPD. python -m eval.compare gives
    every solver its best schedule.
    """
    backend = load_backend(model, device=device)
    jobs = tuple(Job(seed, backend.usual_prompt(seed)) for seed in range(images))
    study = Study(backend, jobs, fine_solution(backend.levels), batch)
    ours = [
        c for s in SOLVERS for n in NFE for c in variants(s, n, ["polynomial"], backend.levels)
    ]
    theirs = predictors(backend, EXPS / MODEL)
    judge = Judge(load_features(device), load_reference(SHIPPED))
    ways = len(ours) + len(theirs)
    click.echo(f"Sampling {images} images with {ways} solvers and finely: a few minutes on a CPU.")
    result = compare(study, [*ours, *theirs], judge=judge)
    real = real_distance(judge, images)
    settings = {"model": model, "seeds": f"0-{images - 1}", "real_images": real}
    write_results(outdir, result, study, settings)
    show(outdir / "grid.png", study, [*ours, *theirs], class_names(model))
    click.echo(report.pivot(result.scores, () if theirs else (f"epd K={POINTS}",)))
    click.echo(f"\n{summary(study, result.fine)}")
    if real is not None:
        click.echo(f"As many real images (of the training set) score {real:.4g}: the floor.")
    if not theirs:
        click.echo(f"No learned predictor is in exps/{MODEL} yet, so that the epd row is empty.")
    click.echo("Hand-made solvers are on polynomial-7, heun with AFS; learned ones on their own.")
    text_part(outdir / "text.png", device)
    for name in ("grid.png", "text.png", "results.png", "results.csv", "results.json"):
        click.echo(f"  {outdir / name}")


def text_part(path: Path, device: torch.device) -> None:
    """The text-to-image model: the grid of the same prompts and seeds, and a table."""
    click.echo(f"\nNow {TEXT_MODEL}, text to image: Euler and EPD, and Euler in 100 steps.")
    rows, prompts = text_rows(TEXT_MODEL, EXPS, device)
    draw_grid(path, [(f"{r.name}, {r.nfe} calls", r.images) for r in rows], prompts)
    click.echo(error_table(rows))


def show(path: Path, study: Study, candidates: Sequence[Candidate], names: Sequence[str]) -> None:
    """The grid of one image a class under every candidate at 5 calls."""
    jobs = one_of_each(study.jobs)
    at_shown = [c for c in candidates if c.nfe == SHOWN_NFE]
    heads = [names[j.prompt] if names and isinstance(j.prompt, int) else "" for j in jobs]
    draw_grid(path, grid_rows(study, at_shown, jobs), heads)


if __name__ == "__main__":
    main()
