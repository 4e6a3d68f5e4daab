"""Forward-only fitting as a job."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from training.company import Company, my_parts
from training.distill import Plan, Table
from training.fit import FitOptions, fit
from training.refine import RefineOptions, gauss_newton
from training.task import Task
from training.teacher import Batches

PARTS = (-0.9, -0.45, 0.0, 0.45, 0.9)
"""Of the reach, where time scales are tried."""
ENOUGH = 256
"""Trajectories for the fit that a gradient starts from."""


@dataclass
class FitJob:
    """Least squares interval by interval, then Gauss-Newton; no back-propagation."""

    task: Task
    company: Company
    theta: Tensor | None = None
    trajectories: Batches = field(init=False)
    count: int = field(init=False)

    def __post_init__(self) -> None:
        config = self.task.config
        most = config.trajectories if config.method == "fit" else ENOUGH
        self.count = min(
            config.trajectories, max(config.batch, most // config.batch * config.batch)
        )
        self.trajectories = my_parts(self.task, self.company, 0, self.count)

    @property
    def ticks(self) -> int:
        """The fit and, if asked for, the refinement."""
        return 1 + (self.task.config.rounds > 0)

    def tick(self, index: int) -> dict[str, float]:
        """The fit, then the refinement."""
        self.theta = self.fitted() if index == 0 else self.refined()
        return {"trajectories": self.count}

    def fitted(self) -> Tensor:
        """The greedy fit."""
        config, plan = self.task.config, self.task.student.plan
        reach = config.scale_time or 0.0
        options = FitOptions(
            points=config.num_points,
            scale_dir=config.scale_dir,
            time_scales=tuple(1 + reach * part for part in PARTS) if reach else (1.0,),
            reduce=self.summed,
        )
        return self.task.student.encode(fit(plan, self.trajectories, options))

    def refined(self) -> Tensor:
        """All numbers together, end to end."""
        assert self.theta is not None
        return gauss_newton(
            self.task.student,
            self.theta,
            self.trajectories,
            RefineOptions(rounds=self.task.config.rounds, reduce=self.summed),
            report=lambda _round, error: self.company.tell("rmse_train", error),
        )

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, where none is to stop."""
        self.company.agree()
        return self.company.reduce(tensor)

    def result(self) -> tuple[Plan, Table]:
        """The plan, with its grid if that is learned, and the table."""
        assert self.theta is not None
        return self.task.student.decode(self.theta)

    def state(self) -> dict[str, Any]:
        """The numbers."""
        return {"theta": self.theta}

    def load(self, state: dict[str, Any]) -> None:
        """Go on after a phase."""
        self.theta = state["theta"]
