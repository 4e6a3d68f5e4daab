"""Adam, or L-BFGS on the whole set, as a job. N intervals, K points, P free numbers."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from solvers.multistep import MultistepTable
from training.company import Company, my_parts
from training.distances import distance_named
from training.distill import Distance, Plan, Table
from training.fit import HISTORY
from training.gradient import GradientOptions, Learner, checkpointed
from training.lbfgs import LBFGSOptions, lbfgs
from training.stop import Stopped
from training.table import PublishedForm
from training.task import Task


def first_guess(task: Task) -> Tensor:
    """Points spread evenly, equal weights, scales 1; a multistep begins as a midpoint rule."""
    n, k = task.student.plan.intervals, task.config.num_points
    r = ((torch.arange(k, dtype=torch.float64) + 1) / (k + 1)).expand(n, k)
    one = torch.ones(n, k, dtype=torch.float64)
    if not task.config.multistep:
        form = task.student.form
        reach = (form.scale_dir, form.scale_time) if isinstance(form, PublishedForm) else (1, 1)
        parts = [r.logit(), 0 * one, *(0 * one for used in reach if used)]
        return torch.cat([part.flatten() for part in parts])
    known = torch.zeros(n, HISTORY, dtype=torch.float64)
    newest = known.clone()
    newest[:, 1] = 1
    newest[0] = torch.eye(HISTORY, dtype=torch.float64)[0]
    return task.student.encode(MultistepTable(newest, r, one / k, known, one))


@dataclass
class GradientJob:
    """Adam, or L-BFGS where it is asked for."""

    task: Task
    company: Company
    theta: Tensor
    learner: Learner = field(init=False)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.task.config
        assert config.lr is not None
        options = GradientOptions(
            lr=config.lr,
            coslr=config.coslr,
            objective=config.objective,  # pyright: ignore[reportArgumentType]
            distance=self.named(config.distance),
            last=self.named(config.last_distance or config.distance),
            reduce=self.summed,
        )
        student = dataclasses.replace(self.task.student, grid=False)
        self.learner = Learner(student, options, config.trajectories, self.theta)

    def named(self, name: str) -> Distance:
        """A distance by its name."""
        config = self.task.config
        return distance_named(
            name, self.company.network, alpha=config.alpha, as_published=config.published_loss
        )

    @property
    def ticks(self) -> int:
        """So many trajectories each."""
        if self.task.config.lbfgs:
            return 1
        return math.ceil(self.task.config.trajectories / self.size)

    @property
    def size(self) -> int:
        """The trajectories of a tick, whole batches."""
        batch = self.task.config.batch
        return max(1, round(self.task.config.tick * 1000 / batch)) * batch

    def tick(self, index: int) -> dict[str, float]:
        """The rest of tick `index`."""
        if self.task.config.lbfgs:
            return self.whole_set()
        until = min((index + 1) * self.size, self.task.config.trajectories)
        while self.learner.seen < until:
            self.one_batch()
        self.learner.judge(self.task.reference)
        good = [loss for loss in self.losses if math.isfinite(loss)]
        self.losses = []
        learner = self.learner
        found = {"loss": sum(good) / len(good)} if good else {}
        return found | {"trajectories": learner.seen, "skipped": learner.skipped, "lr": learner.lr}

    def one_batch(self) -> None:
        """Learn from the next batch, all of it or nothing."""
        batch = self.task.config.batch
        levels = self.learner.student.plan.sigmas[1:]
        if self.task.config.objective == "final":
            levels = levels[-1:]
        parts = list(my_parts(self.task, self.company, self.learner.seen, batch, levels))
        if self.task.config.checkpointing:
            parts = [checkpointed(part) for part in parts]
        before = self.learner.state()
        try:
            self.losses.append(self.learner.learn(parts, batch))
        except Stopped:
            self.learner.load(before)
            raise
        self.company.tell("loss", self.losses[-1])

    def whole_set(self) -> dict[str, float]:
        """L-BFGS on all trajectories at once."""
        config, learner = self.task.config, self.learner
        end = learner.student.plan.sigmas[-1:]
        batches = my_parts(self.task, self.company, 0, config.trajectories, end)
        options = LBFGSOptions(
            config.lbfgs, seed=config.seed, distance=learner.distance_at(True), reduce=self.summed
        )
        theta, error = lbfgs(learner.student, self.theta, batches, options)
        learner.best, learner.seen = theta, config.trajectories
        return {"trajectories": learner.seen, "rmse_train": error}

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, where none is to stop."""
        self.company.agree()
        return self.company.reduce(tensor)

    def result(self) -> tuple[Plan, Table]:
        """The best on validation."""
        return self.learner.student.decode(self.learner.best)

    def state(self) -> dict[str, Any]:
        """The learner's, and the losses of a tick that is not over."""
        return {**self.learner.state(), "losses": list(self.losses)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on, within a tick or after."""
        self.learner.load(state)
        self.losses = list(state["losses"])
