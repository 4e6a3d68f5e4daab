"""Tables as free numbers: what a gradient, or a difference quotient, may change.

A form reads a flat vector theta [P] of unconstrained numbers as a table (`decode`,
differentiable) and gives the theta of a table (`encode`). N intervals, K points, H slopes.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from solvers.epd import Directions, MultistepTable, Table
from solvers.field import Condition, Field
from solvers.integrate import MAX_SLOPES
from solvers.sampler import Sampler

HISTORY = 1 + MAX_SLOPES
"""H, as many slopes as the loop keeps, and the free one."""
EDGE = 6.0
"""Positions are kept this near to 0 and 1 in log odds, so that they can come back."""
EXACT = 32.0
"""The same where they are to stay what they are."""
LEAST_WEIGHT = 1e-4
LEAST_STEP = 1e-2


@dataclass(frozen=True)
class TimeScales:
    """How far time scales may go from 1: `reach`, 0 being nowhere, and None anywhere.

    `at_ends` is the reach in the first and the last interval, where that is another.
    """

    reach: float | None = None
    at_ends: float | None = None

    @property
    def learned(self) -> bool:
        """Whether there are any to learn."""
        return self.reach != 0 or bool(self.at_ends)

    def reaches(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """For N intervals, which are free, [N, 1], and the reach of the others."""
        reach = like.new_full((len(like), 1), math.inf if self.reach is None else self.reach)
        if self.at_ends is not None:
            reach[0] = reach[-1] = self.at_ends
        return reach.isinf(), reach.nan_to_num(posinf=1.0)

    def encode(self, scale: Tensor) -> Tensor:
        """Time scales [N, K] as unbounded numbers."""
        free, reach = self.reaches(scale)
        return torch.where(free, scale.log(), around_one_raw(scale, reach))

    def decode(self, raw: Tensor) -> Tensor:
        """Unbounded numbers [N, K] as time scales."""
        free, reach = self.reaches(raw)
        return torch.where(free, raw.exp(), around_one(raw, reach))


@dataclass(frozen=True)
class EPDForm:
    """Tables of EPD: by the raw parameters of the published predictors, or with free weights.

    Published (EPD-Solver, arXiv:2507.14797, Sec. 3): r = sigmoid, weight = softmax, scales
    2 sigmoid(p / 2) reach + 1 - reach; a reach of 0 switches a scale off, and `fcn` the direction
    scale of the last interval. Without a `scale_dir`, weight * dir_scale is a number of any sign.
    """

    intervals: int
    points: int
    scale_dir: float | None = None
    time: TimeScales = TimeScales()
    fcn: bool = False

    def encode(self, table: Any, edge: float = EDGE) -> Tensor:
        """A table as free numbers [P], its positions at least `edge` away from 0 and 1."""
        r, weight, time_scale, dir_scale = (t.detach().double().cpu() for t in table.tensors())
        free = self.scale_dir is None
        mix = weight * dir_scale if free else weight.clamp(min=LEAST_WEIGHT).log()
        parts = [logit(r, edge), mix]
        parts += [self.time.encode(time_scale)] if self.time.learned else []
        parts += [around_one_raw(dir_scale, self.scale_dir)] if self.scale_dir else []
        return torch.cat([part.flatten() for part in parts])

    def decode(self, theta: Tensor) -> Directions:
        """The table of free numbers [P]."""
        r, mix, *scales = theta.reshape(-1, self.intervals, self.points)
        one = torch.ones_like(r)
        time_scale = self.time.decode(scales.pop(0)) if self.time.learned else one
        if self.scale_dir is None:
            size = mix.abs().sum(-1, keepdim=True).clamp(min=1e-12)
            signs = torch.where(mix < 0, -size, size)
            return Directions(r.sigmoid(), mix.abs() / size, time_scale, signs)
        dir_scale = around_one(scales.pop(0), self.scale_dir) if self.scale_dir else one
        if self.fcn:
            dir_scale = torch.cat([dir_scale[:-1], one[-1:]])
        return Directions(r.sigmoid(), mix.softmax(-1), time_scale, dir_scale)


@dataclass(frozen=True)
class MultistepForm:
    """Parallel multistep; coefficients of slopes that are not there yet are left out.

    With `afs` the first interval makes no call, so that only its `b` is learned.
    """

    intervals: int
    points: int
    time: TimeScales = TimeScales()
    afs: bool = False

    @property
    def used(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which of a [N, H], of the points' numbers [N, K] and of b [N, H] are learned.

        Before interval n there are the free slope and those of the calls so far, K each.
        """
        calls = (torch.arange(self.intervals) - int(self.afs)).clamp(min=0)
        there = torch.arange(HISTORY) < (1 + self.points * calls)[:, None]
        calling = torch.ones(self.intervals, self.points, dtype=torch.bool)
        calling[: int(self.afs)] = False
        return there & calling[:, :1], calling, there

    def encode(self, table: Any, edge: float = EDGE) -> Tensor:
        """A table as free numbers [P], its positions at least `edge` away from 0 and 1."""
        a, r, weight, b, scale = (t.detach().double().cpu() for t in table.tensors())
        in_a, points, in_b = self.used
        time = [self.time.encode(scale)[points]] if self.time.learned else []
        return torch.cat([a[in_a], logit(r, edge)[points], weight[points], b[in_b], *time])

    def decode(self, theta: Tensor) -> MultistepTable:
        """The table of free numbers [P]."""
        in_a, points, in_b = self.used
        order = [in_a, points, points, in_b, *([points] if self.time.learned else [])]
        parts = theta.split([int(mask.sum()) for mask in order])
        a, r, weight, b, *time = (
            theta.new_zeros(mask.shape).masked_scatter(mask, part)
            for mask, part in zip(order, parts, strict=True)
        )
        scale = self.time.decode(time[0]) if time else torch.ones_like(r)
        return MultistepTable(a, torch.where(points, r.sigmoid(), r), weight, b, scale)


Form: TypeAlias = EPDForm | MultistepForm
"""A way to write a table as a vector."""


def logit(r: Tensor, edge: float = EDGE) -> Tensor:
    """Log odds, held away from the infinite."""
    return torch.logit(r.clamp(0, 1)).clamp(-edge, edge)


def around_one(raw: Tensor, reach: Tensor | float) -> Tensor:
    """2 sigmoid(raw / 2) reach + 1 - reach."""
    return 2 * (raw / 2).sigmoid() * reach + 1 - reach


def around_one_raw(scale: Tensor, reach: Tensor | float) -> Tensor:
    """The number whose `around_one` is nearest to `scale`; 0 where the reach is 0."""
    return 2 * logit(((scale - 1) / (2 * reach)).nan_to_num(nan=0.0) + 0.5)


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


def even_table(intervals: int, points: int, history: int = 0) -> Table:
    """A table by hand: points spread evenly and of one weight, every scale 1.

    With a history it is one of parallel multistep that begins as a midpoint rule.
    """
    r = (torch.arange(points, dtype=torch.float64) + 1) / (points + 1)
    r, one = r.expand(intervals, -1), torch.ones(intervals, points, dtype=torch.float64)
    if not history:
        return Directions(r, one / points, one, one)
    none = torch.zeros(intervals, history, dtype=torch.float64)
    newest = none.clone()
    newest[0, 0] = 1
    newest[1:, 1] = 1
    return MultistepTable(newest, r, one / points, none, one)


def table_of(sampler: Sampler) -> MultistepTable:
    """The steps of a hand-made solver of one call a step, as a table of one point.

    All its states are x at first and a sum of slopes, so they are followed as vectors of these.
    The weight of slopes older than a table has goes to the oldest that it has (in float64 the
    same to rounding up to 5 steps, and for solvers that look back no further). What a first step
    without a call leaves behind is a part of each later free slope.
    """
    n, free = len(sampler.sigmas) - 1, int(sampler.afs)
    basis = torch.eye(n + 1 - free, dtype=torch.float64)
    slopes = iter(basis[1:])

    def network(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
        return x - sigma[:, None] * next(slopes)

    path = torch.cat([basis[:1], *sampler.states(Field(network), basis[:1])])
    h = torch.tensor(sampler.sigmas, dtype=torch.float64).diff()
    even = even_table(n, 1, HISTORY)
    assert isinstance(even, MultistepTable)
    b, weight = torch.zeros_like(even.b), torch.zeros_like(even.weight)
    for i, (x, step) in enumerate(zip(path, path.diff(dim=0) / h[:, None], strict=False)):
        if free:
            own = sampler.process.free_slope(x, sampler.sigmas[i])
            b[i, 0] = step[0] / own[0]
            step = step - b[i, 0] * own
        calls = step[1:]  # oldest first
        before = max(i - free, 0)
        kept = min(before, HISTORY - 1)
        b[i, 1 : 1 + kept] = calls[before - kept : before].flip(0)
        b[i, kept] += calls[: before - kept].sum()
        weight[i] = calls[before] if i >= free else 0.0
    return MultistepTable(even.a, torch.zeros_like(even.r), weight, b, even.time_scale)


def widened(table: Table, points: int) -> Table:
    """The same steps by a table of K points, K at least as many as there are.

    The new points weigh nothing yet, so that nothing but rows are added. They come first, as
    slopes of earlier calls are counted from the last point to the first; of these there are
    HISTORY then, where files may have fewer. What is too far back for it with so many points
    adds to the oldest that is kept.
    """
    n, k = table.r.shape
    assert points >= k
    r, weight, scale = (t.double() for t in (table.r, table.weight, table.time_scale))
    more = (torch.arange(points - k, dtype=torch.float64) + 1) / (points - k + 1)
    none, one = torch.zeros(n, points - k).double(), torch.ones(n, points - k).double()
    r, weight = torch.cat([more.expand(n, -1), r], 1), torch.cat([none, weight], 1)
    scale = torch.cat([one, scale], 1)
    if isinstance(table, Directions):
        return Directions(r, weight, scale, torch.cat([one, table.dir_scale.double()], 1))
    old = torch.arange(1, table.a.shape[1])
    new = 1 + (old - 1) // k * points + (old - 1) % k
    coefficients = []
    for given in (table.a.double(), table.b.double()):
        wide = torch.zeros(n, HISTORY).double()
        wide[:, 0] = given[:, 0]
        oldest = int(new[new < HISTORY][-1:].sum())
        wide.index_add_(1, new.clamp(max=oldest), given[:, old])
        coefficients.append(wide)
    return MultistepTable(coefficients[0], r, weight, coefficients[1], scale)
