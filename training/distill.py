"""Students, their teachers, and the losses between them: pure functions over the one loop.

Shapes: B samples, N intervals, K points, * one sample of any shape, x [B, *].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.epd import EPD, Directions
from solvers.exponential import UniPC
from solvers.field import Field
from solvers.integrate import Solver, integrate
from solvers.multistep import MultistepTable, ParallelMultistep
from solvers.process import VE, Process

Table: TypeAlias = Directions | MultistepTable
Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(student [B, *], teacher [B, *]) -> one number per sample [B]."""


@dataclass(frozen=True)
class Batch:
    """Noise and where the teacher takes it: x [B, *] at sigmas[0], targets at sigmas[1:]."""

    field: Field
    x: Tensor
    targets: tuple[Tensor, ...]  # N of [B, *]


@dataclass(frozen=True)
class Plan:
    """All of a student but its table: the grid, and what the table is read by.

    `base` is the solver that EPD stands on; None is parallel multistep, which has none.
    """

    sigmas: tuple[float, ...]
    process: Process = VE
    base: Solver | None = None
    afs: bool = False

    def __post_init__(self) -> None:
        if self.base is None and self.afs:
            raise ValueError("parallel multistep needs no afs: its first call places itself")

    @property
    def intervals(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    def solver(self, table: Table, like: Tensor) -> Solver:
        """The student's step, its table on the device and in the dtype of `like`.

        Raises ValueError for a table of the other kind.
        """
        if isinstance(table, Directions) and self.base is not None:
            return EPD(table.to(like), self.base)
        if isinstance(table, MultistepTable) and self.base is None:
            return ParallelMultistep(table.to(like), self.process)
        kind = "parallel multistep" if self.base is None else "EPD"
        raise ValueError(f"{kind} cannot read a table of the kind {type(table).__name__}")

    def run(
        self, solver: Solver, field: Field, x: Tensor, *, detach: bool = False
    ) -> Iterator[Tensor]:
        """The states [B, *] at sigmas[1], ..., from x at sigmas[0]."""
        first = self.process.first_slope if self.afs else None
        return integrate(solver, field, x, self.sigmas, first_slope=first, detach=detach)

    def states(self, table: Table, batch: Batch, *, detach: bool = False) -> Iterator[Tensor]:
        """The student's states on a batch's noise."""
        return self.run(self.solver(table, batch.x), batch.field, batch.x, detach=detach)


@torch.no_grad()
def teacher_states(
    solver: Solver, field: Field, x: Tensor, sigmas: Tensor | Sequence[float], *, every: int = 1
) -> tuple[Tensor, ...]:
    """A teacher's states at every `every`-th level of its grid, without the start.

    `sigmas` is the fine grid, of (M + 1) N + 1 levels with M = every - 1 extra points in each
    of the student's intervals (EPD-Solver, arXiv:2507.14797, Sec. 3.3). Float32 at least.

    Raises ValueError where the grid does not divide.
    """
    intervals = len(sigmas) - 1
    if intervals % every:
        raise ValueError(f"a teacher grid of {intervals} intervals is no multiple of {every}")
    correct = solver.correct if isinstance(solver, UniPC) else None
    states = integrate(solver, field, x, sigmas, correct=correct)
    return tuple(state for i, state in enumerate(states, 1) if i % every == 0)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of squared differences of each sample, [B]."""
    return (student - teacher).square().flatten(1).sum(1)


def step_losses(
    plan: Plan, table: Table, batch: Batch, distance: Distance = squared
) -> Iterator[Tensor]:
    """Every interval's loss [B], each step learning alone from the student's own state."""
    states = plan.states(table, batch, detach=True)
    for state, target in zip(states, batch.targets, strict=True):
        yield distance(state, target)


def final_loss(plan: Plan, table: Table, batch: Batch, distance: Distance = squared) -> Tensor:
    """The loss [B] of the end alone, through the whole trajectory."""
    return distance(last_state(plan, table, batch), batch.targets[-1])


def whole_loss(plan: Plan, table: Table, batch: Batch, distance: Distance = squared) -> Tensor:
    """The sum [B] of all intervals' losses, through the whole trajectory."""
    states = plan.states(table, batch)
    pairs = zip(states, batch.targets, strict=True)
    return torch.stack([distance(x, y) for x, y in pairs]).sum(0)


def last_state(plan: Plan, table: Table, batch: Batch) -> Tensor:
    """Where the student ends, [B, *]."""
    *_, state = plan.states(table, batch)
    return state


def rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference over all numbers of two solutions of the same noise."""
    return (a.double() - b.double()).square().mean().sqrt().item()


@torch.no_grad()
def table_rmse(plan: Plan, table: Table, batches: Sequence[Batch]) -> float:
    """The error of a table's last state to the teacher's, over batches of any sizes."""
    total = count = 0.0
    for batch in batches:
        total += squared(last_state(plan, table, batch), batch.targets[-1]).double().sum().item()
        count += batch.x.numel()
    return (total / count) ** 0.5
