"""Refinement of a whole table, end to end, by Gauss-Newton steps without back-propagation.

The end of a trajectory is a function of some tens of numbers, so its Jacobian is that many more
trajectories, by difference quotients; most of each was computed before, and the network is asked
only for what a number changes. The normal equations are small and sum over batches and ranks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.field import Condition
from src.ranks import all_reduce_sum
from training.gram import gram
from training.student import Reduce, Student, Trajectories, cut, last_state, rmses, rows_of, sent
from training.student import squared_errors as errors_of

DAMPING = tuple(10.0**e for e in range(-6, 4))
JACOBIAN_NUMBERS = 1 << 15
"""Numbers at the ends of trajectories from which a round learns how the end moves."""
COLUMN_NUMBERS = 1 << 24
"""How many numbers all columns of a Jacobian may hold at once."""
NUDGE = 1e-3
"""Of every number in the first round; later by what it does."""
REACH = 0.1
"""By how much of the distance to the target a nudge is to move the end."""
LEAST_GAIN = 1e-3
"""Squares stop where a round gains less, as a share of the error."""
ROBUST = (16.0, 256.0)
"""Scales of a loss that stray samples steer little, before the plain one; measured best."""
Linearise: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Callable[[int], Tensor]]]
"""(theta [P], nudges [P]) -> products [P + 1, P + 1], and a step by its number."""


@torch.no_grad()
def gauss_newton(
    student: Student,
    theta: Tensor,
    batches: Sequence[Trajectories],
    *,
    judges: Sequence[Trajectories] | None = None,
    rounds: int = 6,
    robust: tuple[float, ...] = (),
    per_round: int | None = None,
    reduce: Reduce = all_reduce_sum,
) -> Tensor:
    """The vector after some rounds of damped Gauss-Newton (Levenberg 1944, Marquardt 1963).

    Every round solves once and tries dampings at the price of one trajectory each, judged on
    `judges` (the batches themselves if None); held-out judges keep small sets from being learned
    by heart. `per_round` batches make a round's Jacobian, taken in turn.

    A few samples near a fork of the flow can hide the way for all others; `robust` phases, given
    by their loss's scale in typical errors, come first, in which these count little; all phases
    have equal shares of the rounds. The best at the end of any phase is what is returned.
    """
    size = min(per_round or len(batches), len(batches))
    turn, phases = count(), (*robust, 0.0)

    def values(thetas: Sequence[Tensor], scale: float = math.inf) -> list[float]:
        samplers = {
            i: student.sampler(t) for i, t in enumerate(thetas) if bool(t.isfinite().all())
        }
        if not samplers:
            return [math.inf] * len(thetas)
        errors = rmses(list(samplers.values()), judges or batches, reduce, scale)
        of = dict(zip(samplers, errors, strict=True))
        return [of.get(i, math.inf) for i in range(len(thetas))]

    best = [(values([theta])[0], theta)]
    for phase in phases:
        scale = math.inf
        if phase:  # times the geometric mean of the squared errors
            errors, _ = errors_of([student.sampler(theta)], batches)
            logs = errors.clamp(min=1e-30).log().sum()
            total = reduce(torch.stack([logs, torch.tensor(float(errors.numel())).double()]))
            scale = phase * math.exp(total[0] / total[1])

        def linearise(theta: Tensor, nudge: Tensor, scale: float = scale) -> tuple:
            first = next(turn) * size
            mine = (batches[(first + i) % len(batches)] for i in range(size))
            products = (normal_products(student, theta, b, nudge, scale) for b in mine)
            products = reduce(sum(products, torch.zeros(())).cpu())
            a, g = products[:-1, :-1], products[:-1, -1]
            floor = a.diagonal().max() * 1e-12 + 1e-300
            return products, lambda i: torch.linalg.solve(
                a + torch.diag(DAMPING[i] * a.diagonal() + floor), g
            )

        theta, _ = search(
            theta,
            linearise,
            lambda thetas, scale=scale: values(thetas, scale),
            rounds=-(-rounds // len(phases)),
            choices=range(len(DAMPING)),
            coarse=range(0, len(DAMPING), 2),
            least_gain=LEAST_GAIN,
        )
        best.append((values([theta])[0], theta))
    return min(best, key=lambda pair: pair[0])[1]


def search(
    theta: Tensor,
    linearise: Linearise,
    values: Callable[[Sequence[Tensor]], Iterable[float]],
    *,
    rounds: int,
    choices: range,
    coarse: range,
    least_gain: float = 0.0,
) -> tuple[Tensor, float]:
    """The vector after some rounds of linearised steps, and its value, never a larger one.

    A round tries the steps of the `coarse` choices, or of those near the last. A first round
    without a better one is followed by another with nudges that fit.
    """
    (best,), nudge = values([theta]), torch.full_like(theta, NUDGE)
    window, failed = coarse, False
    for _ in range(rounds):
        products, step = linearise(theta, nudge)
        nudge = fitting_nudges(products)
        moved = [theta + step(i) for i in window]
        value, at = min(zip(values(moved), range(len(window)), strict=True))
        if value >= best or math.isnan(value):
            if failed:
                break
            window, failed = coarse, True
            continue
        small = least_gain > 0 and value > (1 - least_gain) * best
        theta, best, failed, near = moved[at], value, False, window[at]
        window = choices[max(0, near - 1) : near + 2]
        if small:
            break
    return theta, best


def normal_products(
    student: Student, theta: Tensor, batch: Trajectories, nudge: Tensor, scale: float = math.inf
) -> Tensor:
    """Products [P + 1, P + 1] of the Jacobian's columns and, last, what is left to the target.

    Samples weigh as the `scale` of `rmses` has it. They are taken a few at a time where the
    columns of all would fill the memory.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in batch.parts(COLUMN_NUMBERS // (len(theta) * batch.x[0].numel())):
        moving = ends(student, theta, part, nudge)
        end = next(moving)
        columns = [(x - end) / h for x, h in zip(moving, nudge.tolist(), strict=True)]
        left = part.targets[-1] - end
        columns = [column.unsqueeze(1) for column in (*columns, left)]
        if scale < math.inf:
            weight = (1 + left.square().flatten(1).sum(1) / scale).rsqrt()
            columns = [c.mul_(weight.reshape(-1, *[1] * left.ndim)) for c in columns]
        total = total + gram(columns)
    return total


def ends(student: Student, theta: Tensor, batch: Trajectories, nudge: Tensor) -> Iterator[Tensor]:
    """Where the student ends, [B, *], then where it ends with each of the P numbers nudged.

    The answers of the first trajectory are kept, and only the rows that a number changes are
    asked for again: a change near the end of a trajectory costs only the end.
    """
    denoiser, calls = batch.field.denoiser, []
    thetas = [theta, *(theta + row for row in torch.diag(nudge))]
    samplers = sent([student.sampler(each) for each in thetas], batch.x)

    def recorded(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        calls.append(denoiser(x, sigma, cond))
        return calls[-1]

    def end_by(i: int, network: Callable[[Tensor, Tensor, Condition | None], Tensor]) -> Tensor:
        field = dataclasses.replace(batch.field, denoiser=network)
        return last_state(samplers[i], dataclasses.replace(batch, field=field))

    yield end_by(0, recorded)
    for i, changes in enumerate(student.changes, 1):
        left = iter(zip(calls, changes, strict=True))

        def asked(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            x0, points = next(left)  # noqa: B023 (called before the next turn)
            size = len(x) // len(points)
            blocks = [slice(k * size, (k + 1) * size) for k in range(len(points))]
            new = [block for block, changed in zip(blocks, points, strict=True) if changed]
            if len(new) in (0, len(points)):
                return denoiser(x, sigma, cond) if new else x0
            fresh = denoiser(cut(x, new), cut(sigma, new), rows_of(cond, new)).split(size)
            answers = iter(fresh)
            pairs = zip(blocks, points, strict=True)
            return torch.cat([next(answers) if changed else x0[b] for b, changed in pairs])

        yield end_by(i, asked)


def enough(batches: Sequence[Trajectories]) -> int:
    """How many batches a round's Jacobian needs."""
    return -(-JACOBIAN_NUMBERS // batches[0].x.numel())


def fitting_nudges(products: Tensor) -> Tensor:
    """Nudges [P] that each move the end by a part of its distance to the target."""
    effect = (products.diagonal()[:-1] / products[-1, -1]).sqrt().nan_to_num(nan=0.0)
    return (REACH / effect.clamp(min=1e-9)).clamp(1e-5, 1e-1)
