"""What a method at work is, and whom it works with.

A tick is what is done between two checkpoints: so many trajectories of Adam, or one phase of a
fit. A job's state can be written down between batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from training.distances import Network
from training.distill import Plan, Table
from training.gradient import Reduce, alone
from training.settings import check_batch
from training.task import Task
from training.teacher import Batches, in_parts

Tell = Callable[[str, float], object]
"""Hears how a number moves on the way: name, value."""


@dataclass(frozen=True)
class Company:
    """The other ranks, who listens, and the network of features."""

    ranks: int = 1
    rank: int = 0
    reduce: Reduce = alone  # a sum over ranks
    agree: Callable[[], object] = lambda: None  # raises on all ranks where one is to stop
    tell: Tell = lambda _name, _value: None
    network: Network | None = None


class Job(Protocol):
    """A method at work."""

    @property
    def ticks(self) -> int:
        """How many there are in all."""
        ...

    def tick(self, index: int) -> dict[str, float]:
        """Do tick `index` (from 0), or the rest of it -> what is to be told of it."""
        ...

    def result(self) -> tuple[Plan, Table]:
        """The best plan and table so far."""
        ...

    def state(self) -> dict[str, Any]:
        """All that changes."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; ValueError where it is of another task."""
        ...


def my_parts(
    task: Task, company: Company, first: int, count: int, levels: tuple[float, ...] = ()
) -> Batches:
    """The share of this rank in each batch of `count` trajectories from `first` on.

    It is cut into what fits at once. `levels` are those where targets are wanted, for a teacher
    that knows more.
    """
    batch, size = task.config.batch, check_batch(task.config, company.ranks)
    mine = batch // company.ranks
    starts = range(first + company.rank * mine, first + count, batch)
    parts = [part for start in starts for part in in_parts(range(start, start + mine), size)]
    batches = Batches(task.source, tuple(parts))
    return batches if task.config.every else batches.at(levels)
