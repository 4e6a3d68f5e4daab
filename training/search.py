"""Where a fit looks: the student's own path up to an interval, and places to try in there."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.field import Field
from solvers.integrate import MAX_SLOPES, Point, Step
from training.distill import Batch, Plan, Table
from training.grams import Mix
from training.memo import rows

Reduce = Callable[[Tensor], Tensor]
Visit = Callable[[Field, Step, Tensor], Tensor]
"""(field, step, target [B, *]) -> products of columns [M, M]."""
Placing = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Places r [K] -> points x [B, K, *] and their levels [1, K, 1...]."""
HISTORY = 1 + MAX_SLOPES


def alone(tensor: Tensor) -> Tensor:
    """The sum over ranks where there is one rank."""
    return tensor


@dataclass(frozen=True)
class FitOptions:
    """How a table is fitted; the defaults serve."""

    points: int = 2  # K
    positions: int = 17  # G; 33 gain nothing that a refinement does not
    scale_dir: float | None = None  # reach of the sum of an EPD step's weights; None is free
    time_scales: tuple[float, ...] = (1.0,)  # choices for the level that the network is told
    history: int = HISTORY  # H, of parallel multistep
    known: int = 0  # H, of EPD
    reduce: Reduce = alone

    def __post_init__(self) -> None:
        reach = self.scale_dir
        if not 1 <= self.points <= 4:
            raise ValueError(f"points {self.points} is out of range: fit tries all sets of 1 to 4")
        if not self.points < self.positions <= 129:
            raise ValueError(f"positions {self.positions} must be above points, and at most 129")
        if reach is not None and not 0 <= reach <= 1:
            raise ValueError(f"scale_dir {reach} is out of range: 0 to 1, or none for free")
        if not self.time_scales or min(self.time_scales) <= 0:
            raise ValueError(f"time_scales {self.time_scales} must be one or more factors above 0")
        if not 1 <= self.history <= HISTORY:
            raise ValueError(f"history {self.history} is out of range: 1 to {HISTORY}")
        if not 0 <= self.known <= HISTORY:
            raise ValueError(f"known {self.known} is out of range: 0 to {HISTORY}")
        if self.known and reach is not None:
            raise ValueError(f"known {self.known} needs free weights: leave out scale_dir {reach}")


@dataclass(frozen=True)
class Places:
    """Where slopes are tried: positions r [G], and what the network is told there [G]."""

    r: Tensor
    told: Tensor

    def ask(self, field: Field, placing: Placing, like: Tensor) -> Tensor:
        """The slopes [B, G, *], in one call."""
        x, sigma = placing(self.r.to(like))
        return field(x, sigma, self.told.to(like).reshape(sigma.shape) * sigma)

    def times(self, scales: Sequence[float]) -> "Places":
        """Every place with each of the scales, [G * S]."""
        each = torch.tensor(scales, dtype=torch.float64)
        return Places(self.r.repeat_interleave(len(each)), each.repeat(len(self.r)))


def even(plan: Plan, count: int) -> Places:
    """G places: inside (0, 1) for EPD, where r = 0 is the slope it has anyway; else from 0 on."""
    if plan.base is not None:
        r = torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1]
    else:
        r = torch.linspace(0, 1, count, dtype=torch.float64)
    return Places(r, torch.ones_like(r))


def total(plan: Plan, table: Table, batches: Sequence[Batch], n: int, visit: Visit) -> Tensor:
    """Sum over batches of what `visit` finds at interval n on the student's own path."""
    return sum((arrive(plan, table, batch, n, visit) for batch in batches), torch.zeros(()))


def arrive(plan: Plan, table: Table, batch: Batch, n: int, visit: Visit) -> Tensor:
    """Run a batch up to interval n and look around there."""
    solver, found = plan.solver(table, batch.x), []

    def watching(field: Field, step: Step) -> Tensor:
        if step.index < n:
            return solver(field, step)
        found.append(visit(field, step, batch.targets[n]))
        return step.now.x

    states = plan.run(watching, batch.field, batch.x, detach=True)
    for _ in range(n + 1):
        next(states)
    return found[0]


def few(
    field: Field, step: Step, target: Tensor, count: int
) -> Iterator[tuple[Field, Step, Tensor]]:
    """The same for at most `count` samples at a time, what they ask unheard by the loop.

    So the slopes at all places are never there for a whole batch.
    """
    for first in range(0, len(target), count):
        part = slice(first, first + count)
        alone = dataclasses.replace(field, cond=rows(field.cond, part), heard=None)
        yield alone, step_of(step, part), target[part]


def step_of(step: Step, part: slice) -> Step:
    """The step of some samples."""

    def cut(point: Point) -> Point:
        return Point(point.sigma, point.x[part], lambda: point.d[part])

    past, slopes = map(cut, step.past), (d[part] for d in step.slopes)
    return dataclasses.replace(step, now=cut(step.now), past=tuple(past), slopes=tuple(slopes))


@dataclass(frozen=True)
class Chosen:
    """The K points of an interval: places, and a coefficient [K] of any sign each."""

    places: Places
    coefficients: Tensor


def filled(mix: Mix, places: Places, k: int) -> Chosen:
    """K points, rising, where a mix has fewer: the rest are spread out and weigh nothing."""
    free = [i for i in range(len(places.r)) if i not in mix.columns]
    spread = [free[int(len(free) * (i + 1) / (k + 1))] for i in range(k - len(mix.columns))]
    columns = torch.tensor([*mix.columns, *spread])
    coefficients = torch.cat([mix.coefficients, torch.zeros(len(spread), dtype=torch.float64)])
    order = places.r[columns].argsort()
    columns = columns[order]
    return Chosen(Places(places.r[columns], places.told[columns]), coefficients[order])


def one_of_each(points: int, scales: int) -> Tensor:
    """The [scales^K, K] ways of one column from each of K blocks of columns."""
    blocks = [torch.arange(scales) + i * scales for i in range(points)]
    return torch.cartesian_prod(*blocks).reshape(-1, points)


def rescaled(mix: Mix, places: Places, before: Chosen) -> Chosen:
    """The points of `before` with the scales of a mix of `places`; the unused stay as they are."""
    told, coefficients = before.places.told.clone(), torch.zeros_like(before.coefficients)
    width = len(places.r) // len(told)
    for column, value in zip(mix.columns, mix.coefficients, strict=True):
        told[column // width], coefficients[column // width] = places.told[column], value
    return Chosen(Places(before.places.r, told), coefficients)
