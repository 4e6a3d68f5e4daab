"""A run: its folder, its ticks, and how it is stopped and taken up again.

A folder holds config.yaml, metrics.jsonl, log.txt, checkpoints, predictor.pkl (the best so far)
and one predictor for each tick, table.png and loss.png. The checkpoint is written last, so what
was told after it is dropped when the run is taken up.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solvers.predictor import Predictor, save_predictor
from src.files import to_json, write_text
from src.runs import Metrics
from training.checkpoint import checkpoints, latest_checkpoint, read_sealed, save_checkpoint
from training.company import Company, Job
from training.distill import Plan, Table, last_state, squared
from training.pictures import draw_losses, draw_table
from training.stop import Stop, Stopped
from training.task import Task
from training.teacher import Batches

PLACES = ("model", "prompts", "features", "model_config")


@dataclass(frozen=True)
class Folder:
    """Where a run writes; only the first rank does."""

    path: Path
    say: Callable[[str], object]
    writes: bool = True

    def log(self, text: str) -> None:
        """A line for log.txt and for whoever watches."""
        if not self.writes:
            return
        self.say(text)
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def run(job: Job, task: Task, company: Company, folder: Folder, stop: Stop) -> Predictor:
    """Do what is left of a job, tick by tick -> the predictor.

    Raises Stopped after a checkpoint where a signal asks for it.
    """
    first = resume(job, task, folder)
    started = time.monotonic()
    for tick in range(first, job.ticks):
        try:
            stop.poll()
            told = job.tick(tick)
        except Stopped:
            keep(job, task, folder, tick)
            folder.log(f"stopped in tick {tick + 1} of {job.ticks}: go on with --resume")
            raise
        stop.held = True
        measured = {**told, **errors(job, task, company)}
        finish_tick(job, task, folder, tick, measured | {"seconds": time.monotonic() - started})
        stop.held = False
    return finish(job, task, folder)


def errors(job: Job, task: Task, company: Company) -> dict[str, float]:
    """The errors on seeds apart from training, to the teacher and to the fine solution."""
    plan, table = job.result()
    return {
        "rmse_teacher": error(plan, table, task.validation, company),
        "rmse_fine": error(plan, table, task.reference, company),
    }


@torch.no_grad()
def error(plan: Plan, table: Table, batches: Batches, company: Company) -> float:
    """The root mean squared difference of the ends, over all ranks."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        found = squared(last_state(plan, table, batch), batch.targets[-1]).double().sum().cpu()
        total += torch.stack([found, torch.tensor(float(batch.x.numel()), dtype=found.dtype)])
    square, count = company.reduce(total).tolist()
    return math.sqrt(square / count)


def finish_tick(
    job: Job, task: Task, folder: Folder, tick: int, measured: dict[str, float]
) -> None:
    """Metrics, predictor and, last of all, the checkpoint."""
    finite = {name: v if math.isfinite(v) else None for name, v in measured.items()}
    text = ", ".join(f"{n} {v:.5g}" for n, v in finite.items() if v is not None)
    folder.log(f"tick {tick + 1} of {job.ticks}: {text}")
    if not folder.writes:
        return
    Metrics(folder.path / "metrics.jsonl").write(tick + 1, finite)
    predictor = predictor_of(job, task)
    save_predictor(predictor, folder.path / f"predictor-{tick + 1:05d}.pkl")
    save_predictor(predictor, folder.path / "predictor.pkl")
    keep(job, task, folder, tick + 1)


def keep(job: Job, task: Task, folder: Folder, ticks: int) -> None:
    """Write a checkpoint after so many ticks, or within the next."""
    if folder.writes:
        about = dataclasses.asdict(task.config)
        content = {"ticks": ticks, "config": about, "job": job.state()}
        save_checkpoint(folder.path, ticks, content)


def resume(job: Job, task: Task, folder: Folder) -> int:
    """Take a job up where its folder's newest checkpoint is -> ticks done; 0 without any."""
    if not checkpoints(folder.path):
        if folder.writes:
            forget_after(folder.path, 0)
        return 0
    path, content = latest_checkpoint(folder.path, folder.log)
    check_settings(task, content, path)
    take_up(job, content, path)
    folder.log(f"going on from {path.name}")
    if folder.writes:
        forget_after(folder.path, content["ticks"])
    return content["ticks"]


def check_settings(task: Task, content: dict[str, Any], path: Path) -> None:
    """ValueError where a checkpoint was made under other settings; files may have moved."""
    for name, was in content.get("config", {}).items():
        now = getattr(task.config, name, was)
        if name not in PLACES and now != was:
            raise ValueError(f"{path} was made with {name} {was}, not {now}: mend config.yaml")


def take_up(job: Job, content: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's state; ValueError, naming the file, where it is not of this job."""
    try:
        job.load(content["job"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is the checkpoint of another method") from error


def forget_after(path: Path, ticks: int) -> None:
    """Drop what was told of ticks that are done again."""
    metrics = Metrics(path / "metrics.jsonl")
    if not metrics.path.exists():
        return
    kept = [record for record in metrics.read() if record["step"] <= ticks]
    write_text(metrics.path, "".join(to_json(record) + "\n" for record in kept))


def start_from(file: Path, folder: Path) -> None:
    """Make one checkpoint file the newest of a run: later ones go.

    Raises ValueError where it cannot be read.
    """
    content = read_sealed(file)
    for other in folder.glob("checkpoint-*.pt"):
        if other.name > file.name:
            other.unlink()
    if file.parent != folder:
        save_checkpoint(folder, content["ticks"], content)


def predictor_of(job: Job, task: Task) -> Predictor:
    """The best so far, its grid as a custom schedule where it was learned."""
    plan, table = job.result()
    recipe = task.recipe
    if plan.sigmas != task.student.plan.sigmas:
        recipe = dataclasses.replace(recipe, schedule_type="custom", sigmas=plan.sigmas)
    return Predictor(table, recipe)


def finish(job: Job, task: Task, folder: Folder) -> Predictor:
    """The pictures, and the predictor once more."""
    predictor = predictor_of(job, task)
    if folder.writes:
        plan, table = job.result()
        save_predictor(predictor, folder.path / "predictor.pkl")
        draw_table(table, plan.sigmas, folder.path / "table.png")
        draw_losses(Metrics(folder.path / "metrics.jsonl").read(), folder.path / "loss.png")
    return predictor
