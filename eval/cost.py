"""What a fit costs against the published gradient, and its memory against sampling, in one run.

Both methods are train_distill.py in processes of their own, judged alike on seeds apart from
theirs.

    python -m eval.cost --fraction 0.05
"""

import math
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from backends.generate import Job
from backends.load import load_backend
from eval.candidates import FINE_STEPS, fine_solution, learned_one
from eval.comparison import described_fine, runs_of
from eval.machine import provenance
from eval.measure import Study, measure, solve_finely
from eval.report import aligned, number
from eval.scripts import IDLE, Ran, run_script
from src.files import read_jsonl, write_json
from src.options import Device, Number, OneLineCommand, SeedList, one_line_errors

MIB = 1 << 20
FEW_STEPS = 6
"""Below so many grid points the published pixel models learn from the end alone."""
METRICS = "metrics.jsonl"
MEANING = {
    "seconds": "of the ticks of train_distill.py: without starting Python and loading the model, "
    "with its own validation",
    "rmse": "to the fine solution, on seeds apart from training, over all numbers of the latents",
    "peak": "MiB of the whole process, loading included; on a GPU what was allocated there",
    "gradient": "the published settings, but for a squared difference instead of a feature loss",
}


@dataclass(frozen=True)
class Run:
    """One method at work: its command, what it took, and what it told of its ticks."""

    method: str
    options: tuple[str, ...]
    of: int  # trajectories that the whole run learns from
    ran: Ran
    ticks: list[dict[str, Any]]

    @property
    def seen(self) -> int:
        """Trajectories that it did learn from."""
        return self.ticks[-1]["trajectories"]

    @property
    def seconds(self) -> float:
        """Of the ticks that were run, from the start of the run to the end of the last."""
        return self.ticks[-1]["seconds"]

    @property
    def whole(self) -> float:
        """Seconds of the whole run.

        What is left goes on like the ticks after the first, which also makes what is made once.
        """
        left = self.of - self.seen
        if left <= 0 or len(self.ticks) < 2:
            return self.seconds
        first = self.ticks[0]
        pace = (self.seconds - first["seconds"]) / (self.seen - first["trajectories"])
        return self.seconds + pace * left


@dataclass(frozen=True)
class Plan:
    """What both methods are told, and where."""

    model: str
    num_steps: int
    num_points: int
    solver: str
    batch: int
    device: str

    @property
    def common(self) -> list[str]:
        """The options of both."""
        return [
            *("--model", self.model, "--device", self.device, "--batch", str(self.batch)),
            *("--num_steps", str(self.num_steps), "--num_points", str(self.num_points)),
            *("--solver", self.solver),
        ]

    def published(self, trajectories: int, tick: int) -> list[str]:
        """The gradient's options (arXiv:2507.14797, Sec. 4, and its released runs)."""
        return [
            *("--method", "gradient", "--teacher", "heun" if self.solver == "epd" else "dpm2"),
            *("--M", "3", "--teacher_substeps", "2", "--scale_dir", "0.05"),
            *("--scale_time", "0.05", "--lr", "0.2", "--coslr"),
            *("--objective", "final" if self.num_steps < FEW_STEPS else "per-step"),
            *("--total_kimg", str(trajectories / 1000), "--tick", str(tick / 1000)),
        ]


def fitted(plan: Plan, extra: Sequence[str], folder: Path) -> Run:
    """A whole fit into `folder`."""
    options = (*plan.common, "--method", "fit", *extra)
    ran = run_script("train_distill.py", [*options, "--outdir", str(folder)])
    ticks = read_jsonl(folder / METRICS)
    return Run("fit", options, ticks[-1]["trajectories"], ran, ticks)


def descended(plan: Plan, trajectories: int, fraction: float, folder: Path) -> Run:
    """The gradient's run, or its first two ticks where a fraction is wanted."""
    whole = max(1, round(trajectories / plan.batch)) * plan.batch
    tick, wanted = 1000, folder / "never"
    if fraction < 1:
        tick = max(1, round(whole * fraction / 2 / plan.batch)) * plan.batch
        wanted = folder / "predictor-00002.pkl"
    options = (*plan.common, *plan.published(whole, tick))
    command = [*options, "--outdir", str(folder)]
    ran = run_script("train_distill.py", command, wanted.exists)
    ticks = read_jsonl(folder / METRICS)
    if wanted.exists():
        shutil.copyfile(wanted, folder / "predictor.pkl")
        ticks = ticks[:2]
    return Run("gradient", options, whole, ran, ticks)


def sampled(plan: Plan, predictor: Path, folder: Path) -> Ran:
    """One batch sampled by a predictor."""
    options = ["--predictor", str(predictor), "--model", plan.model, "--device", plan.device]
    seeds = ["--seeds", f"0-{plan.batch - 1}", "--batch", str(plan.batch)]
    return run_script("sample.py", [*options, *seeds, "--outdir", str(folder / "samples")])


def judged(
    plan: Plan, runs: Sequence[Run], folder: Path, seeds: Sequence[int], fine: int
) -> tuple[str, list[float | None]]:
    """What the fine solution is, and the error of each run's predictor to it; None for NaN."""
    backend = load_backend(plan.model, device=torch.device(plan.device))
    tables = [learned_one(folder / run.method / "predictor.pkl", backend) for run in runs]
    jobs = tuple(Job(seed, backend.usual_prompt(seed)) for seed in seeds)
    study = Study(backend, jobs, fine_solution(backend.levels, fine), plan.batch)
    errors = [score.rmse for score in measure(study, tables, solve_finely(study))]
    return described_fine(study), [e if math.isfinite(e) else None for e in errors]


@dataclass(frozen=True)
class Cost:
    """All that was measured."""

    fit: Run
    gradient: Run
    sampling: Ran
    idle: Ran
    errors: list[float | None]  # of the fit and of the gradient

    def ratios(self) -> dict[str, float | None]:
        """What one is of the other."""
        fit, gradient, low = self.fit.ran.peak, self.gradient.ran.peak, self.idle.peak
        ours, published = self.errors
        return {
            "fit / gradient, time": self.fit.whole / self.gradient.whole,
            "fit / gradient, error": ours / published if ours and published else None,
            "fit / sampling, peak memory": fit / self.sampling.peak,
            "gradient / sampling, peak memory": gradient / self.sampling.peak,
            "fit / sampling, above the idle process": (fit - low)
            / max(self.sampling.peak - low, 1),
        }

    def text(self) -> str:
        """All of it for people."""
        rows = [("", "trajectories", "seconds", "RMSE", "peak MiB")]
        notes = []
        for run, error in zip((self.fit, self.gradient), self.errors, strict=True):
            shown, mark = str(run.of), "  "
            if run.seen < run.of:
                shown, mark = f"{run.seen} of {run.of}", " *"
                notes.append(
                    f"* extrapolated linearly from {run.seconds:.1f} s for the first {run.seen} "
                    f"trajectories; its error is that after those"
                )
            seconds = f"{run.whole:.1f}{mark}"
            rows.append((run.method, shown, seconds, number(error), f"{run.ran.peak / MIB:.0f}"))
        for name, ran in (("sampling a batch", self.sampling), ("the model, idle", self.idle)):
            rows.append((name, "-", "-  ", "-", f"{ran.peak / MIB:.0f}"))
        ratios = [f"{name}: {number(value)}" for name, value in self.ratios().items()]
        return "\n".join([aligned(rows), *notes, "", *ratios])

    def plain(self) -> dict[str, Any]:
        """The same for a file."""
        runs = zip((self.fit, self.gradient), self.errors, strict=True)
        return {
            "methods": [
                {
                    "method": run.method,
                    "options": " ".join(run.options),
                    "trajectories": run.of,
                    "trajectories_run": run.seen,
                    "seconds": run.whole,
                    "seconds_run": run.seconds,
                    "seconds_process": run.ran.seconds,
                    "rmse": error,
                    "peak_mib": run.ran.peak / MIB,
                }
                for run, error in runs
            ],
            "sampling_peak_mib": self.sampling.peak / MIB,
            "idle_peak_mib": self.idle.peak / MIB,
            "ratios": self.ratios(),
        }


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--num_steps", type=click.IntRange(2), default=4, help="Grid points of both.")
@click.option("--num_points", type=click.IntRange(1, 4), default=2, help="K of both.")
@click.option("--solver", default="epd", help="epd or epd-BASE.")
@click.option("--batch", type=click.IntRange(1), default=32, help="Of both, and of sampling.")
@click.option("--trajectories", type=click.IntRange(1), default=10_000, help="Of the gradient.")
@click.option("--fraction", type=Number(0, 1, min_open=True), default=1.0, help="Of them to run.")
@click.option("--fit", "extra", default="", help="More options of the fit: '--rounds 4'.")
@click.option("--seeds", type=SeedList(), default="0-127", help="To judge by.")
@click.option("--fine", type=click.IntRange(2), default=FINE_STEPS, help="Heun steps to judge by.")
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/cost")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(  # noqa: PLR0913 - one parameter an option
    model: str,
    num_steps: int,
    num_points: int,
    solver: str,
    batch: int,
    trajectories: int,
    fraction: float,
    extra: str,
    seeds: list[int],
    fine: int,
    outdir: Path,
    device: torch.device,
) -> None:
    """Time a fit against the published gradient, and compare their errors and memory.

    With --fraction 0.05 only the first twentieth of the gradient is run: its time is then
    extrapolated, its error that after this part. Writes results.json to OUTDIR. The whole
    gradient takes most of an hour for the shipped model on 2 cores.
    """
    plan = Plan(model, num_steps, num_points, solver, batch, str(device))
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        fit = fitted(plan, shlex.split(extra), folder / "fit")
        sampling = sampled(plan, folder / "fit/predictor.pkl", folder)
        idle = run_script(IDLE, [model, str(device)])
        gradient = descended(plan, trajectories, fraction, folder / "gradient")
        finely, errors = judged(plan, (fit, gradient), folder, seeds, fine)
    cost = Cost(fit, gradient, sampling, idle, errors)
    click.echo(cost.text())
    about = {**asdict(plan), "fine": finely, "seeds": runs_of(seeds), "meaning": MEANING}
    about |= provenance(device)
    write_json(outdir / "results.json", {"about": about, **cost.plain()})
    click.echo(f"wrote {outdir / 'results.json'}")


if __name__ == "__main__":
    main()
