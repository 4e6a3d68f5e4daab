"""The methods by name."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from training.company import Company, Job
from training.distill import Plan, Table
from training.fit_job import FitJob
from training.gradient_job import GradientJob, first_guess
from training.settings import check_batch
from training.task import Task


def make_job(task: Task, company: Company) -> Job:
    """The job of the configured method.

    Raises ValueError where the batch does not divide or the distance lacks its network.
    """
    check_batch(task.config, company.ranks)
    if task.config.method == "gradient":
        return GradientJob(task, company, first_guess(task))
    fitted = FitJob(task, company)
    return fitted if task.config.method == "fit" else FitThenGradient(task, company, fitted)


@dataclass
class FitThenGradient:
    """A gradient that starts from a fit, on the grid that the fit learned."""

    task: Task
    company: Company
    fitted: FitJob
    gradient: GradientJob | None = None

    def __post_init__(self) -> None:
        # so that a wrong setting is found now; the numbers come after the fit
        self.size = GradientJob(self.task, self.company, first_guess(self.task)).ticks

    @property
    def ticks(self) -> int:
        """Those of the fit, then those of the gradient."""
        return self.fitted.ticks + self.size

    def tick(self, index: int) -> dict[str, float]:
        """A tick of the one or of the other."""
        if index < self.fitted.ticks:
            return self.fitted.tick(index)
        if self.gradient is None:
            self.gradient = self.start()
        return self.gradient.tick(index - self.fitted.ticks)

    def start(self) -> GradientJob:
        """The gradient from where the fit is."""
        plan, table = self.fitted.result()
        student = dataclasses.replace(self.task.student, plan=plan, grid=False)
        task = dataclasses.replace(self.task, students=(student,))
        return GradientJob(task, self.company, student.encode(table))

    def result(self) -> tuple[Plan, Table]:
        """The best so far."""
        return (self.gradient or self.fitted).result()

    def state(self) -> dict[str, Any]:
        """Both."""
        second = None if self.gradient is None else self.gradient.state()
        return {"fit": self.fitted.state(), "gradient": second}

    def load(self, state: dict[str, Any]) -> None:
        """Go on in either."""
        self.fitted.load(state["fit"])
        if state["gradient"] is not None:
            self.gradient = self.start()
            self.gradient.load(state["gradient"])
