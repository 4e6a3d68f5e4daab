"""Refinement of a whole table, end to end, by Gauss-Newton steps without back-propagation.

The end of a trajectory is a function of some tens of numbers, so its Jacobian is that many more
trajectories, by difference quotients; most of each is known already, and `Memo` asks the network
only for what a number changes. The normal equations are small and sum over batches and ranks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.distill import Batch, Plan, Table, last_state, squared
from training.grams import gram
from training.memo import Memo, rows
from training.table import Form, grid_to_raw, raw_to_grid

DAMPING = tuple(10.0**e for e in range(-6, 4))
COARSE = range(0, len(DAMPING), 2)
NUDGE = 1e-3
JACOBIAN_NUMBERS = 1 << 15
"""Numbers at the ends of trajectories from which a round learns how the end moves."""
COLUMN_NUMBERS = 1 << 24
"""How many numbers all columns of a Jacobian may hold at once."""
REACH = 0.1
"""By how much of the distance to the target a nudge is to move the end."""


@dataclass(frozen=True)
class Student:
    """A plan, the form of its table, and whether its grid is learned too."""

    plan: Plan
    form: Form
    grid: bool = False

    def encode(self, table: Table) -> Tensor:
        """All that is learned as one vector [P]."""
        extra = [grid_to_raw(self.plan.sigmas)] if self.grid else []
        return torch.cat([self.form.encode(table), *extra])

    def decode(self, theta: Tensor) -> tuple[Plan, Table]:
        """The plan and the table of a vector."""
        if not self.grid:
            return self.plan, self.form.decode(theta)
        n, (first, *_, last) = self.plan.intervals, self.plan.sigmas
        sigmas = raw_to_grid(theta[-n:], first, last)
        return dataclasses.replace(self.plan, sigmas=sigmas), self.form.decode(theta[:-n])


@torch.no_grad()
def squared_error(
    student: Student, theta: Tensor, batches: Sequence[Batch], scale: float = math.inf
) -> Tensor:
    """[summed squared error of the last states, how many numbers].

    Below infinity `scale` is the squared error of a sample from which on it counts less and
    less, as scale * log(1 + error / scale) (Cauchy's loss).
    """
    plan, table = student.decode(theta)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        loss = squared(last_state(plan, table, batch), batch.targets[-1]).double()
        if scale < math.inf:
            loss = scale * torch.log1p(loss / scale)
        total += torch.stack([loss.sum().cpu(), torch.tensor(float(batch.x.numel())).double()])
    return total


@torch.no_grad()
def squared_scale(student: Student, theta: Tensor, batches: Sequence[Batch]) -> Tensor:
    """[sum of log squared error of each sample, how many samples]: for a scale that fits them."""
    plan, table = student.decode(theta)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        loss = squared(last_state(plan, table, batch), batch.targets[-1]).double()
        log = loss.clamp(min=1e-30).log().sum().cpu()
        total += torch.stack([log, torch.tensor(float(len(loss))).double()])
    return total


def normal_products(
    student: Student, theta: Tensor, batch: Batch, nudge: Tensor, scale: float = math.inf
) -> Tensor:
    """Products [P + 1, P + 1] of the Jacobian's columns and, last, what is left to the target.

    Samples weigh as the `scale` of `squared_error` has it. They are taken a few at a time where
    the columns of all would fill the memory.
    """
    count = max(1, COLUMN_NUMBERS // (len(theta) * batch.x[0].numel()))
    total = torch.zeros(())
    for first in range(0, len(batch.x), count):
        part = part_of(batch, slice(first, first + count))
        total = total + part_products(student, theta, part, nudge, scale)
    return total


def part_of(batch: Batch, part: slice) -> Batch:
    """Some samples of a batch."""
    field = dataclasses.replace(batch.field, cond=rows(batch.field.cond, part))
    return Batch(field, batch.x[part], tuple(target[part] for target in batch.targets))


def part_products(
    student: Student, theta: Tensor, batch: Batch, nudge: Tensor, scale: float
) -> Tensor:
    """The products of samples whose columns the memory holds."""
    memo = Memo(batch.field.denoiser)
    batch = dataclasses.replace(batch, field=dataclasses.replace(batch.field, denoiser=memo))
    base = last_state(*student.decode(theta), batch)
    columns = []
    for i in range(len(theta)):
        moved = theta.clone()
        moved[i] += nudge[i]
        memo.again()
        columns.append((last_state(*student.decode(moved), batch) - base) / nudge[i])
    left = batch.targets[-1] - base
    columns = [column.unsqueeze(1) for column in (*columns, left)]
    if scale < math.inf:
        weight = (1 + left.square().flatten(1).sum(1) / scale).rsqrt()
        weight = weight.reshape(-1, *[1] * left.ndim)
        columns = [column.mul_(weight) for column in columns]
    return gram(columns)


@dataclass(frozen=True)
class RefineOptions:
    """How long and how finely; the defaults serve."""

    rounds: int = 6
    nudge: float = NUDGE  # of every number in the first round; later by what it does
    least_gain: float = 1e-3  # stop where a round gains less, as a share of the error
    per_round: int | None = None  # batches in a round's Jacobian, taken in turn; None: all
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    robust: tuple[
        float, ...
    ] = ()  # phases before, by the scale of their loss: times a typical squared error


@torch.no_grad()
def gauss_newton(
    student: Student,
    theta: Tensor,
    batches: Sequence[Batch],
    options: RefineOptions,
    *,
    judges: Sequence[Batch] | None = None,
    report: Callable[[int, float], object] = lambda _round, _rmse: None,
) -> Tensor:
    """The vector after some rounds of damped Gauss-Newton (Levenberg 1944, Marquardt 1963).

    Every round solves once and tries dampings, all or those near the last, at the price of one
    trajectory each, judged on `judges` (the batches themselves if None); held-out judges keep
    small sets from being learned by heart. `report(round, rmse)` is told of each round. A first
    round that finds nothing better is followed by one with nudges that are known to fit.

    A few samples near a fork of the flow can hide the way for all others; `robust` phases come
    first in which they count little; all phases have equal shares of the rounds. The best at the
    end of any phase is what is returned.
    """
    judges = judges or batches
    search = Search(student, batches, judges, options)
    found = [(search.error(theta), theta)]
    report(0, found[0][0])
    phases = (*options.robust, 0.0)
    for phase in phases:
        theta = search.descend(theta, -(-options.rounds // len(phases)), phase, report)
        found.append((search.error(theta), theta))
    return min(found, key=lambda pair: pair[0])[1]


@dataclass
class Search:
    """Rounds of Gauss-Newton under a loss."""

    student: Student
    batches: Sequence[Batch]
    judges: Sequence[Batch]
    options: RefineOptions
    rounds: int = 0

    def error(self, theta: Tensor, scale: float = math.inf) -> float:
        """The root mean squared error over all ranks; infinite where it is not a number."""
        if not bool(theta.isfinite().all()):
            return math.inf
        parts = squared_error(self.student, theta, self.judges, scale)
        summed, count = self.options.reduce(parts).tolist()
        return (summed / count) ** 0.5 if math.isfinite(summed) else math.inf

    def scale(self, theta: Tensor, phase: float) -> float:
        """A phase's scale: times the geometric mean of the squared errors; 0 is the plain loss."""
        if not phase:
            return math.inf
        logs, count = self.options.reduce(
            squared_scale(self.student, theta, self.batches)
        ).tolist()
        return phase * math.exp(logs / count)

    def descend(
        self, theta: Tensor, rounds: int, phase: float, report: Callable[[int, float], object]
    ) -> Tensor:
        """Some rounds under one loss."""
        scale = self.scale(theta, phase)
        best = self.error(theta, scale)
        nudge = torch.full_like(theta, self.options.nudge)
        failed, window = False, COARSE
        for _ in range(rounds):
            parts = (normal_products(self.student, theta, b, nudge, scale) for b in self.turn())
            products = self.options.reduce(sum(parts, torch.zeros(())))
            nudge = fitting_nudges(products)
            steps = steps_of(products)
            errors = {i: self.error(theta + steps[i], scale) for i in window}
            at = min(errors, key=lambda i: errors[i])
            found, self.rounds = errors[at], self.rounds + 1
            report(self.rounds, min(found, best))
            if found < best:
                gain, failed = 1 - found / best, False
                theta, best = theta + steps[at], found
                window = range(max(0, at - 1), min(len(DAMPING), at + 2))
                if gain < self.options.least_gain:
                    break
            elif failed:
                break
            else:
                failed, window = True, COARSE
        return theta

    def turn(self) -> Iterator[Batch]:
        """The batches of this round's Jacobian."""
        count = min(self.options.per_round or len(self.batches), len(self.batches))
        first = self.rounds * count
        return (self.batches[(first + i) % len(self.batches)] for i in range(count))


def enough(batches: Sequence[Batch]) -> int:
    """How many batches a round's Jacobian needs."""
    return -(-JACOBIAN_NUMBERS // batches[0].x.numel())


def fitting_nudges(products: Tensor) -> Tensor:
    """Nudges [P] that each move the end by a part of its distance to the target."""
    effect = (products.diagonal()[:-1] / products[-1, -1]).sqrt().nan_to_num(nan=0.0)
    return (REACH / effect.clamp(min=1e-9)).clamp(1e-5, 1e-1)


def steps_of(products: Tensor) -> list[Tensor]:
    """The solutions of (A + damping diag A) step = g, one for each damping."""
    a, g = products[:-1, :-1], products[:-1, -1]
    diagonal = a.diagonal()
    floor = diagonal.max() * 1e-12 + 1e-300
    return [torch.linalg.solve(a + torch.diag(d * diagonal + floor), g) for d in DAMPING]
