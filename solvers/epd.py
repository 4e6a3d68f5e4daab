"""Learned solvers: K slopes in one network call, mixed by a table of numbers.

`EPD` is ensemble parallel directions (Zhu et al. 2025, arXiv:2507.14797): two calls an interval,
the slope where it stands, then K points. `ParallelMultistep` is our own: the slopes of earlier
calls place the K points, so that an interval costs one call.
"""

import dataclasses
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.classic import EDM, Euler
from solvers.exponential import DEIS, UniPC
from solvers.field import Field, Rates
from solvers.integrate import Solver, Step
from solvers.process import VE, Process


@dataclass(frozen=True)
class Directions:
    """Where K more slopes are taken in each of N steps, and how they are mixed.

    Every tensor is [N, K], or [B, N, K] for a table of its own per sample.
    """

    r: Tensor  # place in [0, 1] from sigma to sigma_next, on the log-sigma axis
    weight: Tensor  # >= 0, sums to 1 over K
    time_scale: Tensor  # the network is told time_scale * sigma
    dir_scale: Tensor  # multiplies the slope
    guidance: Tensor | None = None  # [N] or [N, K], rate of each point; d_n has their mean

    def to(self, like: Tensor) -> "Directions":
        """The table on the device and in the dtype of `like`; rates stay where they are."""
        return Directions(*(t.to(like) for t in self.tensors()), guidance=self.guidance)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors r, weight, time_scale and dir_scale."""
        return self.r, self.weight, self.time_scale, self.dir_scale


@dataclass(frozen=True)
class MultistepTable:
    """Learned coefficients of N steps with K points and H earlier slopes.

    Those are `earlier_slopes`: the free one, then those of earlier calls, newest first. Where
    there are fewer than H yet, the coefficients beyond them are not used.
    """

    a: Tensor  # [N, H] of the earlier slopes in the slope that places the points
    r: Tensor  # [N, K] place in [0, 1] from sigma to sigma_next on the log-sigma axis; 0 is x
    weight: Tensor  # [N, K] of the new slopes in the step; any sign
    b: Tensor  # [N, H] of the earlier slopes in the step
    time_scale: Tensor  # [N, K] the network is told time_scale * sigma
    guidance: Tensor | None = None  # [N] or [N, K], rate of each point

    def to(self, like: Tensor) -> "MultistepTable":
        """The table on the device and in the dtype of `like`; rates stay where they are."""
        return MultistepTable(*(t.to(like) for t in self.tensors()), guidance=self.guidance)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors a, r, weight, b and time_scale."""
        return self.a, self.r, self.weight, self.b, self.time_scale


Table: TypeAlias = Directions | MultistepTable


def restarted(table: MultistepTable, start: int) -> MultistepTable:
    """The table [N] for a run that begins at step `start`, where there are no earlier slopes.

    That step is Euler's; in the next ones the coefficients of slopes that are not there go to
    the oldest that is. What is left is of first order where the table was not.
    """
    a, r, weight, b, scale = (t.clone() for t in table.tensors())
    points, history = r.shape[-1], a.shape[-1]
    for tensor, value in ((a, 0), (r, 0), (b, 0), (weight, 1 / points), (scale, 1)):
        tensor[..., start, :] = value
    for step in range(start + 1, r.shape[-2]):
        there = min(1 + (step - start) * points, history)
        for tensor in (a, b):
            tensor[..., step, there - 1] += tensor[..., step, there:].sum(-1)
    return MultistepTable(a, r, weight, b, scale, table.guidance)


@dataclass(frozen=True)
class EPD:
    """Take K slopes at points that `base` reaches, and step along their mixture.

    With `base=Euler()` this is the EPD solver; with a multistep base it is the plug-in. Put
    the table where the samples are (`table.to(x)`) before the loop, so that no step waits for
    a copy. Raises ValueError for a base that cannot serve, and in the loop for a table whose
    number of rows is not that of the steps.
    """

    table: Directions
    base: Solver = dataclasses.field(default_factory=Euler)

    def __post_init__(self) -> None:
        # each point is a step of the base: without correctors, noise, points or fixed weights
        if isinstance(self.base, UniPC | EDM | EPD) or self.base == DEIS(4, "rhoab"):
            raise ValueError(f"EPD cannot stand on {self.base}: its points need a plain step")

    def __call__(self, field: Field, step: Step) -> Tensor:
        now, rows = step.now, self.table.r.shape[-2]
        if rows != len(step.sigmas) - 1:
            raise ValueError(f"a table of {rows} steps cannot take {len(step.sigmas) - 1} steps")
        tensors = tuple(t.to(now.x) for t in self.table.tensors())
        r, weight, time_scale, dir_scale = rows_at(tensors, step.index, now.x.ndim)
        sigma = now.sigma * (step.sigma_next / now.sigma) ** r
        x = self.base(field, dataclasses.replace(step, sigma_next=sigma))
        d = field(x, sigma, time_scale * sigma, point_rates(self.table, step.index))
        mix = (weight * dir_scale * d).sum(1, keepdim=True)
        if isinstance(step.h, Tensor):
            return now.x + step.h * mix
        return torch.add(now.x, mix, alpha=step.h)


@dataclass(frozen=True)
class ParallelMultistep:
    """Steps by a learned table: e = sum_j a_j h_j places K points, whose slopes move x.

    x_next = x + h (sum_k weight_k d_k + sum_j b_j h_j). Needs no slope at x itself, so the
    loop never evaluates it. With `afs` the first step makes no call: there b_0 times the free
    slope is all. Put the table where the samples are (`table.to(x)`) first.
    """

    table: MultistepTable
    process: Process = VE
    afs: bool = False

    def __call__(self, field: Field, step: Step) -> Tensor:
        now, earlier = step.now, earlier_slopes(step, self.process)
        a, r, weight, b, scale = rows_at(self.table.tensors(), step.index, now.x.ndim)
        if self.afs and step.index == 0:
            return now.x + step.h * combined(b, earlier)
        x, sigma = placed(step, combined(a, earlier), r)
        d = field(x, sigma, scale * sigma, point_rates(self.table, step.index))
        mix = (weight * d).sum(1, keepdim=True)
        return now.x + step.h * (mix + combined(b, earlier))


def earlier_slopes(step: Step, process: Process) -> tuple[Tensor, ...]:
    """The slopes [B, 1, *] that cost no call: the free one, then earlier calls', newest first."""
    return (process.free_slope(step.now.x, step.now.sigma), *step.slopes)


def combined(coefficients: Tensor, slopes: tuple[Tensor, ...]) -> Tensor:
    """The sum of coefficient [H] or [B, H, ...] * slope over as many as both have, [B, 1, *]."""
    wide = coefficients if coefficients.ndim > 1 else coefficients[None]
    joined = torch.cat(slopes[: wide.shape[1]], 1)
    shape = (-1, joined.shape[1], *[1] * (joined.ndim - 2))
    return (wide[:, : joined.shape[1]].reshape(shape) * joined).sum(1, keepdim=True)


def placed(step: Step, slope: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The points x [B, K, *] at places r [K] along `slope`, and their levels [B or 1, K, 1...]."""
    now = step.now
    r = r if r.ndim > 1 else r.reshape(1, -1, *[1] * (now.x.ndim - 2))
    sigma = now.sigma * (step.sigma_next / now.sigma) ** r  # no tensor made: nothing is uploaded
    return now.x + (sigma - now.sigma) * slope, sigma


def rows_at(tensors: tuple[Tensor, ...], i: int, ndim: int) -> tuple[Tensor, ...]:
    """Step i of tensors [N, J] or [B, N, J], each [B or 1, J, 1...] with `ndim` dimensions."""
    one = [1] * (ndim - 2)
    return tuple(t[..., i, :].reshape(-1, t.shape[-1], *one) for t in tensors)


def point_rates(table: Table, i: int) -> Rates | None:
    """The rates of step i's points, if the table has any."""
    rates = each_images(table)
    return None if rates is None else alike(rates[:, i].expand(-1, table.r.shape[-1]))


def step_rates(table: Table) -> tuple[Rates, ...] | None:
    """The rate of each step's own slope, the mean of its points'."""
    rates = each_images(table)
    return None if rates is None else tuple(map(alike, rates.mean(-1, keepdim=True).unbind(1)))


def each_images(table: Table) -> Tensor | None:
    """A table's guidance as [B, N, J], where all share it with B = 1 and without points J = 1."""
    rates = table.guidance
    if rates is None or rates.ndim == 3:
        return rates
    return rates.reshape(1, table.r.shape[-2], -1)


def alike(rates: Tensor) -> Rates:
    """Rates [B, K] as one for each point where all images have the same: 1 is no guidance then."""
    return rates if (rates != rates[:1]).any() else tuple(rates[0].tolist())
