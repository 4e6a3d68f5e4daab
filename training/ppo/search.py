"""How much a table could gain: direct search over tables, by the cross-entropy method.

Every candidate makes the same images, prompts and first noises alike; a Gaussian over the
logarithms of segments and weights moves to the best of them (Rubinstein 1999; de Boer et al.
2005). No gradient and no policy: what it finds on images that it did not search on is a
measure of the headroom that PPO has. C candidates, M images, N intervals, K points.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import click
import torch
from torch import Tensor
from tqdm import tqdm

from solvers.epd import Directions
from solvers.predictor import Predictor, save_predictor
from src.options import Device, OneLineCommand, one_line_errors
from src.seeds import generator
from training.ppo.config import load_config
from training.ppo.data import predictor_of, prompts_of
from training.ppo.evaluate import Evaluation, held_out_scores
from training.ppo.launch import make_task
from training.ppo.policy import Draws, Policy, PolicyOptions, start_of
from training.ppo.prompts import fixed_jobs
from training.ppo.rollout import score_jobs
from training.ppo.task import Task
from training.stop import Stop

SMOOTH = 0.7
"""How far the Gaussian goes to the best candidates in a round."""
LEAST_SPREAD = 0.02

Tell: TypeAlias = Callable[[int, float, float], object]
"""Hears the round, the best mean reward in it, and that of the start."""


@dataclass(frozen=True)
class Effort:
    """How long to look."""

    rounds: int = 15
    candidates: int = 16  # C, the centre among them
    best: int = 4  # that the next round follows
    images: int = 16  # M, of each candidate
    spread: float = 0.4  # of the logarithms, at first


def search(
    task: Task, effort: Effort, seed: int = 0, tell: Tell = lambda _round, _best, _start: None
) -> Directions:
    """The centre [N, K] of the last round.

    Raises ValueError for a table that is not EPD's.
    """
    policy = Policy(start_of(task.method.table, lambda _text: None), PolicyOptions())
    segments, weight = policy.start.segments.log(), policy.start.weight.log()
    centre = torch.cat([segments, weight], -1)
    spread = torch.full_like(centre, effort.spread)
    started = None
    for number in range(effort.rounds):
        noise = torch.randn(
            effort.candidates,
            *centre.shape,
            generator=generator(seed, f"search/{number}"),
            dtype=centre.dtype,
        )
        noise[0] = 0  # the centre itself
        tried = centre + spread * noise
        rewards = mean_rewards(task, table_of(policy, tried), effort)
        started = rewards[0].item() if started is None else started
        best = tried[rewards.argsort(descending=True)[: effort.best]]
        centre = centre + SMOOTH * (best.mean(0) - centre)
        narrower = best.std(0, correction=0).clamp(min=LEAST_SPREAD)
        spread = spread + SMOOTH * (narrower - spread)
        tell(number + 1, rewards.max().item(), started)
    return table_of(policy, centre)


def table_of(policy: Policy, logs: Tensor) -> Directions:
    """Tables [C, N, K] of logarithms [C, N, 2 K + 1] of segments and weights, or one of none."""
    points = policy.start.weight.shape[-1]
    segments, weight = logs.split((points + 1, points), -1)
    return policy.table(Draws(segments.softmax(-1), weight.softmax(-1), logs[..., :0]))


def mean_rewards(task: Task, tables: Directions, effort: Effort) -> Tensor:
    """The mean reward [C] of each table on the same images of the training prompts."""
    jobs = fixed_jobs(task.prompts, task.seed + 1, effort.images)
    many = [t.repeat_interleave(len(jobs), 0) if t.ndim == 3 else t for t in tables.tensors()]
    method = replace(task.method, table=Directions(*many))
    found = score_jobs(task, method, jobs * effort.candidates, [task.score], Stop())
    return found.scores[task.reward].reshape(effort.candidates, -1).nanmean(-1)


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--config", "file", required=True, help="A file of training/ppo/cfgs.")
@click.option("--override", multiple=True, help="section.key=value; again for another.")
@click.option("--rounds", type=click.IntRange(1), default=Effort.rounds)
@click.option("--candidates", type=click.IntRange(2), default=Effort.candidates)
@click.option("--images", type=click.IntRange(1), default=Effort.images, help="Of each candidate.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .pkl to write.")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(
    file: str,
    override: tuple[str, ...],
    rounds: int,
    candidates: int,
    images: int,
    output: Path,
    device: torch.device,
) -> None:
    """Search tables directly, and tell what the found one gains on held-out images.

    \b
    python -m training.ppo.search --config training/ppo/cfgs/tiny_sd3.yaml --output found.pkl
    """  # noqa: D301
    config = load_config(file, override)
    predictor = predictor_of(config)
    task = make_task(config, predictor, prompts_of(config), device)
    effort = Effort(rounds, candidates, max(2, candidates // 4), images)
    with tqdm(total=rounds, unit="round", disable=None) as bar:

        def tell(_number: int, best: float, start: float) -> None:
            bar.set_postfix(best=best, start=start)
            bar.update()

        table = search(task, effort, config.run.seed, tell)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_predictor(Predictor(table, predictor.recipe), output)
    start, now = (
        held_out_scores(task, t, config.ppo.eval_prompts, Stop()) for t in (predictor.table, table)
    )
    told = Evaluation(start, now).told()
    click.echo(json.dumps({"images": rounds * candidates * images, **told}, indent=2))


if __name__ == "__main__":
    main()
