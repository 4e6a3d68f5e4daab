"""Distil the predictors of the shipped models.

fashion-mnist-32: EPD, EPD on iPNDM and parallel multistep, K = 1, 2, 3 points, at 3, 5, 7 and 9
sequential calls; EPD on DPM-Solver++ of two points at 3 and 5. tiny-sd3: EPD of two points at 6,
10, 14 and 20, the last two with one round of refinement, which is dear there. A stopped run goes
on where it was. From the repository's root:

    python -m exps.distil fashion-mnist-32 --jobs 2
    python -m exps.distil tiny-sd3 --only 'epd-k2-*' --target /tmp/mine
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SOLVERS = ("epd", "epd-ipndm", "epd-multistep")
PLUG_IN, PLUG_IN_CALLS = "epd-dpmpp", (3, 5)
"""One more base, beside Euler and iPNDM, of two points."""
FEW = ("--total_kimg", "0.064", "--batch", "32")
KEPT = ("config.yaml", "metrics.jsonl", "log.txt", "table.png")
"""What is kept of a run beside its predictor."""


def fashion_mnist() -> dict[str, tuple[str, ...]]:
    """The predictors of fashion-mnist-32, those of two points first, with their options."""
    found = {}
    for points in (2, 1, 3):
        for calls in (3, 5, 7, 9):
            found |= dict(options(solver, points, calls, "--rounds", "2") for solver in SOLVERS)
    return found | dict(options(PLUG_IN, 2, calls, "--rounds", "2") for calls in PLUG_IN_CALLS)


def tiny_sd3() -> dict[str, tuple[str, ...]]:
    """The predictors of tiny-sd3: no analytic first step, guidance and prompts of training."""
    text = ("--model", "tiny-sd3", "--guidance_rate", "4", "--schedule_type", "flowmatch")
    more = (*text, "--no-learn_grid", "--prompts", "src/prompts/emoji-train.txt")
    refined = dict(options("epd", 2, calls, *more) for calls in (6, 10))
    return refined | dict(options("epd", 2, calls, *more, "--rounds", "1") for calls in (14, 20))


SETS = {"fashion-mnist-32": fashion_mnist, "tiny-sd3": tiny_sd3}


def options(solver: str, points: int, calls: int, *more: str) -> tuple[str, tuple[str, ...]]:
    """A predictor's name and its options of train_distill.py.

    EPD needs two calls an interval; on the analytic first slope, of VE, one fewer in all.
    """
    steps = calls + 1 if solver == "epd-multistep" else (calls + 3) // 2
    named = ("--solver", solver, "--num_points", str(points), "--num_steps", str(steps))
    return f"{solver}-k{points}-{calls}nfe", (*named, *FEW, *more)


def distil(name: str, asked: Sequence[str], *, target: Path, work: Path, kept: Path) -> str:
    """Run, or go on with, the distillation of a predictor; the end of what it said.

    Raises CalledProcessError where it fails.
    """
    run = work / name
    started = ["--resume", str(run)] if any(run.glob("checkpoint-*.pt")) else []
    command = [sys.executable, "train_distill.py", "--device", "cpu"]
    command += started or [*asked, "--outdir", str(run)]
    command += ["--teacher-cache", str(work / "teacher")]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=one_thread()
    )
    for file in KEPT:
        kept_file = kept / name / file
        kept_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / file, kept_file)
    shutil.copyfile(run / "predictor.pkl", target / f"{name}.pkl")
    return done.stderr.strip().rpartition("\n")[2]


def one_thread() -> dict[str, str]:
    """The environment with a single thread for each process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@click.command(context_settings={"show_default": True})
@click.argument("name", type=click.Choice(list(SETS)))
@click.option("--only", default="*", help="A pattern for the predictors' names.")
@click.option("--target", type=click.Path(path_type=Path), help="For predictors: exps/NAME.")
@click.option("--work", type=click.Path(path_type=Path), help="For the runs: runs/NAME.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="At once, one thread each.")
def main(name: str, only: str, target: Path | None, work: Path | None, jobs: int) -> None:
    """Distil the predictors of the model NAME that are not there yet."""
    every = SETS[name]()
    wanted = [one for one in every if fnmatch(one, only)]
    if not wanted:
        raise click.ClickException(f"--only {only!r} names none of {', '.join(every)}")
    target, work = target or ROOT / "exps" / name, work or ROOT / "runs" / name
    missing = [one for one in wanted if not (target / f"{one}.pkl").exists()]
    target.mkdir(parents=True, exist_ok=True)
    make = partial(distil, target=target, work=work, kept=target / "runs")
    asked = [every[one] for one in missing]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="predictor") as bar:
        for one, said in zip(missing, pool.map(make, missing, asked), strict=True):
            tqdm.write(f"{one}: {said}", file=sys.stderr)
            bar.update()


if __name__ == "__main__":
    main()
