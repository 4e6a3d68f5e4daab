"""The policy's mean against the starting table, on prompts and noises kept out of training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.predictor import Table
from src.intervals import Estimate, mean_of
from training.ppo.prompts import fixed_jobs
from training.ppo.rollout import score_jobs
from training.ppo.task import Task
from training.stop import Stop


@dataclass(frozen=True)
class Evaluation:
    """Scores of the same images by two tables."""

    start: Mapping[str, Tensor]  # [E] by reward, NaN where there is none
    now: Mapping[str, Tensor]

    def gain(self, name: str) -> Estimate | None:
        """The mean paired difference and its 95 % interval; None for fewer than two pairs."""
        if name not in self.now or name not in self.start:
            return None
        pairs = self.now[name] - self.start[name]
        kept = pairs[pairs.isfinite()]
        return mean_of(kept) if len(kept) > 1 else None

    def told(self) -> dict[str, float]:
        """The numbers for people, by name: mean of each, gain, and the ends of its interval."""
        numbers: dict[str, float] = {}
        for name, scores in self.now.items():
            gain = self.gain(name)
            if gain is None:
                continue
            both = scores.isfinite() & self.start[name].isfinite()
            numbers |= {
                f"eval/{name}": scores[both].mean().item(),
                f"eval/{name}_start": self.start[name][both].mean().item(),
                f"eval/{name}_gain": gain.value,
                f"eval/{name}_gain_low": gain.low,
                f"eval/{name}_gain_high": gain.high,
                f"eval/{name}_pairs": int(both.sum()),
            }
        return numbers


def held_out_scores(task: Task, table: Table | None, count: int, stop: Stop) -> dict[str, Tensor]:
    """The scores [count] of the held-out images by one table, on every rank, by reward."""
    jobs = fixed_jobs(task.held_out, task.seed, count)
    scorers = [task.score, *([task.judge] if task.judge else [])]
    return score_jobs(task, replace(task.method, table=table), jobs, scorers, stop).scores


def as_tensors(scores: Mapping[str, list[float]]) -> dict[str, Tensor]:
    """Scores of a checkpoint as tensors."""
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
