"""Full-batch L-BFGS with several starts on trajectories that are at hand.

There are few numbers to learn and the objective is not convex: so a method that uses curvature,
and more than one start (Liu & Nocedal 1989).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.distill import Batch, Distance, final_loss, squared
from training.gradient import Reduce, alone
from training.refine import Student, squared_error


@dataclass(frozen=True)
class LBFGSOptions:
    """How long, and from how many places; the first start is the given one."""

    starts: int = 3
    iterations: int = 30
    spread: float = 0.5  # standard deviation of the other starts around the given one
    seed: int = 0
    distance: Distance = squared
    reduce: Reduce = alone

    def __post_init__(self) -> None:
        if self.starts < 1 or self.iterations < 1:
            raise ValueError(f"starts {self.starts} and iterations {self.iterations}: 1 or more")


def lbfgs(
    student: Student,
    theta: Tensor,
    batches: Sequence[Batch],
    options: LBFGSOptions,
    *,
    judges: Sequence[Batch] | None = None,
) -> tuple[Tensor, float]:
    """The best vector [P] found, and its error on `judges` (the batches themselves if None).

    A step to where the loss is not a number is taken back: of each start, the best point that
    it came by is what counts.
    """
    if student.grid:
        raise ValueError("a gradient does not reach the time grid: use --method fit")
    judges = judges or batches
    found = [descend(student, start, batches, options) for start in places(theta, options)]
    candidates = [*found, theta.detach()]
    errors = [error_of(student, candidate, judges, options.reduce) for candidate in candidates]
    best = min(range(len(errors)), key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])
    return candidates[best], errors[best]


def places(theta: Tensor, options: LBFGSOptions) -> list[Tensor]:
    """The starts: theta, and normal draws around it from a generator of their own."""
    generator = torch.Generator().manual_seed(options.seed)
    theta = theta.detach().double().cpu()
    around = [
        theta + options.spread * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        for _ in range(options.starts - 1)
    ]
    return [theta, *around]


def descend(
    student: Student, start: Tensor, batches: Sequence[Batch], options: LBFGSOptions
) -> Tensor:
    """The best point on the way down from one start."""
    theta = start.clone().requires_grad_()
    best: list[tuple[float, Tensor]] = [(math.inf, start)]
    method = torch.optim.LBFGS(
        [theta], max_iter=options.iterations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        loss, slope = loss_and_slope(student, theta, batches, options)
        if not (math.isfinite(loss) and bool(slope.isfinite().all())):
            theta.grad = torch.zeros_like(theta)
            return 1e30
        theta.grad = slope
        if loss < best[0][0]:
            best[0] = loss, theta.detach().clone()
        return loss

    method.step(closure)
    return best[0][1]


def loss_and_slope(
    student: Student, theta: Tensor, batches: Sequence[Batch], options: LBFGSOptions
) -> tuple[float, Tensor]:
    """The mean loss of the ends over all samples of all ranks, and its gradient [P]."""
    total = torch.zeros(2 + len(theta), dtype=torch.float64)
    for batch in batches:
        plan, table = student.decode(theta)
        loss = final_loss(plan, table, batch, options.distance).double().sum()
        (slope,) = torch.autograd.grad(loss, theta)
        count = torch.tensor([float(len(batch.x))], dtype=torch.float64)
        total += torch.cat([loss.detach().cpu().reshape(1), count, slope])
    total = options.reduce(total)
    return (total[0] / total[1]).item(), total[2:] / total[1]


@torch.no_grad()
def error_of(student: Student, theta: Tensor, batches: Sequence[Batch], reduce: Reduce) -> float:
    """The root mean squared error of the ends, over all ranks."""
    total, count = reduce(squared_error(student, theta, batches)).tolist()
    return (total / count) ** 0.5
