"""Forward-only fitting: tables by least squares, interval by interval, without back-propagation.

A step is linear in the weights, so for given positions the best weights solve a least-squares
problem, and positions are the best K of a grid of G. Memory is that of sampling: the network is
asked K rows at a time, and of its answers only Gram matrices leave a batch. Sums run over
batches and, by `reduce`, over ranks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from solvers.epd import NONE_KNOWN, Directions, evaluated
from solvers.field import Field
from solvers.integrate import Step
from solvers.multistep import MultistepTable, combined, known_slopes, placed
from training.distill import Batch, Plan, Table
from training.grams import RIDGE, Mix, Normal, best_free, best_shares, gram, subsets
from training.search import (
    HISTORY,
    Chosen,
    FitOptions,
    Places,
    even,
    few,
    filled,
    one_of_each,
    rescaled,
    total,
)

__all__ = ["HISTORY", "FitOptions", "fit"]

KNOWN_RIDGE = 1e-8
"""For EPD's known slopes: what they add to its points lies in small differences."""


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
        known = torch.zeros(n, options.known, dtype=torch.float64) if options.known else NONE_KNOWN
        return Directions(one / 2, one / k, one, one, known)
    return MultistepTable(flat, one / 2, one / k, flat, one)


def put(tensors: Sequence[Tensor], n: int, row: Sequence[Tensor]) -> list[Tensor]:
    """The tensors [N, ...] with another row n."""
    copies = [tensor.clone() for tensor in tensors]
    for copy, values in zip(copies, row, strict=True):
        copy[n] = values
    return copies


Search = Callable[[Places, Tensor], tuple[Mix, Tensor]]
"""(places, choices [n, K] of them) -> the best choice, and the known slopes' coefficients."""


def searched(plan: Plan, options: FitOptions, search: Search) -> tuple[Chosen, Tensor]:
    """The K points of an interval with their scales, and the known slopes' coefficients."""
    k, scales = options.points, options.time_scales
    places = even(plan, options.positions)
    mix, known = search(places, subsets(len(places.r), k))
    found = filled(mix, places, k)
    if len(scales) > 1:
        places = found.places.times(scales)
        mix, known = search(places, one_of_each(k, len(scales)))
        found = rescaled(mix, places, found)
    return found, known


def best_beside(
    normal: Normal, choices: Tensor, known: int, ridge: float = RIDGE
) -> tuple[Mix, Tensor]:
    """The best choice of columns beside the last `known` ones, which are always there."""
    if not known:
        return best_free(normal, choices, ridge), NONE_KNOWN
    rest, held = torch.arange(len(normal.q)).tensor_split([-known])
    mix = best_free(normal.without(held, rest, ridge), choices, ridge)
    both = normal.take(torch.cat([torch.tensor(mix.columns), held])).solve(ridge)
    return dataclasses.replace(mix, coefficients=both[:-known]), both[-known:]


def padded(coefficients: Tensor, count: int) -> Tensor:
    """The coefficients of `count` slopes, 0 for those that are not known yet."""
    return torch.nn.functional.pad(coefficients, (0, count - len(coefficients)))


# --- EPD ----------------------------------------------------------------------------------


def epd_row(plan: Plan, look: partial[Tensor], options: FitOptions) -> tuple[Tensor, ...]:
    """r, weight, time_scale and dir_scale [K] of the interval that `look` looks at, known [H]."""

    def search(places: Places, choices: Tensor) -> tuple[Mix, Tensor]:
        visit = partial(look_epd, plan, places, options)
        normal = Normal.of(options.reduce(look(visit)))
        if options.scale_dir is None:
            known = len(normal.q) - len(places.r)
            return best_beside(normal, choices, known, KNOWN_RIDGE if known else RIDGE)
        reach = 1 - options.scale_dir, 1 + options.scale_dir
        return best_shares(normal, choices, reach), NONE_KNOWN

    found, known = searched(plan, options, search)
    weight, scale = as_shares(found.coefficients)
    row = found.places.r, weight, found.places.told, scale
    return (*row, padded(known, options.known)) if options.known else row


def look_epd(
    plan: Plan, places: Places, options: FitOptions, field: Field, step: Step, target: Tensor
) -> Tensor:
    """Products of the directions that the base reaches, known ones, and the way to the target."""
    parts = few(field, step, target, share(places, options.points, target))
    return sum((products_epd(plan, places, options, *part) for part in parts), torch.zeros(()))


def share(places: Places, k: int, target: Tensor) -> int:
    """How many samples at all places are as many rows as the batch at K points."""
    return max(1, len(target) * k // len(places.r))


def products_epd(
    plan: Plan, places: Places, options: FitOptions, field: Field, step: Step, target: Tensor
) -> Tensor:
    """Those of some samples."""
    base, now = plan.base, step.now
    assert base is not None

    def placing(r: Tensor) -> tuple[Tensor, Tensor]:
        sigma = now.sigma * torch.as_tensor(step.sigma_next / now.sigma).to(r) ** r
        sigma = sigma.reshape(1, -1, *[1] * (now.x.ndim - 2))
        return base(field, dataclasses.replace(step, sigma_next=sigma)), sigma

    d = places.ask(field, placing, now.x).mul_(step.h)
    known = evaluated(step)[: options.known]
    return gram([d, *(step.h * each for each in known), target.unsqueeze(1) - now.x])


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
        return best_beside(Normal.of(options.reduce(products)), choices, known)

    found, b = searched(plan, options, search)
    a, b = padded(a, options.history), padded(b, options.history)
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
        parts = few(field, step, target, share(self.places, self.k, target))
        return sum((self.products(*part) for part in parts), torch.zeros(()))

    def products(self, field: Field, step: Step, target: Tensor) -> Tensor:
        """Those of some samples."""
        x = step.now.x
        known = known_slopes(step, self.plan.process)[: len(self.a)]
        e = combined(self.a.to(x), known)
        d = self.places.ask(field, partial(placed, step, e), x)
        return gram([d, *known, (target.unsqueeze(1) - x) / step.h])
