"""Students: samplers whose table is to be learned, and how far they end from their teacher.

Shapes: B samples, N intervals, K points, P free numbers, * one sample of any shape, x [B, *].
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.epd import EPD, MultistepTable, ParallelMultistep, Table
from solvers.field import Condition, Field
from solvers.integrate import Solver
from solvers.process import VE, Process
from solvers.sampler import Sampler
from src.ranks import all_reduce_sum
from training.table import Form, grid_to_raw, raw_to_grid

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(student [B, *], teacher [B, *]) -> one number per sample [B]."""
Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor to its sum over ranks."""


@dataclass(frozen=True)
class Batch:
    """Noise and where the teacher takes it: x [B, *] at sigmas[0], targets at later levels."""

    field: Field
    x: Tensor
    targets: tuple[Tensor, ...]  # [B, *] each
    numbers: tuple[int, ...] = ()  # of the samples, where they have any

    def part(self, rows: slice) -> "Batch":
        """Some samples of the batch."""
        field = dataclasses.replace(self.field, cond=rows_of(self.field.cond, rows))
        targets = tuple(target[rows] for target in self.targets)
        return Batch(field, self.x[rows], targets, self.numbers[rows])

    def parts(self, count: int) -> Iterator["Batch"]:
        """The batch, at most `count` samples at a time."""
        firsts = range(0, len(self.x), max(1, count))
        return (self.part(slice(i, i + max(1, count))) for i in firsts)


@dataclass(frozen=True)
class Student:
    """A sampler but for its table: P free numbers in, a sampler out.

    `base` is the solver that EPD stands on; None is parallel multistep, which has none. With
    `grid` the inner noise levels are free numbers as well, the last N of the vector.
    """

    sigmas: tuple[float, ...]
    form: Form
    base: Solver | None = None
    process: Process = VE
    afs: bool = False
    grid: bool = False

    @property
    def intervals(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    def encode(self, table: Table) -> Tensor:
        """All that is learned as one vector [P], in float64 on the CPU."""
        extra = [grid_to_raw(self.sigmas)] if self.grid else []
        return torch.cat([self.form.encode(table), *extra])

    def decode(self, theta: Tensor) -> tuple[Table, tuple[float, ...]]:
        """The table and the levels of a vector [P]."""
        if not self.grid:
            return self.form.decode(theta), self.sigmas
        sigmas = raw_to_grid(theta[-self.intervals :], self.sigmas[0], self.sigmas[-1])
        return self.form.decode(theta[: -self.intervals]), sigmas

    def sampler(self, theta: Tensor) -> Sampler:
        """The sampler of a vector [P]."""
        table, sigmas = self.decode(theta)
        return dataclasses.replace(self.holding(table), sigmas=sigmas)

    def holding(self, table: Table) -> Sampler:
        """The sampler of a table, on the levels as they are given."""
        return Sampler(self.solver(table), self.sigmas, self.process, self.afs)

    def solver(self, table: Table) -> Solver:
        """The step of a table; ValueError for a base that EPD cannot stand on."""
        if isinstance(table, MultistepTable):
            return ParallelMultistep(table, self.process, self.afs)
        assert self.base is not None
        return EPD(table, self.base)


def rows_of(cond: Condition | None, index: Tensor | slice) -> Condition | None:
    """Some rows of a condition."""
    if cond is None:
        return None
    null = cond.null and {name: v[index] for name, v in cond.null.items()}
    return Condition({name: v[index] for name, v in cond.given.items()}, null)


def last_state(sampler: Sampler, batch: Batch) -> Tensor:
    """Where a sampler ends, [B, *]."""
    *_, state = sampler.states(batch.field, batch.x)
    return state


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of squared differences of each sample, [B]."""
    return (student - teacher).square().flatten(1).sum(1)


@torch.no_grad()
def squared_error(sampler: Sampler, batches: Sequence[Batch], scale: float = math.inf) -> Tensor:
    """[summed squared error of the ends, how many numbers, sum of its logarithms, samples].

    Below infinity `scale` is the squared error of a sample from which on it counts less and
    less, as scale * log(1 + error / scale) (Cauchy's loss). Of this rank's batches alone.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        error = squared(last_state(sampler, batch), batch.targets[-1]).double().cpu()
        logs = error.clamp(min=1e-30).log().sum()
        if scale < math.inf:
            error = scale * torch.log1p(error / scale)
        counts = torch.tensor([batch.x.numel(), len(batch.x)], dtype=torch.float64)
        total += torch.stack([error.sum(), counts[0], logs, counts[1]])
    return total


def rmse(sampler: Sampler, batches: Sequence[Batch], reduce: Reduce = all_reduce_sum) -> float:
    """The root mean squared error of the ends over the batches of all ranks.

    It is infinite where an end is not a number, or the root of a number too large.
    """
    error, count, *_ = reduce(squared_error(sampler, batches)).tolist()
    return math.sqrt(error / count) if math.isfinite(error) else math.inf
