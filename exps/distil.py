"""Distil the predictors of the shipped models; those that are there already are left alone.

    python -m exps.distil fashion-mnist-32 --jobs 2
    python -m exps.distil tiny-sd3 --only 'epd-multistep-*' --target runs/mine

A stopped run goes on where it was.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import click
from tqdm import tqdm

from src.files import check_writable, copy_whole
from src.options import OneLineCommand

ROOT = Path(__file__).resolve().parent.parent
FEW = ("--total_kimg", "0.064", "--batch", "32")
TEXT = ("--schedule_type", "flowmatch", "--no-learn_grid", "--model")
EMOJI = (*TEXT, "tiny-sd3", "--guidance_rate", "4", "--prompts", "src/prompts/emoji-train.txt")
SCENES = (*TEXT, "tiny-sd3-scenes", "--guidance_rate", "2.5",
          "--prompts", "src/prompts/emoji-scenes.txt")  # fmt: skip
KEPT = ("config.yaml", "metrics.jsonl", "log.txt", "table.png")
"""What is kept of a run beside its predictor."""


def options(solver: str, points: int, calls: int, *more: str) -> tuple[str, tuple[str, ...]]:
    """A predictor's name and its options of train_distill.py."""
    own = ("--solver", solver, "--num_points", str(points), "--nfe", str(calls))
    return f"{solver}-k{points}-{calls}nfe", (*own, *FEW, *more)


def multistep(model: str, points: int, calls: int, *more: str) -> tuple[str, tuple[str, ...]]:
    """Parallel multistep under a name that no other model's has: bare names are looked up."""
    name, asked = options("epd-multistep", points, calls, *more)
    return f"{name}-{model}", asked


def by_distribution(points: int, calls: int) -> tuple[str, tuple[str, ...]]:
    """The same for a parallel multistep table that goes on by what sets of samples look like."""
    start = f"epd-multistep-k{points}-{calls}nfe"
    more = ("--features", "fashion-judge", "--distance", "distribution", "--rounds", "3")
    init = ("--init", f"exps/fashion-mnist-32/{start}.pkl", "--num_points", str(points))
    return f"{start}-distribution", (*init, *more)


BY_REWARD = ("--nfe", "3", "--reward", "fashion-judge", "--distance", "l2+0.1*reward")
SETS = {
    "fashion-mnist-32": dict(
        [
            options(solver, points, calls, "--rounds", "2")
            for points in (2, 1, 3)
            for calls in (3, 5, 7, 9)
            for solver in ("epd", "epd-ipndm", "epd-multistep")
        ]
        + [options("epd-dpmpp", 2, calls, "--rounds", "2") for calls in (3, 5)]
        + [options("epd-multistep", points, 4, "--rounds", "2") for points in (1, 2)]
        + [by_distribution(points, calls) for points, calls in ((1, 3), (2, 3), (2, 4), (2, 5))]
        + [("epd-multistep-k2-3nfe-reward", BY_REWARD)]
    ),
    "tiny-sd3": dict(
        [multistep("emoji", 2, calls, *EMOJI) for calls in (2, 3, 4, 5)]
        + [multistep("emoji", 1, calls, *EMOJI) for calls in (2, 3, 4, 5, 7)]
        + [multistep("emoji", 2, 7, *EMOJI, "--rounds", "1")]
        + [options("epd", 2, calls, *EMOJI) for calls in (4, 6, 10)]
        + [options("epd-ipndm", 2, 4, *EMOJI)]
        + [options("epd", 2, calls, *EMOJI, "--rounds", "1") for calls in (14, 20)]
    ),
    "tiny-sd3-scenes": dict([multistep("scenes", 1, calls, *SCENES) for calls in (2, 3, 4)]),
}


def distil(name: str, asked: tuple[str, ...], target: Path, work: Path, *more: str) -> str:
    """Run, or go on with, the distillation of a predictor; return the end of what it said."""
    run = work / name
    started = ("--resume", str(run)) if (run / "config.yaml").exists() else ()
    command = [sys.executable, "train_distill.py", "--device", "cpu"]
    command += started or (*asked, "--outdir", str(run))
    command += ["--teacher-cache", str(work / "teacher"), *more]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread)
    said = done.stderr.strip().rpartition("\n")[2]
    if done.returncode:
        raise click.ClickException(f"{name}: {said}")
    kept = target / "runs" / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        copy_whole(run / file, kept / file)
    copy_whole(run / "predictor.pkl", target / f"{name}.pkl")
    return said


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.argument("name", type=click.Choice(list(SETS)))
@click.option("--only", default="*", help="A pattern for the predictors' names.")
@click.option("--target", type=click.Path(path_type=Path), help="For predictors: exps/NAME.")
@click.option("--work", type=click.Path(path_type=Path), help="For the runs: runs/NAME.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="At once, one thread each.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the network: less time.")
def main(
    name: str, only: str, target: Path | None, work: Path | None, jobs: int, compiled: bool
) -> None:
    """Distil the predictors of the model NAME that are not there yet."""
    wanted = {one: asked for one, asked in SETS[name].items() if fnmatch(one, only)}
    if not wanted:
        raise click.ClickException(f"--only {only!r} names none of {', '.join(SETS[name])}")
    more = ("--compile",) if compiled else ()
    target, work = target or ROOT / "exps" / name, work or ROOT / "runs" / name
    missing = [one for one in wanted if not (target / f"{one}.pkl").exists()]
    if not missing:
        click.echo(f"{target} has all that are asked for ({len(wanted)}) already")
        return
    for place in (target / "runs" / name, work / name):
        check_writable(place)

    def make(one: str) -> str:
        return f"{one}: {distil(one, wanted[one], target, work, *more)}"

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="predictor") as bar:
        for text in pool.map(make, missing):
            tqdm.write(text, file=sys.stderr)
            bar.update()


if __name__ == "__main__":
    main()
