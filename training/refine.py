"""Refinement of a whole table, end to end, without back-propagation.

The end of a trajectory, and what a network of features or a reward makes of it, is a function of
some tens of numbers, so its Jacobian is that many more trajectories, by difference quotients; most
of each was computed before, and the network is asked only for what a number changes. Squares are
made small by Gauss-Newton steps, whose normal equations sum over batches and ranks. Any other
objective stays as it is, and what it looks at is taken as linear in the numbers (a prox-linear
step: Burke 1985); a step is paid for by what it does to the samples, as the numbers themselves
have no common scale.

Shapes: n samples, P free numbers, F features, D numbers that are looked at of each sample.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.field import Condition
from src.ranks import all_reduce_sum, of_each_rank
from training.distances import Network, energy, frechet
from training.gram import gram
from training.student import (
    Reduce,
    Student,
    Trajectories,
    cut,
    last_state,
    rmses,
    rows_of,
    sent,
    squared,
    squared_errors,
)

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
        samplers = [student.sampler(theta) for theta in thetas]
        return rmses(samplers, judges or batches, reduce, scale)

    best = [(values([theta])[0], theta)]
    for phase in phases:
        scale = math.inf
        if phase:  # times the geometric mean of the squared errors
            errors, _ = squared_errors([student.sampler(theta)], batches)
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
        effect = (products.diagonal()[:-1] / products[-1, -1]).sqrt().nan_to_num(nan=0.0)
        nudge = (REACH / effect.clamp(min=1e-9)).clamp(1e-5, 1e-1)
        moved = {i: theta + step(i) for i in window}
        moved = {i: t for i, t in moved.items() if bool(t.isfinite().all())}
        tried = zip(values(list(moved.values())), moved, strict=True) if moved else ()
        value, near = min(tried, default=(math.inf, 0))
        if value >= best:
            if failed:
                break
            window, failed = coarse, True
            continue
        small = least_gain > 0 and value > (1 - least_gain) * best
        theta, best, failed = moved[near], value, False
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


# --- by any objective ---------------------------------------------------------------------

Reward: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]
"""Latents [B, *] and the numbers of these samples -> how good each is, [B]."""
PRICES = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Of a step as far as the ends are from their targets, in units of the start's objective."""
FLOOR = 1.0
"""What a step of 1 in any number costs at least: one that does little yet does not go far."""
STEPS = 60
"""Of the inner search, which asks no network."""
DIRECTIONS = 64
"""The principal directions of the teacher's samples that are looked at, of each view."""
ENOUGH = 1024
"""Samples to find these directions in; of more, memory and time would have no bound."""
ROUNDING = 30 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Lens:
    """What an objective looks at of a sample: its features, itself, and its reward.

    Features and latents are seen in principal directions of the teacher's samples, each in units
    of how these vary there: so no direction counts for more as it is larger, and a table that
    serves one network of features serves others too.
    """

    features: Network | None
    reward: Reward | None
    bases: tuple[tuple[Tensor, Tensor], ...] = ()  # mean [F], directions [F, D]; each view

    def views(self, x: Tensor) -> list[Tensor]:
        """The features and the latents [B, F] as they are, in float32."""
        if self.features is None:
            return []
        return [v.to(x.device).flatten(1).float() for v in (self.features(x), x)]

    def on(self, batches: Sequence[Trajectories], reduce: Reduce) -> "Lens":
        """The lens with the directions of the teacher's ends of the first samples of all ranks.

        Raises ValueError for features that are not finite.
        """
        parts, bases = [], []
        for batch in batches:  # by their numbers: the same whoever makes them, in any parts
            if parts and min(batch.numbers, default=0) >= ENOUGH:
                continue
            first = [i for i, number in enumerate(batch.numbers) if number < ENOUGH]
            rows = first if batch.numbers else slice(None)
            parts.append([view[rows] for view in self.views(batch.targets[-1])])
        for views in zip(*parts, strict=True):
            view = gathered(views, reduce)
            if not bool(view.isfinite().all()):
                raise ValueError("the features of the teacher's samples are not finite")
            mean = view.mean(0)
            _, sizes, basis = torch.linalg.svd((view - mean).double(), full_matrices=False)
            # what is not above the rounding of float32 is no direction
            least = float(view.abs().max()) * ROUNDING * len(view) ** 0.5
            held = sizes > torch.maximum(1e-6 * sizes[0], sizes.new_tensor(least))
            count = max(1, min(DIRECTIONS, int(held.sum())))
            spread = (sizes[:count] / max(1, len(view) - 1) ** 0.5).clamp(min=1e-12)
            basis = (basis[:count].T / spread).float()
            bases.append((mean.to(views[0]), basis.to(views[0])))
        return dataclasses.replace(self, bases=tuple(bases))

    def __call__(self, x: Tensor, numbers: Sequence[int]) -> Tensor:
        """Latents [B, *] -> all that is looked at, [B, D], a reward last."""
        views = zip(self.views(x), self.bases, strict=True)
        columns = [(view - mean) @ basis for view, (mean, basis) in views]
        if self.reward:
            columns.append(self.reward(x, numbers).to(x.device).float().reshape(-1, 1))
        return torch.cat(columns, 1) if columns else x.new_zeros(len(x), 0, dtype=torch.float32)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of distances, each in units of its value at the start.

    Sets are compared both in features and in latents. `widths` are the directions of the two.
    """

    terms: tuple[tuple[float, str], ...]
    widths: tuple[int, ...] = ()
    units: tuple[float, ...] = ()

    def parts(self, y: Tensor, t: Tensor, error: Tensor) -> list[tuple[float, str, Tensor]]:
        """Weight, name and value of each part, for what is looked at of student and teacher.

        y, t: [n, D]; `error` is the mean squared error of the ends.
        """
        sizes = [*self.widths, y.shape[1] - sum(self.widths)]
        views = list(zip(y.split(sizes, 1), t.split(sizes, 1), strict=True))
        parts = []
        for weight, name in self.terms:
            if name == "l2":
                parts.append((weight, name, error))
            elif name == "reward":
                parts.append((weight, name, -y[:, -1].mean()))
            elif name in ("features", "inception"):
                seen, wanted = views[0]
                parts.append((weight, name, (seen - wanted).square().sum(1).mean()))
            else:
                distance, sets = energy if name == "energy" else frechet, views[:-1]
                parts += [(weight / len(sets), name, distance(*pair)) for pair in sets]
        return parts

    def __call__(self, y: Tensor, t: Tensor, error: Tensor) -> Tensor:
        """The weighted sum."""
        parts = zip(self.parts(y, t, error), self.units, strict=True)
        return torch.stack([w * part.double() / unit for (w, _, part), unit in parts]).sum()

    def started(self, y: Tensor, t: Tensor, error: Tensor) -> "Objective":
        """The same with its units; a reward's is how it varies between samples."""
        spread = float(y[:, -1].std()) if y.shape[1] else 0.0
        parts = self.parts(y, t, error)
        units = (spread if name == "reward" else value.item() for _, name, value in parts)
        return dataclasses.replace(self, units=tuple(max(unit, 1e-12) for unit in units))


@torch.no_grad()
def descend(
    student: Student,
    theta: Tensor,
    batches: Sequence[Trajectories],
    judges: Sequence[Trajectories],
    terms: tuple[tuple[float, str], ...],
    lens: Lens,
    *,
    rounds: int = 3,
    reduce: Reduce = all_reduce_sum,
) -> tuple[Tensor, float]:
    """The vector after some rounds, never one with a larger objective on `judges`, and that.

    Each round tries several prices of a step, at one trajectory each. The objective is the sum of
    the weights at first, but for rewards. Raises ValueError where samples, features or rewards
    are not finite at the start.
    """
    lens = lens.on([*batches, *judges], reduce)
    targets = gathered([lens(batch.targets[-1], batch.numbers) for batch in judges], reduce)

    def looks(theta: Tensor) -> tuple[Tensor, Tensor]:
        """What is looked at of a vector's ends in the judges, and their mean squared error."""
        sampler, seen, errors, size, lost = student.sampler(theta), [], torch.zeros(()), 0, 0
        for batch in judges:
            end = last_state(sent([sampler], batch.x)[0], batch)
            lost += not bool(end.isfinite().all())
            seen += [] if lost else [lens(end, batch.numbers)]
            errors = errors + squared(end, batch.targets[-1]).double().sum()
            size += batch.x.numel()
        sums = [errors.cpu().double(), *torch.tensor([size, lost], dtype=torch.float64)]
        total = reduce(torch.stack(sums))
        if total[2]:  # on any rank: a reward, say, cannot look at what is no number
            return torch.full((1, 1), math.nan), total[0] / 0
        return gathered(seen, reduce), total[0] / total[1]

    y, error = looks(theta)
    if not bool(error.isfinite()):
        raise ValueError("the table to refine gives samples that are not finite")
    if not bool(y.isfinite().all() & targets.isfinite().all()):
        raise ValueError("the features or the reward of some samples are not finite")
    widths = tuple(basis.shape[1] for _, basis in lens.bases)
    objective = Objective(terms, widths).started(y, targets, error)

    def value(theta: Tensor) -> float:
        y, error = looks(theta)
        seen = objective(y, targets, error).item() if bool(y.isfinite().all()) else math.inf
        return seen if math.isfinite(seen) else math.inf

    def linearise(theta: Tensor, nudge: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
        linear = linearised(student, theta, batches, lens, nudge, reduce)
        return linear.products, lambda i: linear.step(objective, PRICES[i])

    every = range(len(PRICES))
    values = partial(map, value)
    return search(theta, linearise, values, rounds=rounds, choices=every, coarse=every)


def gathered(parts: Sequence[Tensor], reduce: Reduce) -> Tensor:
    """The rows of all parts of all ranks, on the CPU."""
    reduce(torch.zeros(1))  # where ranks that are asked to stop meet those that are not
    return torch.cat(of_each_rank(torch.cat(list(parts)).cpu()))


@dataclass(frozen=True)
class Linearised:
    """The ends, and what is looked at of them, as linear in the numbers."""

    looks: Tensor  # [n, D]
    moves: Tensor  # [n, P, D]
    targets: Tensor  # [n, D]
    products: Tensor  # [P + 1, P + 1], of the ends' Jacobian and, last, what is left
    count: int  # numbers of all ends

    def step(self, objective: Objective, price: float) -> Tensor:
        """The step [P] that makes the objective, as far as it is linear, and its price least."""
        a, q, left = self.products[:-1, :-1], self.products[:-1, -1], self.products[-1, -1]
        if not left > 0:  # the start is exactly the target
            return torch.zeros(len(a), dtype=a.dtype)
        metric = a / left
        ridge = metric.diagonal() * 1e-3 + metric.diagonal().max() * 1e-9 + FLOOR
        root = torch.linalg.cholesky(metric + torch.diag(ridge))
        z = torch.zeros(len(a), dtype=torch.float64, requires_grad=True)
        method = torch.optim.LBFGS([z], max_iter=STEPS, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            return torch.linalg.solve_triangular(root.T, z[:, None], upper=True)[:, 0]

        def closure() -> float:
            with torch.enable_grad():
                move = step()
                looks = self.looks + torch.einsum("npd,p->nd", self.moves, move.float())
                error = (left - 2 * q @ move + move @ a @ move) / self.count
                value = objective(looks, self.targets, error) + price * z.square().sum()
                (z.grad,) = torch.autograd.grad(value, z)
            return value.item()

        method.step(closure)
        return step().detach()


def linearised(
    student: Student,
    theta: Tensor,
    batches: Sequence[Trajectories],
    lens: Lens,
    nudge: Tensor,
    reduce: Reduce,
) -> Linearised:
    """The ends of batches, and what is looked at of them, by difference quotients."""
    looks, moves, targets, size = [], [], [], 0
    total, most = torch.zeros(()), COLUMN_NUMBERS // (len(theta) * batches[0].x[0].numel())
    for part in (part for batch in batches for part in batch.parts(most)):
        moving = ends(student, theta, part, nudge)
        end = next(moving)
        here, columns, seen = lens(end, part.numbers), [], []
        for x, h in zip(moving, nudge.tolist(), strict=True):
            columns.append((x - end).unsqueeze(1) / h)
            seen.append((lens(x, part.numbers) - here) / h)
        total = total + gram([*columns, (part.targets[-1] - end).unsqueeze(1)])
        looks.append(here)
        moves.append(torch.stack(seen, 1))
        targets.append(lens(part.targets[-1], part.numbers))
        size += part.x.numel()
    rows = [gathered(parts, reduce) for parts in (looks, moves, targets)]
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in rows]).all(0)
    look, move, target = (part[finite] for part in rows)
    count = int(reduce(torch.tensor([float(size)])))
    return Linearised(look, move, target, reduce(total.cpu()), count)
