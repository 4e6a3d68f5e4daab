"""Forward-only fitting: tables by least squares, interval by interval, without back-propagation.

A step is linear in the weights, so for given positions the best weights solve a least-squares
problem, and positions are the best K of a grid of G. Memory is that of sampling: the network is
asked K rows at a time, and of its answers only Gram matrices leave a batch. Sums run over
batches and, by `reduce`, over ranks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from solvers.epd import Directions, MultistepTable, Table, combined, earlier_slopes, placed
from solvers.field import Field
from solvers.integrate import MAX_SLOPES, Point, Step
from src.ranks import all_reduce_sum
from training.gram import Mix, Normal, best_free, best_shares, gram, subsets
from training.student import Batch, Reduce, Student, rows_of

HISTORY = 1 + MAX_SLOPES
Visit = Callable[[Field, Step, Tensor], Tensor]
"""(field, step, target [B, *]) -> products of columns [M, M]."""
Placing = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Places r [G] -> points x [B, G, *] and their levels [1, G, 1...]."""


@dataclass(frozen=True)
class FitOptions:
    """How a table is fitted; the defaults serve."""

    points: int = 2  # K
    positions: int = 17  # G; 33 gain nothing that a refinement does not
    scale_dir: float | None = None  # reach of the sum of an EPD step's weights; None is free
    time_scales: tuple[float, ...] = (1.0,)  # choices for the level that the network is told
    time_at_ends: tuple[float, ...] | None = None  # in the first and last interval, if others
    reduce: Reduce = all_reduce_sum

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 4:
            raise ValueError(f"points {self.points} is out of range: fit tries all sets of 1 to 4")
        if not self.points < self.positions <= 129:
            raise ValueError(f"positions {self.positions} must be above points, and at most 129")


@torch.no_grad()
def fit(student: Student, batches: Sequence[Batch], options: FitOptions) -> Table:
    """A table for a student's levels, greedy interval by interval on the student's own states.

    Every batch is run again up to the interval in hand, so nothing but the batches is kept.
    """
    n, k = student.intervals, options.points
    one, none = torch.ones(n, k, dtype=torch.float64), torch.zeros(n, HISTORY, dtype=torch.float64)
    table: Table = Directions(one / 2, one / k, one, one)
    if student.base is None:
        table = MultistepTable(none, one / 2, one / k, none, one)
    for i in range(n):
        scales = options.time_scales
        if options.time_at_ends is not None and i in (0, n - 1):
            scales = options.time_at_ends
        look = partial(total, student, table, batches, i)
        interval = dataclasses.replace(options, time_scales=scales)
        if student.base is not None:
            row = epd_row(student, look, interval)
        elif student.afs and i == 0:
            row = free_row(student, look, interval)
        else:
            row = multistep_row(student, look, interval)
        table = with_row(table, i, row)
    return table


def with_row(table: Table, n: int, row: Sequence[Tensor]) -> Table:
    """The table with another row n in each of its tensors [N, ...]."""
    copies = [tensor.clone() for tensor in table.tensors()]
    for copy, values in zip(copies, row, strict=True):
        copy[n] = values
    return type(table)(*copies)


# --- the student's own path ---------------------------------------------------------------


def total(
    student: Student, table: Table, batches: Sequence[Batch], n: int, visit: Visit
) -> Tensor:
    """Sum over batches of what `visit` gives at interval n of the student's own path."""
    return sum((arrive(student, table, batch, n, visit) for batch in batches), torch.zeros(()))


def arrive(student: Student, table: Table, batch: Batch, n: int, visit: Visit) -> Tensor:
    """What `visit` gives where a batch has been run up to interval n."""
    solver, products = student.solver(table.to(batch.x)), []

    def visiting(field: Field, step: Step) -> Tensor:
        if step.index < n:
            return solver(field, step)
        products.append(visit(field, step, batch.targets[n]))
        return step.now.x

    sampler = dataclasses.replace(student.holding(table), solver=visiting)
    states = sampler.states(batch.field, batch.x, detach=True)
    for _ in range(n + 1):
        next(states)
    return products[0]


def few(
    field: Field, step: Step, target: Tensor, count: int
) -> Iterator[tuple[Field, Step, Tensor]]:
    """The same for at most `count` samples at a time, what they ask unheard by the loop.

    So the slopes at all places are never there for a whole batch.
    """
    for first in range(0, len(target), count):
        rows = slice(first, first + count)
        alone = dataclasses.replace(field, cond=rows_of(field.cond, rows), record=None)
        yield alone, step_of(step, rows), target[rows]


def step_of(step: Step, rows: slice) -> Step:
    """The step of some samples."""

    def cut(point: Point) -> Point:
        return Point(point.sigma, point.x[rows], lambda: point.d[rows])

    past, slopes = map(cut, step.past), (d[rows] for d in step.slopes)
    return dataclasses.replace(step, now=cut(step.now), past=tuple(past), slopes=tuple(slopes))


# --- places to try ------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where slopes are tried: positions r [G], and factors [G] of the level that is told there."""

    r: Tensor
    scale: Tensor

    def slopes(self, field: Field, placing: Placing, like: Tensor) -> Tensor:
        """The slopes [B, G, *], in one call."""
        x, sigma = placing(self.r.to(like))
        return field(x, sigma, self.scale.to(like).reshape(sigma.shape) * sigma)

    def times(self, scales: Sequence[float]) -> "Places":
        """Every place with each of the scales, [G * S]."""
        each = torch.tensor(scales, dtype=torch.float64)
        return Places(self.r.repeat_interleave(len(each)), each.repeat(len(self.r)))

    def share(self, k: int, target: Tensor) -> int:
        """How many samples at all places are as many rows as the batch at K points."""
        return max(1, len(target) * k // len(self.r))


def chosen(
    options: FitOptions, inside: bool, search: Callable[[Places, Tensor], tuple[Mix, Tensor]]
) -> tuple[Places, Tensor, Tensor]:
    """The K places of an interval, a coefficient [K] of any sign for each, and what else there is.

    `search(places, choices [n, K] of them)` gives the best choice, and coefficients besides.
    Positions first, then their time scales. `inside` leaves out r = 0, which EPD has anyway.
    """
    g, k, scales = options.positions, options.points, options.time_scales
    r = torch.linspace(0, 1, g + 2, dtype=torch.float64)[1:-1] if inside else None
    r = torch.linspace(0, 1, g, dtype=torch.float64) if r is None else r
    places = Places(r, torch.ones_like(r))
    mix, besides = search(places, subsets(g, k))
    places, coefficients = filled(mix, places, k)
    if len(scales) > 1:
        blocks = [torch.arange(len(scales)) + i * len(scales) for i in range(k)]
        wider = places.times(scales)
        mix, besides = search(wider, torch.cartesian_prod(*blocks).reshape(-1, k))
        scale, coefficients = places.scale.clone(), torch.zeros_like(coefficients)
        for column, value in zip(mix.columns, mix.coefficients, strict=True):
            at = column // len(scales)
            scale[at], coefficients[at] = wider.scale[column], value
        places = Places(places.r, scale)
    return places, coefficients, besides


def filled(mix: Mix, places: Places, k: int) -> tuple[Places, Tensor]:
    """K places, rising, where a mix has fewer: the rest are spread out and weigh nothing."""
    free = [i for i in range(len(places.r)) if i not in mix.columns]
    spread = [free[int(len(free) * (i + 1) / (k + 1))] for i in range(k - len(mix.columns))]
    columns = torch.tensor([*mix.columns, *spread])
    coefficients = torch.cat([mix.coefficients, torch.zeros(len(spread), dtype=torch.float64)])
    order = places.r[columns].argsort()
    columns = columns[order]
    return Places(places.r[columns], places.scale[columns]), coefficients[order]


# --- EPD ----------------------------------------------------------------------------------


def epd_row(
    student: Student, look: Callable[[Visit], Tensor], options: FitOptions
) -> tuple[Tensor, ...]:
    """r, weight, time_scale and dir_scale [K] of the interval that `look` looks at."""

    def search(places: Places, choices: Tensor) -> tuple[Mix, Tensor]:
        normal = Normal.of(options.reduce(look(partial(products_epd, student, places, options))))
        if options.scale_dir is None:
            return best_free(normal, choices), normal.q[:0]
        reach = 1 - options.scale_dir, 1 + options.scale_dir
        return best_shares(normal, choices, reach), normal.q[:0]

    places, coefficients, _ = chosen(options, True, search)
    size = coefficients.abs().sum()
    if size == 0:
        return places.r, torch.full_like(places.r, 1 / options.points), places.scale, coefficients
    signs = torch.where(coefficients < 0, -size, size)
    return places.r, coefficients.abs() / size, places.scale, signs


def products_epd(
    student: Student, places: Places, options: FitOptions, field: Field, step: Step, target: Tensor
) -> Tensor:
    """Products of the ways [G] along directions that the base reaches, and to the target."""
    base = student.base
    assert base is not None
    products = torch.zeros(())
    for part, here, wanted in few(field, step, target, places.share(options.points, target)):

        def placing(r: Tensor, part: Field = part, here: Step = here) -> tuple[Tensor, Tensor]:
            sigma = here.now.sigma * torch.as_tensor(here.sigma_next / here.now.sigma).to(r) ** r
            sigma = sigma.reshape(1, -1, *[1] * (here.now.x.ndim - 2))
            return base(part, dataclasses.replace(here, sigma_next=sigma)), sigma

        d = places.slopes(part, placing, here.now.x).mul_(here.h)
        products = products + gram([d, wanted.unsqueeze(1) - here.now.x])
    return products


# --- parallel multistep -------------------------------------------------------------------


def multistep_row(
    student: Student, look: Callable[[Visit], Tensor], options: FitOptions
) -> tuple[Tensor, ...]:
    """a, r, weight, b and time_scale of the interval that `look` looks at."""
    a = Normal.of(options.reduce(look(partial(products_behind, student)))).solve()

    def search(places: Places, choices: Tensor) -> tuple[Mix, Tensor]:
        visit = partial(products_ahead, student, a, places, options.points)
        return best_beside(Normal.of(options.reduce(look(visit))), choices, len(a))

    places, weight, b = chosen(options, False, search)
    return padded(a), places.r, weight, padded(b), places.scale


def free_row(
    student: Student, look: Callable[[Visit], Tensor], options: FitOptions
) -> tuple[Tensor, ...]:
    """The row of an interval without a call: only the free slope's coefficient in b."""
    b = Normal.of(options.reduce(look(partial(products_behind, student)))).solve()
    none = torch.zeros(options.points, dtype=torch.float64)
    return padded(0 * b), none, none, padded(b), none + 1


def padded(coefficients: Tensor) -> Tensor:
    """The coefficients of HISTORY slopes, 0 for those that are not there yet."""
    return torch.nn.functional.pad(coefficients, (0, HISTORY - len(coefficients)))


def best_beside(normal: Normal, choices: Tensor, count: int) -> tuple[Mix, Tensor]:
    """The best choice of columns beside the last `count` ones, which are always there."""
    rest, held = torch.arange(len(normal.q)).tensor_split([-count])
    mix = best_free(normal.without(held, rest), choices)
    both = normal.take(torch.cat([torch.tensor(mix.columns), held])).solve()
    return dataclasses.replace(mix, coefficients=both[:-count]), both[-count:]


def products_behind(student: Student, _field: Field, step: Step, target: Tensor) -> Tensor:
    """Products of the slopes that are there already with the mean slope to the target."""
    slope = (target.unsqueeze(1) - step.now.x) / step.h
    return gram([*earlier_slopes(step, student.process)[:HISTORY], slope])


def products_ahead(
    student: Student, a: Tensor, places: Places, k: int, field: Field, step: Step, target: Tensor
) -> Tensor:
    """Products of the new slopes, those there already, and the mean slope to the target."""
    products = torch.zeros(())
    for part, here, wanted in few(field, step, target, places.share(k, target)):
        x = here.now.x
        behind = earlier_slopes(here, student.process)[: len(a)]
        slope = combined(a.to(x), behind)
        d = places.slopes(part, partial(placed, here, slope), x)
        products = products + gram([d, *behind, (wanted.unsqueeze(1) - x) / here.h])
    return products
