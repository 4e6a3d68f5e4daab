"""Refinement of a whole table, end to end, by Gauss-Newton steps without back-propagation.

The end of a trajectory is a function of some tens of numbers, so its Jacobian is that many more
trajectories, by difference quotients; most of each was computed before, and `CachedDenoiser`
asks the network only for what a number changes. The normal equations are small and sum over
batches and ranks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from solvers.field import Condition, Denoiser
from src.ranks import all_reduce_sum
from training.gram import gram
from training.student import Batch, Reduce, Student, last_state, rows_of, squared_error

DAMPING = tuple(10.0**e for e in range(-6, 4))
COARSE = range(0, len(DAMPING), 2)
JACOBIAN_NUMBERS = 1 << 15
"""Numbers at the ends of trajectories from which a round learns how the end moves."""
COLUMN_NUMBERS = 1 << 24
"""How many numbers all columns of a Jacobian may hold at once."""
REACH = 0.1
"""By how much of the distance to the target a nudge is to move the end."""
ROBUST = (16.0, 256.0)
"""Scales of a loss that stray samples steer little, before the plain one; measured best."""
Report = Callable[[float], object]
"""Hears the error after each round."""


@dataclass(frozen=True)
class RefineOptions:
    """How long and how finely; the defaults serve."""

    rounds: int = 6
    nudge: float = 1e-3  # of every number in the first round; later by what it does
    least_gain: float = 1e-3  # stop where a round gains less, as a share of the error
    per_round: int | None = None  # batches in a round's Jacobian, taken in turn; None: all
    reduce: Reduce = all_reduce_sum
    robust: tuple[float, ...] = ()  # phases before, by their loss's scale in typical errors


@torch.no_grad()
def gauss_newton(
    student: Student,
    theta: Tensor,
    batches: Sequence[Batch],
    options: RefineOptions,
    *,
    judges: Sequence[Batch] | None = None,
    report: Report = lambda _rmse: None,
) -> Tensor:
    """The vector after some rounds of damped Gauss-Newton (Levenberg 1944, Marquardt 1963).

    Every round solves once and tries dampings, all or those near the last, at the price of one
    trajectory each, judged on `judges` (the batches themselves if None); held-out judges keep
    small sets from being learned by heart. A first round without a better one is followed by
    another with nudges that fit.

    A few samples near a fork of the flow can hide the way for all others; `robust` phases come
    first in which they count little; all phases have equal shares of the rounds. The best at the
    end of any phase is what is returned.
    """
    search = Search(student, batches, judges or batches, options, report)
    best = [(search.error(theta), theta)]
    report(best[0][0])
    phases = (*options.robust, 0.0)
    for phase in phases:
        theta = search.descend(theta, -(-options.rounds // len(phases)), phase)
        best.append((search.error(theta), theta))
    return min(best, key=lambda pair: pair[0])[1]


@dataclass
class Search:
    """Rounds of Gauss-Newton under a loss."""

    student: Student
    batches: Sequence[Batch]
    judges: Sequence[Batch]
    options: RefineOptions
    report: Report
    rounds: int = 0

    def error(self, theta: Tensor, scale: float = math.inf) -> float:
        """The root mean squared error over all ranks; infinite where it is not a number."""
        if not bool(theta.isfinite().all()):
            return math.inf
        sampler = self.student.sampler(theta)
        error, count, *_ = self.options.reduce(squared_error(sampler, self.judges, scale)).tolist()
        return (error / count) ** 0.5 if math.isfinite(error) else math.inf

    def scale(self, theta: Tensor, phase: float) -> float:
        """A phase's scale: times the geometric mean of the squared errors; 0 is the plain loss."""
        if not phase:
            return math.inf
        sampler = self.student.sampler(theta)
        *_, logs, count = self.options.reduce(squared_error(sampler, self.batches)).tolist()
        return phase * math.exp(logs / count)

    def descend(self, theta: Tensor, rounds: int, phase: float) -> Tensor:
        """The vector after some rounds under one loss."""
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
            self.rounds += 1
            self.report(min(errors[at], best))
            if errors[at] < best:
                gain, failed = 1 - errors[at] / best, False
                theta, best = theta + steps[at], errors[at]
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


def normal_products(
    student: Student, theta: Tensor, batch: Batch, nudge: Tensor, scale: float = math.inf
) -> Tensor:
    """Products [P + 1, P + 1] of the Jacobian's columns and, last, what is left to the target.

    Samples weigh as the `scale` of `squared_error` has it. They are taken a few at a time where
    the columns of all would fill the memory.
    """
    total = torch.zeros(())
    for part in batch.parts(COLUMN_NUMBERS // (len(theta) * batch.x[0].numel())):
        moving = ends(student, theta, part, nudge)
        end = next(moving)
        columns = [(x - end) / h for x, h in zip(moving, nudge, strict=True)]
        left = part.targets[-1] - end
        columns = [column.unsqueeze(1) for column in (*columns, left)]
        if scale < math.inf:
            weight = (1 + left.square().flatten(1).sum(1) / scale).rsqrt()
            columns = [c.mul_(weight.reshape(-1, *[1] * left.ndim)) for c in columns]
        total = total + gram(columns)
    return total


def ends(student: Student, theta: Tensor, batch: Batch, nudge: Tensor) -> Iterator[Tensor]:
    """Where the student ends, [B, *], then where it ends with each of the P numbers nudged."""
    cached = CachedDenoiser(batch.field.denoiser)
    batch = dataclasses.replace(batch, field=dataclasses.replace(batch.field, denoiser=cached))
    yield last_state(student.sampler(theta), batch)
    for i in range(len(theta)):
        moved = theta.clone()
        moved[i] += nudge[i]
        cached.again()
        yield last_state(student.sampler(moved), batch)


@dataclass
class CachedDenoiser:
    """A denoiser that keeps the answers of one trajectory, and then computes only what differs.

    So a change near the end of a trajectory costs only the end.
    """

    denoiser: Denoiser
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    at: int = 0
    recording: bool = True

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> x0 [B, *]."""
        if self.recording:
            x0 = self.denoiser(x, sigma, cond)
            self.calls.append((x, sigma, x0))
            return x0
        old_x, old_sigma, cached = self.calls[self.at]
        self.at += 1
        new = ((x != old_x).flatten(1).any(1) | (sigma != old_sigma)).nonzero()[:, 0]
        if not len(new):
            return cached
        if len(new) == len(x):
            return self.denoiser(x, sigma, cond)
        answers = self.denoiser(x[new], sigma[new], rows_of(cond, new))
        return cached.index_copy(0, new, answers)

    def again(self) -> None:
        """From now on compare with what was recorded, from its start."""
        self.at, self.recording = 0, False


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
