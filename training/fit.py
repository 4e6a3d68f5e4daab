"""Forward-only fitting: tables by least squares, interval by interval, without back-propagation.

A step is linear in the weights, so for given positions the best weights solve a least-squares
problem, and positions are the best K of a grid of G. Memory is that of sampling: the network is
asked K rows at a time, and of its answers only Gram matrices leave a batch. Sums run over
batches and, by `reduce`, over ranks.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from solvers.epd import Directions
from solvers.field import Field
from solvers.integrate import Step
from solvers.multistep import MultistepTable, combined, known_slopes, placed
from training.distill import Batch, Plan, Table
from training.grams import Mix, Normal, best_free, best_shares, gram, subsets
from training.search import (
    HISTORY,
    Chosen,
    FitOptions,
    Places,
    even,
    filled,
    one_of_each,
    rescaled,
    total,
)

__all__ = ["HISTORY", "FitOptions", "fit"]


@torch.no_grad()
def fit(plan: Plan, batches: Sequence[Batch], options: FitOptions) -> Table:
    """A table for `plan`, greedy interval by interval on the student's own states.

    Every batch is run again up to the interval in hand, so nothing but the batches is kept.
    """
    table = blank(plan, options)
    for n in range(plan.intervals):
        look = partial(total, plan, table, batches, n)
        if isinstance(table, Directions):
            row = epd_row(plan, look, options)
            table = Directions(*put(table.tensors(), n, row))
        else:
            row = multistep_row(plan, look, options)
            table = MultistepTable(*put(table.tensors(), n, row))
    return table


def blank(plan: Plan, options: FitOptions) -> Table:
    """A table of the right shape, in float64, to be filled."""
    n, k, h = plan.intervals, options.points, options.history
    one, flat = torch.ones(n, k, dtype=torch.float64), torch.zeros(n, h, dtype=torch.float64)
    if plan.base is not None:
        return Directions(one / 2, one / k, one, one)
    return MultistepTable(flat, one / 2, one / k, flat, one)


def put(tensors: Sequence[Tensor], n: int, row: Sequence[Tensor]) -> list[Tensor]:
    """The tensors [N, ...] with another row n."""
    copies = [tensor.clone() for tensor in tensors]
    for copy, values in zip(copies, row, strict=True):
        copy[n] = values
    return copies


# --- EPD ----------------------------------------------------------------------------------


def epd_row(plan: Plan, look: partial[Tensor], options: FitOptions) -> tuple[Tensor, ...]:
    """r, weight, time_scale and dir_scale [K] of the interval that `look` looks at."""

    def search(places: Places, choices: Tensor) -> Mix:
        visit = partial(look_epd, plan, places, options.points)
        normal = Normal.of(options.reduce(look(visit)))
        if options.scale_dir is None:
            return best_free(normal, choices)
        return best_shares(normal, choices, (1 - options.scale_dir, 1 + options.scale_dir))

    k, scales = options.points, options.time_scales
    places = even(plan, options.positions)
    found = filled(search(places, subsets(len(places.r), k)), places, k)
    if len(scales) > 1:
        places = found.places.times(scales)
        found = rescaled(search(places, one_of_each(k, len(scales))), places, found)
    weight, scale = as_shares(found.coefficients)
    return found.places.r, weight, found.places.told, scale


def look_epd(
    plan: Plan, places: Places, k: int, field: Field, step: Step, target: Tensor
) -> Tensor:
    """Products of the directions that the base reaches, with the way to the target."""
    base, now = plan.base, step.now
    assert base is not None

    def placing(r: Tensor) -> tuple[Tensor, Tensor]:
        sigma = now.sigma * torch.as_tensor(step.sigma_next / now.sigma).to(r) ** r
        sigma = sigma.reshape(1, -1, *[1] * (now.x.ndim - 2))
        return base(field, dataclasses.replace(step, sigma_next=sigma)), sigma

    d = places.ask(field, placing, now.x, k)
    return gram([step.h * d, target.unsqueeze(1) - now.x])


def as_shares(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [K] of any sign -> weights on the simplex, and the scales that restore them."""
    size = coefficients.abs().sum()
    if size == 0:
        return torch.full_like(coefficients, 1 / len(coefficients)), coefficients
    return coefficients.abs() / size, torch.where(coefficients < 0, -size, size)


# --- parallel multistep -------------------------------------------------------------------


def multistep_row(plan: Plan, look: partial[Tensor], options: FitOptions) -> tuple[Tensor, ...]:
    """a, r, weight, b and time_scale of the interval that `look` looks at."""
    visit = partial(look_back, plan, options.history)
    a = Normal.of(options.reduce(look(visit))).solve()
    known = len(a)

    def search(places: Places, choices: Tensor) -> tuple[Mix, Tensor]:
        products = look(Ahead(plan, a, places, options.points))
        normal = Normal.of(options.reduce(products))
        count = len(places.r)
        rest, held = torch.arange(count), torch.arange(count, count + known)
        mix = best_free(normal.without(held, rest), choices)
        both = normal.take(torch.cat([torch.tensor(mix.columns), held])).solve()
        return dataclasses.replace(mix, coefficients=both[:-known]), both[-known:]

    k, scales = options.points, options.time_scales
    places = even(plan, options.positions)
    mix, b = search(places, subsets(len(places.r), k))
    found: Chosen = filled(mix, places, k)
    if len(scales) > 1:
        places = found.places.times(scales)
        mix, b = search(places, one_of_each(k, len(scales)))
        found = rescaled(mix, places, found)
    empty = torch.zeros(options.history - known, dtype=torch.float64)
    a, b = torch.cat([a, empty]), torch.cat([b, empty])
    return a, found.places.r, found.coefficients, b, found.places.told


def look_back(plan: Plan, history: int, _field: Field, step: Step, target: Tensor) -> Tensor:
    """Products of the known slopes with the mean slope to the target."""
    slope = (target.unsqueeze(1) - step.now.x) / step.h
    return gram([*known_slopes(step, plan.process)[:history], slope])


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Products of the new slopes, the known ones, and the mean slope to the target."""

    plan: Plan
    a: Tensor
    places: Places
    k: int

    def __call__(self, field: Field, step: Step, target: Tensor) -> Tensor:
        x = step.now.x
        known = known_slopes(step, self.plan.process)[: len(self.a)]
        e = combined(self.a.to(x), known)
        d = self.places.ask(field, partial(placed, step, e), x, self.k)
        return gram([d, *known, (target.unsqueeze(1) - x) / step.h])
