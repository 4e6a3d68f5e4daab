"""Distil the predictors of the shipped Fashion-MNIST network, all with the same settings.

EPD, EPD on iPNDM and parallel multistep, K = 1, 2, 3 points, at 3, 5, 7 and 9 sequential calls;
EPD on DPM-Solver++ of two points at 3 and 5.
A stopped run goes on where it was. From the repository's root:

    python -m exps.distil_fashion_mnist --jobs 2
    python -m exps.distil_fashion_mnist --only 'epd-multistep-k2-*' --target /tmp/mine
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "exps" / "fashion-mnist-32"
WORK = ROOT / "runs" / "fashion-mnist-32"
SOLVERS = ("epd", "epd-ipndm", "epd-multistep")
PLUG_IN, PLUG_IN_CALLS = "epd-dpmpp", (3, 5)
"""One more base, beside Euler and iPNDM, of two points."""
POINTS = (1, 2, 3)
CALLS = (3, 5, 7, 9)
SETTINGS = ("--total_kimg", "0.064", "--batch", "32", "--rounds", "2")
KEPT = ("config.yaml", "metrics.jsonl", "log.txt", "table.png")
"""What is kept of a run beside its predictor."""


def names() -> dict[str, tuple[str, ...]]:
    """The predictors, those of two points first, and the options that make each."""
    found = {}
    for points in (2, 1, 3):
        for calls in CALLS:
            for solver in SOLVERS:
                steps = calls + 1 if solver == "epd-multistep" else (calls + 3) // 2
                options = ("--solver", solver, "--num_points", points, "--num_steps", steps)
                found[f"{solver}-k{points}-{calls}nfe"] = tuple(map(str, options))
    for calls in PLUG_IN_CALLS:
        steps = str((calls + 3) // 2)
        found[f"{PLUG_IN}-k2-{calls}nfe"] = ("--solver", PLUG_IN, "--num_steps", steps)
    return found


def distil(name: str, *, target: Path, work: Path, kept: Path) -> str:
    """Run, or go on with, the distillation of a predictor; the end of what it said.

    Raises CalledProcessError where it fails.
    """
    run = work / name
    started = ["--resume", str(run)] if any(run.glob("checkpoint-*.pt")) else []
    options = started or [*names()[name], *SETTINGS, "--outdir", str(run)]
    command = [sys.executable, "train_distill.py", *options, "--device", "cpu"]
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
@click.option("--only", default="*", help="A pattern for the names.")
@click.option("--target", type=click.Path(path_type=Path), default=FOLDER, help="For predictors.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "fashion-mnist-32"
)
@click.option("--jobs", type=click.IntRange(1), default=1, help="At once, one thread each.")
def main(only: str, target: Path, work: Path, jobs: int) -> None:
    """Distil the predictors that are not there yet."""
    wanted = [name for name in names() if fnmatch(name, only)]
    if not wanted:
        raise click.ClickException(f"--only {only!r} names none of {', '.join(names())}")
    missing = [name for name in wanted if not (target / f"{name}.pkl").exists()]
    target.mkdir(parents=True, exist_ok=True)
    make = partial(distil, target=target, work=work, kept=target / "runs")
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="predictor") as bar:
        for name, said in zip(missing, pool.map(make, missing), strict=True):
            tqdm.write(f"{name}: {said}", file=sys.stderr)
            bar.update()


if __name__ == "__main__":
    main()
