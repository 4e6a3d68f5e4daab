"""Solvers and predictors side by side, on any backend, by the number of sequential calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from backends.load import find_model, load_backend
from eval.candidates import (
    FINE_STEPS,
    SOLVERS,
    fine_solution,
    from_here,
    learned,
    predictor_files,
)
from eval.comparison import (
    compare,
    rivals_for,
    runs_of,
    write_page,
    write_results,
    write_summary,
)
from eval.frechet import SHIPPED, load_reference
from eval.measure import Judge, Study
from eval.page import SHOWN
from eval.prompted import jobs_for, rewards_for
from eval.score import NamedPath
from rewards.efficientnet import load_features
from rewards.registry import Setup, files_of
from src.options import Device, DType, Number, OneLineCommand, SeedList, one_line_errors
from src.text import read_prompts


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
@click.option("--prompts", "--prompt-file", "--prompt_file", help=".txt, one a line, or .csv.")
@click.option("--seeds", type=SeedList(), default="0-255")
@click.option("--batch", type=click.IntRange(1), default=64)
@click.option("--reference", type=click.Path(path_type=Path), help="Statistics to measure FD by.")
@click.option("--reward", "names", multiple=True, help="Repeatable: clip, hps, ...")
@click.option(
    "--weights", type=NamedPath(), multiple=True, help="Where the rewards' are; repeatable."
)
@click.option("--shown", type=click.IntRange(1), default=SHOWN, help="Images a line in the page.")
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
    prompts: str | None,
    seeds: list[int],
    batch: int,
    reference: Path | None,
    names: tuple[str, ...],
    weights: tuple[tuple[str, str], ...],
    shown: int,
    outdir: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compare solvers and predictors: error to the fine solution, rewards, cost.

    Writes report.html, a page that needs nothing else, and results.txt, .csv, .json and .png to
    OUTDIR. Hand-made solvers take the best of their schedules, each with and without AFS, by
    RMSE on the first 64 seeds. The shipped model has its Frechet reference; other models need
    --reference for that column. Text-to-image models make the i-th prompt from the i-th seed,
    and every --reward judges the same images. All solvers on the shipped model take about a
    quarter of an hour on 2 cores.

    \b
    python -m eval.compare --predictor 'exps/fashion-mnist-32/*.pkl'
    python -m eval.compare --solvers euler,dpmpp-3 --nfe 5,10 --schedules polynomial --seeds 0-99
    python -m eval.compare --model tiny-sd3 --guidance_rate 4 --seeds 0-99 --nfe 6,10 \
        --prompts src/prompts/emoji-heldout.txt --predictor 'exps/tiny-sd3/*.pkl' \
        --reward clip --weights clip=src/models/tiny-clip --reward efficientnet-minilm
    """  # noqa: D301 - click's mark for lines to keep
    setup = Setup(device, paths=dict(weights))
    files = files_of(names, setup.paths)
    texts = read_prompts(prompts) if prompts else ()
    backend = load_backend(model, device=device, dtype=dtype)
    finely = fine_solution(backend.levels, fine, guidance_rate)
    study = Study(backend, jobs_for(backend, seeds, texts), finely, batch)
    fixed = learned(predictor_files([*predictor, *more]), backend)
    rivals = rivals_for(solvers, counts(nfe), schedules, study)
    if not fixed and not rivals:
        raise ValueError(
            "nothing to compare: name solvers that can make these calls, or predictors"
        )
    rewards = rewards_for(names, study.jobs, setup)
    reference = reference or usual_reference(model)
    judge = Judge(load_features(device), load_reference(reference)) if reference else None
    result = compare(study, fixed, rivals, judge=judge, rewards=rewards)
    settings = {"model": from_here(model), "seeds": runs_of(seeds), "schedules": schedules}
    settings |= {"prompts": from_here(prompts) if prompts else None, "rewards": list(names)}
    settings |= {"weights": {name: from_here(path) for name, path in files.items()}}
    settings |= {"dtype": str(dtype), "reference": from_here(reference) if reference else None}
    write_results(outdir, result, study, settings)
    write_page(outdir, result, study, settings, shown)
    text = write_summary(outdir, result, study)
    click.echo(f"{text}\nreport.html, results.txt, .csv, .json and .png are in {outdir}")


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


if __name__ == "__main__":
    main()
