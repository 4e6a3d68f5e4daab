"""Forward-only fitting: tables by least squares, interval by interval, without back-propagation.

A step is linear in the weights, so for given positions the best weights solve a least-squares
problem, and positions are the best K of a grid of G. Memory is that of sampling: the network is
asked K rows at a time, and of its answers only Gram matrices leave a batch. Sums run over
batches and, by `reduce`, over ranks; a GPU is waited for once a sum.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.epd import Table, combined, earlier_slopes, placed
from solvers.field import Field
from solvers.integrate import Point, Step
from src.ranks import all_reduce_sum
from training.gram import Mix, Normal, best_free, best_shares, gram
from training.student import Reduce, Student, Trajectories, rows_of
from training.table import HISTORY

Visit: TypeAlias = Callable[[Field, Step, Tensor], Tensor]
"""(field, step, target [B, *]) -> products of columns [M, M]."""
Look: TypeAlias = Callable[[Visit], Normal]
"""What a visit gives, summed over all samples at an interval."""


@torch.no_grad()
def fit(
    student: Student,
    batches: Sequence[Trajectories],
    *,
    positions: int = 17,
    scale_dir: float | None = None,
    time_scales: tuple[float, ...] = (1.0,),
    time_at_ends: tuple[float, ...] | None = None,
    reduce: Reduce = all_reduce_sum,
) -> Table:
    """A table for a student's levels, greedy interval by interval on the student's own states.

    `positions` is G (33 gain nothing that a refinement does not), `scale_dir` the reach of the
    sum of an EPD step's weights (None: free), `time_scales` are choices for the level that the
    network is told, `time_at_ends` those of the first and the last interval, if others. Every
    batch is run again up to the interval in hand, so nothing but the batches is kept.
    """
    n, k = student.intervals, student.form.points
    table = student.even_table()
    for i in range(n):

        def look(visit: Visit, i: int = i, table: Table = table) -> Normal:
            sums = (arrive(student, table, batch, i, visit) for batch in batches)
            return Normal.of(reduce(sum(sums, torch.zeros(())).cpu()))

        scales = time_scales if time_at_ends is None or i not in (0, n - 1) else time_at_ends
        if student.base is not None:
            row = epd_row(student, look, positions, scales, scale_dir)
        elif student.afs and i == 0:  # no call: the free slope's coefficient alone
            b = look(lambda _field, step, target: behind(student, step, target)).solve()
            none = torch.zeros(k, dtype=torch.float64)
            row = padded(0 * b), none, none, padded(b), none + 1
        else:
            row = multistep_row(student, look, positions, scales)
        tensors = [tensor.clone() for tensor in table.tensors()]
        for tensor, values in zip(tensors, row, strict=True):
            tensor[i] = values
        table = type(table)(*tensors)
    return table


def arrive(student: Student, table: Table, batch: Trajectories, n: int, visit: Visit) -> Tensor:
    """What `visit` gives where a batch has been run up to interval n of the student's own path."""
    solver, products = student.solver(table.to(batch.x)), []

    def visiting(field: Field, step: Step) -> Tensor:
        if step.index < n:
            return solver(field, step)
        products.append(visit(field, step, batch.targets[n]))
        return step.now.x

    sampler = dataclasses.replace(student.holding(table), solver=visiting)
    trajectory = sampler.states(batch.field, batch.x, detach=True)
    for _ in range(n + 1):
        next(trajectory)
    return products[0]


def few(
    field: Field, step: Step, target: Tensor, count: int
) -> Iterator[tuple[Field, Step, Tensor]]:
    """The same for at most `count` samples at a time, what they ask unheard by the loop.

    So the slopes at all places are never there for a whole batch.
    """
    for first in range(0, len(target), count):
        rows = slice(first, first + count)

        def cut(point: Point, rows: slice = rows) -> Point:
            return Point(point.sigma, point.x[rows], lambda: point.d[rows])

        past, slopes = tuple(map(cut, step.past)), tuple(d[rows] for d in step.slopes)
        part = dataclasses.replace(step, now=cut(step.now), past=past, slopes=slopes)
        cond = rows_of(field.cond, [rows])
        yield dataclasses.replace(field, cond=cond, record=None), part, target[rows]


@dataclass(frozen=True)
class Places:
    """Where slopes are tried: positions r [G], and factors [G] of the level that is told there."""

    r: Tensor
    scale: Tensor

    def to(self, like: Tensor) -> "Places":
        """The places where `like` is, sent at once."""
        return Places(*torch.stack([self.r, self.scale]).to(like))


def choose(
    r: Tensor,
    k: int,
    scales: Sequence[float],
    search: Callable[[Places, Tensor], tuple[Mix, Tensor]],
) -> tuple[Places, Tensor, Tensor]:
    """K of the positions r [G], a coefficient [K] of any sign for each, and what else there is.

    `search(places, choices [n, K] of them)` gives the best choice, and coefficients besides.
    Positions first, rising; where a mix has fewer than K, the rest are spread out and weigh
    nothing. Then their time scales.
    """
    places, g = Places(r, torch.ones_like(r)), len(r)
    mix, besides = search(places, torch.tensor(list(combinations(range(g), k))))
    free = [i for i in range(g) if i not in mix.columns]
    lacking = k - len(mix.columns)
    spread = [free[int(len(free) * (i + 1) / (k + 1))] for i in range(lacking)]
    columns = torch.tensor([*mix.columns, *spread])
    order = r[columns].argsort()
    places = Places(r[columns][order], places.scale[columns][order])
    coefficients = torch.nn.functional.pad(mix.coefficients, (0, lacking))[order]
    if len(scales) > 1:
        count, each = len(scales), torch.tensor(scales, dtype=torch.float64)
        wider = Places(places.r.repeat_interleave(count), each.repeat(k))
        blocks = torch.arange(k * count).reshape(k, count).unbind()
        mix, besides = search(wider, torch.cartesian_prod(*blocks).reshape(-1, k))
        scale, coefficients = places.scale.clone(), torch.zeros_like(coefficients)
        for column, value in zip(mix.columns, mix.coefficients, strict=True):
            scale[column // count], coefficients[column // count] = wider.scale[column], value
        places = Places(places.r, scale)
    return places, coefficients, besides


def epd_row(
    student: Student, look: Look, g: int, scales: Sequence[float], scale_dir: float | None
) -> tuple[Tensor, ...]:
    """r, weight, time_scale and dir_scale [K] of the interval that `look` looks at."""
    base, k = student.base, student.form.points
    assert base is not None

    def search(places: Places, choices: Tensor) -> tuple[Mix, Tensor]:
        def ways(field: Field, step: Step, target: Tensor) -> Tensor:
            """Products of the ways along directions that the base reaches, and to the target."""
            products, at = torch.zeros(()), places.to(target)
            share = max(1, len(target) * k // len(places.r))
            for part, here, wanted in few(field, step, target, share):
                now = here.now
                ratio = torch.tensor(here.sigma_next / now.sigma).item()  # rounded to float32
                sigma = now.sigma * ratio**at.r
                sigma = sigma.reshape(1, -1, *[1] * (now.x.ndim - 2))
                x = base(part, dataclasses.replace(here, sigma_next=sigma))
                d = part(x, sigma, at.scale.reshape(sigma.shape) * sigma).mul_(here.h)
                products = products + gram([d, wanted.unsqueeze(1) - now.x])
            return products

        normal = look(ways)
        if scale_dir is None:
            return best_free(normal, choices), normal.q[:0]
        return best_shares(normal, choices, (1 - scale_dir, 1 + scale_dir)), normal.q[:0]

    r = torch.linspace(0, 1, g + 2, dtype=torch.float64)[1:-1]  # EPD has r = 0 anyway
    places, coefficients, _ = choose(r, k, scales, search)
    size = coefficients.abs().sum()
    if size == 0:
        return places.r, torch.full_like(places.r, 1 / k), places.scale, coefficients
    signs = torch.where(coefficients < 0, -size, size)
    return places.r, coefficients.abs() / size, places.scale, signs


def multistep_row(
    student: Student, look: Look, g: int, scales: Sequence[float]
) -> tuple[Tensor, ...]:
    """a, r, weight, b and time_scale of the interval that `look` looks at."""
    k, process = student.form.points, student.process
    a = look(lambda _field, step, target: behind(student, step, target)).solve()
    count = len(a)

    def search(places: Places, choices: Tensor) -> tuple[Mix, Tensor]:
        def ahead(field: Field, step: Step, target: Tensor) -> Tensor:
            """Products of the new slopes, those there already, and the mean slope."""
            products, at, own = torch.zeros(()), places.to(target), a.to(target)
            share = max(1, len(target) * k // len(places.r))
            for part, here, wanted in few(field, step, target, share):
                slopes = earlier_slopes(here, process)[:count]
                x, sigma = placed(here, combined(own, slopes), at.r)
                d = part(x, sigma, at.scale.reshape(sigma.shape) * sigma)
                left = (wanted.unsqueeze(1) - here.now.x) / here.h
                products = products + gram([d, *slopes, left])
            return products

        normal = look(ahead)
        rest, held = torch.arange(len(normal.q)).tensor_split([-count])
        mix = best_free(normal.without(held, rest), choices)
        both = normal.take(torch.cat([torch.tensor(mix.columns), held])).solve()
        return dataclasses.replace(mix, coefficients=both[:-count]), both[-count:]

    r = torch.linspace(0, 1, g, dtype=torch.float64)
    places, weight, b = choose(r, k, scales, search)
    return padded(a), places.r, weight, padded(b), places.scale


def behind(student: Student, step: Step, target: Tensor) -> Tensor:
    """Products of the slopes that are there already with the mean slope to the target."""
    slope = (target.unsqueeze(1) - step.now.x) / step.h
    return gram([*earlier_slopes(step, student.process)[:HISTORY], slope])


def padded(coefficients: Tensor) -> Tensor:
    """The coefficients of HISTORY slopes, 0 for those that are not there yet."""
    return torch.nn.functional.pad(coefficients, (0, HISTORY - len(coefficients)))
