"""What a rollout of stage 2 costs beyond sampling the same images and scoring them.

Only a ratio within one run, the two taking turns: a table per image, sharded and timed by part,
against one table for all, as sample.py draws and eval.score scores, files left out.

    python -m exps.bench_rollout
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import torch
from tqdm import tqdm

from backends.generate import Job, generate
from eval.machine import clock, provenance
from src.files import write_json
from src.options import Device, OneLineCommand, one_line_errors
from src.seeds import generator
from training.ppo.config import load_config
from training.ppo.data import predictor_of, prompts_of
from training.ppo.launch import make_task
from training.ppo.policy import Policy, PolicyOptions, stacked, start_of
from training.ppo.prompts import shots
from training.ppo.rollout import score_jobs
from training.ppo.task import Task
from training.stop import Stop

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "training" / "ppo" / "cfgs" / "tiny_sd3.yaml"


def rollout(task: Task, images: int, k: int, step: int) -> None:
    """Step `step` of training, but for the update."""
    plan = shots(task.prompts, task.seed, step, count=images, k=k, grouping="crn")
    policy = Policy(start_of(task.method.table, lambda _text: None), PolicyOptions())
    with torch.no_grad():
        law = policy()
        draws = stacked([law.draw(generator(task.seed, shot.stream)) for shot in plan])
        method = replace(task.method, table=policy.table(draws))
    score_jobs(task, method, [shot.job for shot in plan], [task.score], Stop())


def sampled_and_scored(task: Task, images: int, k: int, step: int) -> None:
    """The same prompts and noises by the one table of the predictor."""
    plan = shots(task.prompts, task.seed, step, count=images, k=k, grouping="crn")
    jobs: list[Job] = [shot.job for shot in plan]
    for made in generate(task.backend, task.method, jobs, batch=task.batch):
        task.score(made.images, [str(job.prompt) for job in made.jobs])


def seconds(work: Callable[[Task, int, int, int], None], task: Task, *what: int) -> float:
    """How long it takes."""
    device = task.backend.device
    started = clock(device)
    work(task, *what)
    return clock(device) - started


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--config", "file", default=str(CONFIG), help="A file of training/ppo/cfgs.")
@click.option("--override", multiple=True, help="section.key=value; again for another.")
@click.option("--turns", type=click.IntRange(1), default=7)
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench_rollout.json")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(
    file: str, override: tuple[str, ...], turns: int, out: Path, device: torch.device
) -> None:
    """Time rollouts against sampling and scoring; print the median ratio, write JSON."""
    config = load_config(file, override)
    task = make_task(config, predictor_of(config), prompts_of(config), device)
    images, k = config.ppo.rollout_batch_size, config.ppo.rloo_k
    both = (rollout, sampled_and_scored)
    pairs = []
    for turn in tqdm(range(turns + 1), unit="turn", disable=None):
        order = both if turn % 2 else both[::-1]
        told = {work: seconds(work, task, images, k, turn) for work in order}
        pairs.append([told[work] for work in both])
    ratios = sorted(a / b for a, b in pairs[1:])  # the first warms up
    ratio = median(ratios)
    click.echo(f"{images} images: a rollout takes {ratio:.3f} of sampling and scoring them")
    click.echo(f"(median of {turns} turns, from {ratios[0]:.3f} to {ratios[-1]:.3f})")
    about = {"config": file, "images": images, "k": k, **provenance(device)}
    write_json(out, {"about": about, "ratio": ratio, "seconds": pairs[1:]})
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
