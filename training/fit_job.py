"""Forward-only fitting as a job."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from training.company import Company, my_parts
from training.distill import Plan, Table
from training.fit import FitOptions, fit
from training.refine import RefineOptions, enough, gauss_newton, squared_error
from training.task import Task
from training.teacher import Batches

PARTS = (-0.9, -0.45, 0.0, 0.45, 0.9)
"""Of the reach, where time scales are tried."""
ENOUGH = 256
"""Trajectories for the fit that a gradient starts from."""

ROBUST = (16.0, 256.0)
"""Scales of a loss that stray samples steer little, before the plain one."""


@dataclass
class FitJob:
    """Least squares interval by interval for each schedule to be tried, the best one refined.

    The refinement is of all numbers together, by Gauss-Newton steps; nothing is back-propagated.
    """

    task: Task
    company: Company
    found: list[tuple[int, float, Tensor]] = field(default_factory=list)
    trajectories: Batches = field(init=False)
    count: int = field(init=False)

    def __post_init__(self) -> None:
        config = self.task.config
        enough = max(config.batch, ENOUGH // config.batch * config.batch)
        self.count = config.trajectories
        if config.uses_gradient:
            self.count = min(self.count, enough)
        self.trajectories = my_parts(self.task, self.company, 0, self.count)

    @property
    def refinements(self) -> tuple[tuple[float, ...], ...]:
        """The phases of each refinement."""
        config = self.task.config
        return ((), ROBUST)[: 1 + config.robust] if config.rounds else ()

    @property
    def per_round(self) -> int:
        """Parts of whole batches, alike on any number of ranks, that a Jacobian needs."""
        parts = len(self.trajectories) * self.task.config.batch // self.count
        needed = -(-enough(self.trajectories) // self.company.ranks)
        return -(-needed // parts) * parts

    @property
    def ticks(self) -> int:
        """A fit for each schedule, then each refinement."""
        return len(self.task.students) + len(self.refinements)

    def tick(self, index: int) -> dict[str, float]:
        """The next fit or refinement."""
        count = len(self.task.students)
        if index < count:
            choice, theta = index, self.fitted(index)
        else:
            choice, _, theta = self.best(self.found[:count])
            theta = self.refined(choice, theta, self.refinements[index - count])
        error = self.error(choice, theta)
        self.found.append((choice, error, theta))
        return {"trajectories": self.count, "rmse_judged": error}

    def fitted(self, choice: int) -> Tensor:
        """The greedy fit on a schedule."""
        config, student = self.task.config, self.task.students[choice]
        reach = config.scale_time or 0.0
        options = FitOptions(
            points=config.num_points,
            scale_dir=config.scale_dir,
            time_scales=tuple(1 + reach * part for part in PARTS) if reach else (1.0,),
            known=config.known,
            reduce=self.summed,
        )
        batches = self.trajectories
        if not config.every:
            batches = batches.at(student.plan.sigmas[1:])
        return student.encode(fit(student.plan, batches, options))

    def refined(self, choice: int, theta: Tensor, robust: tuple[float, ...]) -> Tensor:
        """All numbers together, end to end; judged on other noise as well."""
        student = self.task.students[choice]
        ends = self.trajectories
        if not self.task.config.every:
            ends = ends.at(student.plan.sigmas[-1:])
        return gauss_newton(
            student,
            theta,
            ends,
            RefineOptions(
                rounds=self.task.config.rounds or 0,
                reduce=self.summed,
                robust=robust,
                per_round=self.per_round,
            ),
            judges=[*ends, *self.task.judges],
            report=lambda _round, error: self.company.tell("rmse_train", error),
        )

    def error(self, choice: int, theta: Tensor) -> float:
        """The error on the judges, infinite where it is not a number."""
        parts = squared_error(self.task.students[choice], theta, self.task.judges)
        total, count = self.summed(parts).tolist()
        return math.sqrt(total / count) if math.isfinite(total) else math.inf

    def best(self, found: list[tuple[int, float, Tensor]]) -> tuple[int, float, Tensor]:
        """The one with the least error; ValueError where none has one."""
        best = min(found, key=lambda each: each[1])
        if best[1] == math.inf:
            raise ValueError("no table was found: the network gives numbers that are not finite")
        return best

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, where none is to stop."""
        self.company.agree()
        return self.company.reduce(tensor)

    def result(self) -> tuple[Plan, Table]:
        """The plan, with its grid if that is learned, and the table."""
        choice, _, theta = self.best(self.found)
        return self.task.students[choice].decode(theta)

    def state(self) -> dict[str, Any]:
        """What was found so far."""
        return {"found": [list(each) for each in self.found]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on after a tick."""
        self.found = [(each[0], each[1], each[2]) for each in state["found"]]
