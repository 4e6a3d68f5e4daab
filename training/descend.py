"""Refinement of a table by any objective on where its samples end, without back-propagation.

The end of a trajectory, and what a network of features or a reward makes of it, is a function of
some tens of numbers, whose Jacobian is that many more trajectories. A round keeps the objective
as it is and takes what it looks at as linear in the numbers (a prox-linear step: Burke 1985;
Gauss-Newton, where the objective is a square). A step is paid for by what it does to the samples,
as the numbers themselves have no common scale.

Shapes: n samples, P free numbers, F features, D numbers that are looked at of each sample.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from src import ranks
from training.distances import Network, energy, frechet
from training.gram import gram
from training.refine import COLUMN_NUMBERS, ends, search
from training.student import Reduce, Student, Trajectories, last_state, sent, squared

Reward: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]
"""Latents [B, *] and the numbers of these samples -> how good each is, [B]."""
PRICES = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Of a step as far as the ends are from their targets, in units of the start's objective."""
STEPS = 60
"""Of the inner search, which asks no network."""
DIRECTIONS = 64
"""The principal directions of the teacher's samples that are looked at, of each view."""


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
        return [v.flatten(1).float() for v in (self.features(x), x)] if self.features else []

    def on(self, batches: Sequence[Trajectories]) -> "Lens":
        """The lens with the directions of the teacher's ends in these batches, of all ranks."""
        parts = [self.views(batch.targets[-1]) for batch in batches]
        bases = []
        for views in zip(*parts, strict=True):
            view = gathered(views)
            if not bool(view.isfinite().all()):
                raise ValueError("the features of the teacher's samples are not finite")
            mean = view.mean(0)
            _, sizes, basis = torch.linalg.svd((view - mean).double(), full_matrices=False)
            count = max(1, min(DIRECTIONS, int((sizes > 1e-6 * sizes[0]).sum())))
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
    reduce: Reduce = ranks.all_reduce_sum,
) -> tuple[Tensor, float]:
    """The vector after some rounds, never one with a larger objective on `judges`, and that.

    Each round tries several prices of a step, at one trajectory each. The objective is the sum of
    the weights at first, but for rewards.
    """
    lens = lens.on([*batches, *judges])
    targets = gathered([lens(batch.targets[-1], batch.numbers) for batch in judges])

    def looks(theta: Tensor) -> tuple[Tensor, Tensor]:
        """What is looked at of a vector's ends in the judges, and their mean squared error."""
        sampler, seen, errors, size = student.sampler(theta), [], torch.zeros(()), 0
        for batch in judges:
            end = last_state(sent([sampler], batch.x)[0], batch)
            seen.append(lens(end, batch.numbers))
            errors = errors + squared(end, batch.targets[-1]).double().sum()
            size += batch.x.numel()
        total = reduce(torch.stack([errors.cpu().double(), torch.tensor(float(size)).double()]))
        return gathered(seen), total[0] / total[1]

    y, error = looks(theta)
    if not bool(y.isfinite().all() & targets.isfinite().all() & error.isfinite()):
        raise ValueError("the table to refine gives samples that are not finite")
    widths = tuple(basis.shape[1] for _, basis in lens.bases)
    objective = Objective(terms, widths).started(y, targets, error)

    def value(theta: Tensor) -> float:
        if not bool(theta.isfinite().all()):
            return math.inf
        y, error = looks(theta)
        seen = objective(y, targets, error).item() if bool(y.isfinite().all()) else math.inf
        return seen if math.isfinite(seen) else math.inf

    def linearise(theta: Tensor, nudge: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
        linear = linearised(student, theta, batches, lens, nudge, reduce)
        return linear.products, lambda i: linear.step(objective, PRICES[i])

    every = range(len(PRICES))
    values = partial(map, value)
    return search(theta, linearise, values, rounds=rounds, choices=every, coarse=every)


def gathered(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts of all ranks, on the CPU."""
    return torch.cat(ranks.of_each_rank(torch.cat(list(parts)).cpu()))


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
        metric = a / left
        ridge = metric.diagonal() * 1e-3 + metric.diagonal().max() * 1e-9
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
    rows = gathered(looks), gathered(moves), gathered(targets)
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in rows]).all(0)
    look, move, target = (part[finite] for part in rows)
    count = int(reduce(torch.tensor([float(size)])))
    return Linearised(look, move, target, reduce(total.cpu()), count)
