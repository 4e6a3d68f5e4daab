"""Distillation by back-propagation: Adam on a table's free numbers, as the papers do it.

Shapes: B samples, N intervals, P free numbers, * one sample, x [B, *]. A batch may come in
parts (gradient accumulation) and be shared by ranks: gradients are summed over both, so neither
changes what is learned.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from solvers.field import Condition, Field
from solvers.integrate import Step
from src.ranks import all_reduce_sum
from training.student import Distance, Reduce, Student, Trajectories, rmses, squared

EMA = 0.9
"""Of the numbers, an update."""
BAD_BUDGET = 10
"""Updates that may be skipped for NaN or infinity."""
CHANGING = ("seen", "updates", "skipped", "error")


@dataclass
class GradientLearner:
    """Adam, what it has learned, and how far it is: all that a resumed run needs.

    `objective`: every interval its own update, on the student's own state ("per-step", the
    published one from 6 grid points on); the end alone through the whole trajectory ("final",
    published for fewer); or all states through the whole trajectory ("end-to-end").
    `last` is the distance at the end (features, say), where it is not `distance`.
    """

    student: Student
    total: int  # trajectories until the end, for the learning rate
    theta: Tensor  # [P], float64, on the CPU
    peak: float = 0.2  # learning rate
    coslr: bool = True  # to 0 by a half cosine
    objective: str = "per-step"
    distance: Distance = squared
    last: Distance | None = None
    reduce: Reduce = all_reduce_sum
    seen: int = 0
    updates: int = 0
    skipped: int = 0
    error: float = math.inf  # of `best`, on validation
    ema: Tensor = field(init=False)
    best: Tensor = field(init=False)
    adam: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        assert not self.student.grid, "a gradient does not reach the noise levels"
        self.theta = self.theta.detach().double().cpu().clone().requires_grad_()
        self.ema, self.best = self.theta.detach().clone(), self.theta.detach().clone()
        self.adam = torch.optim.Adam([self.theta], lr=self.peak)

    def learn(self, parts: Sequence[Trajectories], count: int) -> float:
        """Learn from one batch of `count` samples over all ranks; `parts` are this rank's.

        -> the loss a sample, NaN where it was skipped. Raises ValueError where more updates
        were skipped than the budget allows.
        """
        if self.objective == "per-step":
            loss = self.each_interval(parts, count)
        else:
            loss = self.update((self.trajectory_loss(part) for part in parts), count)
        self.seen += count
        if self.skipped > BAD_BUDGET:
            raise ValueError(
                f"{self.skipped} updates had a loss or gradient that is not finite: "
                f"lower --lr {self.peak:g}, or try --dtype float32"
            )
        return loss

    def each_interval(self, parts: Sequence[Trajectories], count: int) -> float:
        """An update after every interval, the gradient cut between them."""

        def step(field: Field, step: Step) -> Tensor:
            table, _ = self.student.decode(self.theta)  # the numbers as they are now
            return self.student.solver(table.to(step.now.x))(field, step)

        total, sampler = 0.0, dataclasses.replace(self.student.sampler(self.theta), solver=step)
        runs = [sampler.states(part.field, part.x, detach=True) for part in parts]
        for i in range(self.student.intervals):
            distance = self.distance_at(i + 1 == self.student.intervals)
            pairs = zip(runs, parts, strict=True)
            loss = self.update((distance(next(run), p.targets[i]) for run, p in pairs), count)
            total += loss
            if not math.isfinite(loss):
                break
        return total

    def trajectory_loss(self, part: Trajectories) -> Tensor:
        """The loss [B] of the end, or of all states."""
        trajectory = list(self.student.sampler(self.theta).states(part.field, part.x))
        if self.objective == "final":
            return self.distance_at(True)(trajectory[-1], part.targets[-1])
        pairs = enumerate(zip(trajectory, part.targets, strict=True), 1)
        losses = [self.distance_at(i == len(trajectory))(x, target) for i, (x, target) in pairs]
        return torch.stack(losses).sum(0)

    def distance_at(self, is_end: bool) -> Distance:
        """The distance between states, or at the end."""
        return self.last if is_end and self.last is not None else self.distance

    def update(self, losses: Iterable[Tensor], count: int) -> float:
        """Adam by the summed gradient of losses [B] of all parts -> the loss a sample."""
        total = torch.zeros(1 + len(self.theta), dtype=torch.float64)
        for loss in losses:
            share = loss.double().sum() / count
            (slope,) = torch.autograd.grad(share, self.theta)
            total += torch.cat([share.detach().cpu().reshape(1), slope])
        total = self.reduce(total)
        if not bool(total.isfinite().all()):
            self.skipped += 1
            return math.nan
        self.theta.grad = total[1:]
        self.adam.param_groups[0]["lr"] = self.lr
        self.adam.step()
        self.updates += 1
        self.ema.lerp_(self.theta.detach(), 1 - EMA)
        return total[0].item()

    @property
    def lr(self) -> float:
        """The learning rate now."""
        done = min(self.seen / max(self.total, 1), 1.0)
        return self.peak * ((1 + math.cos(math.pi * done)) / 2 if self.coslr else 1.0)

    def judge(self, batches: Sequence[Trajectories]) -> None:
        """Keep the best so far by the error on other batches: the numbers, or their average.

        At first the start stands for election as well.
        """
        start = [self.best] if self.error == math.inf else []
        candidates = [*start, self.theta.detach(), self.ema]
        samplers = [self.student.sampler(candidate) for candidate in candidates]
        errors = rmses(samplers, batches, self.reduce)
        for candidate, error in zip(candidates, errors, strict=True):
            if error < self.error:
                self.error, self.best = error, candidate.clone()

    def state(self) -> dict[str, Any]:
        """Everything that changes, as tensors and numbers."""
        tensors = {"theta": self.theta.detach().clone(), "ema": self.ema.clone()}
        tensors |= {"best": self.best.clone(), "adam": copy.deepcopy(self.adam.state_dict())}
        tensors |= {"chosen_by": "judges"}
        return tensors | {name: getattr(self, name) for name in CHANGING}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; ValueError where it is of another table."""
        if state["theta"].shape != self.theta.shape:
            raise ValueError(
                f"the checkpoint has {len(state['theta'])} numbers, this run {len(self.theta)}"
            )
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        self.ema, self.best = state["ema"].clone(), state["best"].clone()
        self.adam.load_state_dict(state["adam"])
        for name in CHANGING:
            setattr(self, name, state[name])
        if state.get("chosen_by") != "judges":  # of an earlier version: the best is judged anew
            self.error = math.inf


def checkpointed(batch: Trajectories) -> Trajectories:
    """The same, its network keeping nothing for the way back and computing again instead."""
    denoiser = batch.field.denoiser

    def again(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        if not torch.is_grad_enabled():
            return denoiser(x, sigma, cond)
        x0 = checkpoint(denoiser, x, sigma, cond, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(x0, Tensor)
        return x0

    return dataclasses.replace(batch, field=dataclasses.replace(batch.field, denoiser=again))
