"""Students: samplers whose table is to be learned, and how far they end from their teacher.

Shapes: B samples, N intervals, K points, P free numbers, * one sample of any shape, x [B, *].
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from solvers.epd import EPD, MultistepTable, ParallelMultistep, Table
from solvers.field import Condition, Field
from solvers.integrate import Solver
from solvers.process import VE, Process
from solvers.sampler import Sampler
from src.ranks import all_reduce_sum
from src.seeds import generator
from training.table import EDGE, HISTORY, Form, even_table, grid_to_raw, raw_to_grid

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(student [B, *], teacher [B, *]) -> one number per sample [B]."""
Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor to its sum over ranks."""


@dataclass(frozen=True)
class Trajectories:
    """Noise and where the teacher takes it: x [B, *] at sigmas[0], targets at later levels."""

    field: Field
    x: Tensor
    targets: tuple[Tensor, ...]  # [B, *] each
    numbers: tuple[int, ...] = ()  # of the samples, where they have any

    def part(self, rows: slice) -> "Trajectories":
        """Some of the samples."""
        field = dataclasses.replace(self.field, cond=rows_of(self.field.cond, [rows]))
        targets = tuple(target[rows] for target in self.targets)
        return Trajectories(field, self.x[rows], targets, self.numbers[rows])

    def parts(self, count: int) -> Iterator["Trajectories"]:
        """The same, at most `count` samples at a time."""
        count = max(1, count)
        return (self.part(slice(i, i + count)) for i in range(0, len(self.x), count))


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

    def even_table(self) -> Table:
        """A table by hand, of this student's kind."""
        history = HISTORY if self.base is None else 0
        return even_table(self.intervals, self.form.points, history)

    def encode(self, table: Table, edge: float = EDGE) -> Tensor:
        """All that is learned as one vector [P], in float64 on the CPU."""
        extra = [grid_to_raw(self.sigmas)] if self.grid else []
        return torch.cat([self.form.encode(table, edge), *extra])

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

    @cached_property
    def changes(self) -> list[list[list[bool]]]:
        """Which points of which call each of the P numbers changes: [P, calls, K of the call].

        Seen on a network of one number, at numbers as good as any, so that no rows of the real
        one are ever compared, for which a GPU would be waited for.
        """
        theta = self.encode(self.even_table())
        noise = torch.empty_like(theta).normal_(0, 0.1, generator=generator(0, "changes"))
        calls: list[tuple[Tensor, Tensor]] = []

        def probe(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
            calls.append((x[:, 0], sigma))
            return x.sin() / (1 + sigma[:, None])

        def asked(theta: Tensor) -> list[tuple[Tensor, Tensor]]:
            calls.clear()
            start = torch.full((1, 1), self.sigmas[0], dtype=torch.float64)
            for _ in self.sampler(theta).states(Field(probe), start):
                pass
            return list(calls)

        with torch.no_grad():
            before = asked(theta + noise)
            each = (asked(theta + noise + row) for row in 1e-3 * torch.eye(len(theta)).double())
            return [
                [
                    ((x != y) | (s != t)).tolist()
                    for (x, s), (y, t) in zip(one, before, strict=True)
                ]
                for one in each
            ]


def rows_of(cond: Condition | None, parts: Sequence[slice]) -> Condition | None:
    """Some rows of a condition."""
    if cond is None:
        return None
    null = cond.null and {name: cut(v, parts) for name, v in cond.null.items()}
    return Condition({name: cut(v, parts) for name, v in cond.given.items()}, null)


def cut(tensor: Tensor, parts: Sequence[slice]) -> Tensor:
    """Some rows of a tensor, by no index that would have to be sent to it."""
    return tensor[parts[0]] if len(parts) == 1 else torch.cat([tensor[part] for part in parts])


def sent(samplers: Sequence[Sampler], like: Tensor) -> list[Sampler]:
    """The samplers with their tables where `like` is, all sent at once."""
    solvers: list[Any] = [sampler.solver for sampler in samplers]
    tensors = [t for solver in solvers for t in solver.table.tensors()]
    flat = torch.cat([t.flatten() for t in tensors]).to(like)
    pieces = iter(flat.split([t.numel() for t in tensors]))
    moved = []
    for sampler, solver in zip(samplers, solvers, strict=True):
        table = solver.table
        table = type(table)(*(next(pieces).reshape(t.shape) for t in table.tensors()))
        solver = dataclasses.replace(solver, table=table)
        moved.append(dataclasses.replace(sampler, solver=solver))
    return moved


def last_state(sampler: Sampler, batch: Trajectories) -> Tensor:
    """Where a sampler ends, [B, *]."""
    *_, state = sampler.states(batch.field, batch.x)
    return state


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of squared differences of each sample, [B]."""
    return (student - teacher).square().flatten(1).sum(1)


@torch.no_grad()
def squared_errors(
    samplers: Sequence[Sampler], batches: Sequence[Trajectories]
) -> tuple[Tensor, int]:
    """Squared errors [S, n] of the ends of this rank's n samples, and the numbers of a sample.

    In float64 on the CPU; a GPU is waited for once.
    """
    parts, size = [], 0
    for batch in batches:
        ends = (last_state(sampler, batch) for sampler in sent(samplers, batch.x))
        parts.append(torch.stack([squared(end, batch.targets[-1]) for end in ends]).double())
        size = batch.x[0].numel()
    empty = torch.zeros(len(samplers), 0, dtype=torch.float64)
    return (torch.cat(parts, 1).cpu() if parts else empty), size


def rmses(
    samplers: Sequence[Sampler],
    batches: Sequence[Trajectories],
    reduce: Reduce = all_reduce_sum,
    scale: float = math.inf,
) -> list[float]:
    """The root mean squared errors of samplers' ends over the batches of all ranks.

    Infinite where an end is not a number, or the root of a number too large. Below infinity
    `scale` is the squared error of a sample from which on it counts less and less, as
    scale * log(1 + error / scale) (Cauchy's loss).
    """
    error, size = squared_errors(samplers, batches)
    if scale < math.inf:
        error = scale * torch.log1p(error / scale)
    count = torch.tensor([float(error.shape[1] * size)], dtype=torch.float64)
    *sums, numbers = reduce(torch.cat([error.sum(1), count])).tolist()
    return [math.sqrt(e / numbers) if math.isfinite(e) else math.inf for e in sums]


def rmse(
    sampler: Sampler, batches: Sequence[Trajectories], reduce: Reduce = all_reduce_sum
) -> float:
    """The same of one sampler."""
    return rmses([sampler], batches, reduce)[0]
