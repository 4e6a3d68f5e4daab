"""Tables as free numbers: what a gradient, or a difference quotient, may change.

A form reads a flat vector theta [P] of unconstrained numbers as a table (`decode`,
differentiable) and finds the theta of a given table (`encode`). N intervals, K points, H slopes.
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from solvers.epd import NONE_KNOWN, Directions
from solvers.multistep import MultistepTable

T = TypeVar("T", Directions, MultistepTable)
EDGE = 6.0
"""Positions are kept this near to 0 and 1 in log odds, so that they can come back."""
LEAST_WEIGHT = 1e-4
LEAST_STEP = 1e-2


class Form(Protocol[T]):
    """A way to write a table as a vector."""

    def encode(self, table: T) -> Tensor:
        """The vector [P] in float64 nearest to the table."""
        ...

    def decode(self, theta: Tensor) -> T:
        """The table of any vector [P]."""
        ...


@dataclass(frozen=True)
class PublishedForm:
    """The raw parameters of the published predictors (EPD-Solver, arXiv:2507.14797, Sec. 3).

    r = sigmoid, weight = softmax, scales 2 sigmoid(p / 2) reach + 1 - reach; a reach of 0
    switches a scale off, and `fcn` the direction scale of the last interval.
    """

    intervals: int
    points: int
    scale_dir: float = 0.0
    scale_time: float = 0.0
    fcn: bool = False

    def encode(self, table: Directions) -> Tensor:
        if table.history:
            raise ValueError(f"known slopes need free weights, and the table has {table.history}")
        r, weight, time_scale, dir_scale = (t.detach().double().cpu() for t in table.tensors())
        parts = [logit(r), weight.clamp(min=LEAST_WEIGHT).log()]
        parts += [around_one_raw(time_scale, self.scale_time)] if self.scale_time else []
        parts += [around_one_raw(dir_scale, self.scale_dir)] if self.scale_dir else []
        return torch.cat([part.flatten() for part in parts])

    def decode(self, theta: Tensor) -> Directions:
        parts = list(theta.reshape(-1, self.intervals, self.points))
        r, weight = parts.pop(0).sigmoid(), parts.pop(0).softmax(-1)
        one = torch.ones_like(r)
        time_scale = around_one(parts.pop(0), self.scale_time) if self.scale_time else one
        dir_scale = around_one(parts.pop(0), self.scale_dir) if self.scale_dir else one
        if self.fcn:
            dir_scale = torch.cat([dir_scale[:-1], one[-1:]])
        return Directions(r, weight, time_scale, dir_scale)


@dataclass(frozen=True)
class FreeForm:
    """EPD with weight * dir_scale a number of any sign, and a free time scale if asked.

    With a `history` also its known slopes, those left out that are not known yet.
    """

    intervals: int
    points: int
    time: bool = True
    history: int = 0
    calls: int = 1  # of the base, an interval
    afs: bool = False

    @property
    def known(self) -> Tensor:
        """Which of `known` [N, H] are used: an interval leaves 1 + calls K, 1 less with AFS."""
        n = torch.arange(self.intervals)
        count = 1 + n * (1 + self.calls * self.points) - n.clamp(max=int(self.afs))
        return torch.arange(self.history) < count[:, None]

    def encode(self, table: Directions) -> Tensor:
        r, weight, time_scale, dir_scale, *known = (
            t.detach().double().cpu() for t in table.tensors()
        )
        parts = [logit(r), weight * dir_scale, *([time_scale.log()] if self.time else [])]
        if self.history:
            empty = torch.zeros(self.intervals, self.history, dtype=torch.float64)
            parts.append((known[0] if known else empty)[self.known])
        return torch.cat([part.flatten() for part in parts])

    def decode(self, theta: Tensor) -> Directions:
        known = NONE_KNOWN
        if self.history:
            used = self.known.to(theta.device)
            theta, coefficients = theta.tensor_split([-int(used.sum())])
            known = theta.new_zeros(used.shape).masked_scatter(used, coefficients)
        r, mix, *rest = theta.reshape(-1, self.intervals, self.points)
        size = mix.abs().sum(-1, keepdim=True).clamp(min=1e-12)
        scale = torch.where(mix < 0, -size, size)
        time_scale = rest[0].exp() if rest else torch.ones_like(r)
        return Directions(r.sigmoid(), mix.abs() / size, time_scale, scale, known)


@dataclass(frozen=True)
class MultistepForm:
    """Parallel multistep; coefficients of slopes that are not known yet are left out."""

    intervals: int
    points: int
    history: int
    time: bool = True

    @property
    def known(self) -> Tensor:
        """Which of a and b [N, H] are used: before interval n there are 1 + n K slopes."""
        count = 1 + self.points * torch.arange(self.intervals)
        return torch.arange(self.history) < count[:, None]

    def encode(self, table: MultistepTable) -> Tensor:
        a, r, weight, b, scale = (t.detach().double().cpu() for t in table.tensors())
        time = [scale.log().flatten()] if self.time else []
        known = self.known
        return torch.cat([a[known], logit(r).flatten(), weight.flatten(), b[known], *time])

    def decode(self, theta: Tensor) -> MultistepTable:
        known = self.known.to(theta.device)
        used, grid = int(known.sum()), self.intervals * self.points
        sizes = [used, grid, grid, used, *([grid] if self.time else [])]
        a, r, weight, b, *rest = theta.split(sizes)
        shape = (self.intervals, self.points)
        empty = theta.new_zeros(known.shape)
        scale = rest[0].exp() if rest else torch.ones_like(r)
        return MultistepTable(
            empty.masked_scatter(known, a),
            r.sigmoid().reshape(shape),
            weight.reshape(shape),
            empty.masked_scatter(known, b),
            scale.reshape(shape),
        )


def logit(r: Tensor) -> Tensor:
    """Log odds, held away from the infinite."""
    return torch.logit(r.clamp(0, 1)).clamp(-EDGE, EDGE)


def around_one(raw: Tensor, reach: float) -> Tensor:
    """2 sigmoid(raw / 2) reach + 1 - reach."""
    return 2 * (raw / 2).sigmoid() * reach + 1 - reach


def around_one_raw(scale: Tensor, reach: float) -> Tensor:
    """The number whose `around_one` is nearest to `scale`."""
    return 2 * logit((scale - 1) / (2 * reach) + 0.5)


# --- grids --------------------------------------------------------------------------------


def grid_to_raw(sigmas: tuple[float, ...]) -> Tensor:
    """The logarithms [N] of the steps in log sigma of a falling grid [N + 1]."""
    steps = -torch.tensor(sigmas, dtype=torch.float64).log().diff()
    shares = (steps / steps.sum() - LEAST_STEP / len(steps)) / (1 - LEAST_STEP)
    return shares.clamp(min=1e-6).log()


def raw_to_grid(raw: Tensor, first: float, last: float) -> tuple[float, ...]:
    """The grid from `first` down to `last` whose steps in log sigma share as exp(raw) does.

    No step is smaller than LEAST_STEP of an even one, so every grid falls.
    """
    shares = raw.double().softmax(0) * (1 - LEAST_STEP) + LEAST_STEP / len(raw)
    way = shares.cumsum(0)[:-1]
    inner = (math.log(first) + way * math.log(last / first)).exp()
    return (first, *inner.tolist(), last)
