"""Distillation by back-propagation: Adam on a table's free numbers, as the papers do it.

Shapes: B samples, N intervals, P free numbers, * one sample, x [B, *]. A batch may come in
parts (gradient accumulation) and be shared by ranks: gradients are summed over both, so neither
changes what is learned.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from solvers.field import Condition, Denoiser, Field
from solvers.integrate import Step
from src.ranks import all_reduce_sum
from training.student import Batch, Distance, Reduce, Student, rmse, squared

OBJECTIVES = ("per-step", "final", "end-to-end")


@dataclass(frozen=True)
class GradientOptions:
    """How Adam learns; the defaults are the published ones.

    `objective`: every interval its own update, on the student's own state ("per-step", the
    published one from 6 grid points on); the end alone through the whole trajectory ("final",
    published for fewer); or all states through the whole trajectory ("end-to-end").
    `last` is the distance at the end (features, say), where it is not `distance`.
    """

    lr: float = 0.2
    coslr: bool = True  # to 0 by a half cosine
    objective: str = "per-step"
    distance: Distance = squared
    last: Distance | None = None
    ema: float = 0.9  # of the numbers, an update
    bad_budget: int = 10  # updates that may be skipped for NaN or infinity
    reduce: Reduce = all_reduce_sum


@dataclass
class Learner:
    """Adam, what it has learned, and how far it is: all that a resumed run needs."""

    student: Student
    options: GradientOptions
    total: int  # trajectories until the end, for the learning rate
    theta: Tensor  # [P], float64, on the CPU
    seen: int = 0
    updates: int = 0
    skipped: int = 0
    error: float = math.inf  # of `best`, on validation
    ema: Tensor = dataclasses.field(init=False)
    best: Tensor = dataclasses.field(init=False)
    adam: torch.optim.Adam = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        assert not self.student.grid, "a gradient does not reach the noise levels"
        self.theta = self.theta.detach().double().cpu().clone().requires_grad_()
        self.ema, self.best = self.theta.detach().clone(), self.theta.detach().clone()
        self.adam = torch.optim.Adam([self.theta], lr=self.options.lr)

    def learn(self, parts: Sequence[Batch], count: int) -> float:
        """Learn from one batch of `count` samples over all ranks; `parts` are this rank's.

        -> the loss a sample, NaN where it was skipped. Raises ValueError where more updates
        were skipped than the budget allows.
        """
        per_step = self.options.objective == "per-step"
        loss = self.each_interval(parts, count) if per_step else self.whole(parts, count)
        self.seen += count
        if self.skipped > self.options.bad_budget:
            raise ValueError(
                f"{self.skipped} updates had a loss or gradient that is not finite: "
                f"lower --lr {self.options.lr:g}, or try --dtype float32"
            )
        return loss

    def each_interval(self, parts: Sequence[Batch], count: int) -> float:
        """An update after every interval, the gradient cut between them."""
        total, sampler = 0.0, self.student.sampler(self.theta)
        sampler = dataclasses.replace(sampler, solver=self.step)
        runs = [sampler.states(part.field, part.x, detach=True) for part in parts]
        for i in range(self.student.intervals):
            distance = self.distance_at(i + 1 == self.student.intervals)
            pairs = zip(runs, parts, strict=True)
            loss = self.update((distance(next(run), p.targets[i]) for run, p in pairs), count)
            total += loss
            if not math.isfinite(loss):
                break
        return total

    def step(self, field: Field, step: Step) -> Tensor:
        """The student's step by the numbers as they are now."""
        table, _ = self.student.decode(self.theta)
        return self.student.solver(table.to(step.now.x))(field, step)

    def whole(self, parts: Sequence[Batch], count: int) -> float:
        """One update, through the whole trajectory."""
        return self.update((self.trajectory_loss(part) for part in parts), count)

    def trajectory_loss(self, part: Batch) -> Tensor:
        """The loss [B] of the end, or of all states."""
        states = list(self.student.sampler(self.theta).states(part.field, part.x))
        if self.options.objective == "final":
            return self.distance_at(True)(states[-1], part.targets[-1])
        pairs = enumerate(zip(states, part.targets, strict=True), 1)
        losses = [self.distance_at(i == len(states))(x, target) for i, (x, target) in pairs]
        return torch.stack(losses).sum(0)

    def distance_at(self, is_end: bool) -> Distance:
        """The distance between states, or at the end."""
        last = self.options.last
        return last if is_end and last is not None else self.options.distance

    def update(self, losses: Iterable[Tensor], count: int) -> float:
        """Adam by the summed gradient of losses [B] of all parts -> the loss a sample."""
        total = torch.zeros(1 + len(self.theta), dtype=torch.float64)
        for loss in losses:
            share = loss.double().sum() / count
            (slope,) = torch.autograd.grad(share, self.theta)
            total += torch.cat([share.detach().cpu().reshape(1), slope])
        total = self.options.reduce(total)
        if not bool(total.isfinite().all()):
            self.skipped += 1
            return math.nan
        self.theta.grad = total[1:]
        for group in self.adam.param_groups:
            group["lr"] = self.lr
        self.adam.step()
        self.updates += 1
        self.ema.lerp_(self.theta.detach(), 1 - self.options.ema)
        return total[0].item()

    @property
    def lr(self) -> float:
        """The learning rate now."""
        done = min(self.seen / max(self.total, 1), 1.0)
        share = (1 + math.cos(math.pi * done)) / 2 if self.options.coslr else 1.0
        return self.options.lr * share

    def judge(self, batches: Sequence[Batch]) -> float:
        """The error of what is learned so far on other batches; the best ever is kept.

        The numbers and their moving average stand for election, and first of all the start.
        """
        now = self.theta.detach()
        if self.error == math.inf:
            self.error = self.error_of(self.best, batches)
        errors = [self.error_of(now, batches), self.error_of(self.ema, batches)]
        for candidate, error in zip((now, self.ema), errors, strict=True):
            if error < self.error:
                self.error, self.best = error, candidate.clone()
        return errors[0]

    def error_of(self, theta: Tensor, batches: Sequence[Batch]) -> float:
        """The root mean squared error of the end, over all ranks' batches."""
        return rmse(self.student.sampler(theta), batches, self.options.reduce)

    def state(self) -> dict[str, Any]:
        """Everything that changes, as tensors and numbers."""
        return {
            "theta": self.theta.detach().clone(),
            "ema": self.ema.clone(),
            "best": self.best.clone(),
            "adam": copy.deepcopy(self.adam.state_dict()),
            **{name: getattr(self, name) for name in ("seen", "updates", "skipped", "error")},
        }

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
        self.seen, self.updates = state["seen"], state["updates"]
        self.skipped, self.error = state["skipped"], state["error"]


@dataclass(frozen=True)
class Checkpointed:
    """A denoiser that keeps nothing for the way back and computes again instead."""

    denoiser: Denoiser

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> x0 [B, *], with the memory of one call at a time."""
        if not torch.is_grad_enabled():
            return self.denoiser(x, sigma, cond)
        x0 = checkpoint(
            self.denoiser, x, sigma, cond, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(x0, Tensor)
        return x0


def checkpointed(batch: Batch) -> Batch:
    """The batch, its network called with gradient checkpointing."""
    slope = dataclasses.replace(batch.field, denoiser=Checkpointed(batch.field.denoiser))
    return dataclasses.replace(batch, field=slope)
