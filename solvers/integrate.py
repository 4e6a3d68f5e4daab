"""The one sampling loop. Sampling, distillation, PPO rollouts and the tests all run it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.field import Field, Rates
from solvers.process import Level

MAX_PAST = 3
MAX_SLOPES = 4


@dataclass(frozen=True)
class Point:
    """A place on the trajectory; its slope is evaluated when a solver first asks for it."""

    sigma: Any  # a Level, which is a float but for grids of each sample's own
    x: Tensor  # [B, 1, *]
    slope: Callable[[], Tensor]

    @cached_property
    def d(self) -> Tensor:
        """dx/dsigma here, [B, 1, *]."""
        return self.slope()

    @property
    def x0(self) -> Tensor:
        """The clean estimate x - sigma d, [B, 1, *]."""
        return self.x - self.sigma * self.d

    def detached(self) -> "Point":
        """The same point, through which no gradient flows; a slope not asked for stays so."""
        if "d" not in vars(self):
            return Point(self.sigma, self.x.detach(), lambda: self.slope().detach())
        return Point(self.sigma, self.x.detach(), lambda: self.d.detach())


@dataclass(frozen=True)
class Step:
    """All that a solver may look at on its way from `now` to `sigma_next`."""

    index: int
    sigmas: tuple[Any, ...]  # the whole grid, without a final 0
    now: Point
    sigma_next: Level
    past: tuple[Point, ...] = ()  # newest first
    slopes: tuple[Tensor, ...] = ()  # [B, 1, *] each, of earlier calls at any place; newest first

    @property
    def h(self) -> Level:
        """The step in sigma, negative."""
        return self.sigma_next - self.now.sigma

    @property
    def left(self) -> int:
        """How many steps of the grid follow this one."""
        return len(self.sigmas) - 2 - self.index


class Solver(Protocol):
    """A step is a pure function: no state, no printing, gradients flow through it."""

    def __call__(self, field: Field, step: Step) -> Tensor:
        """-> x at step.sigma_next, [B, K or 1, *]."""
        ...


@dataclass(frozen=True)
class Loop:
    """Where a trajectory stands: all that its next step depends on, as a value.

    Whoever cannot call the network from inside (a pipeline that calls its scheduler) takes the
    same step again with one more answer each time; an edit of x is `replace(loop, x=...)`.
    """

    x: Tensor  # [B, 1, *] at sigmas[index]
    index: int = 0
    past: tuple[Point, ...] = ()  # newest first
    slopes: tuple[Tensor, ...] = ()  # as in Step
    step: Step | None = None  # the one that led here, for correctors

    @classmethod
    def start(cls, x: Tensor) -> "Loop":
        """The start at x [B, *], in float32 at least."""
        return cls(x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(1))

    def detached(self) -> "Loop":
        """The same, through which no gradient flows."""
        past = tuple(point.detached() for point in self.past)
        slopes = tuple(d.detach() for d in self.slopes)
        return dataclasses.replace(self, x=self.x.detach(), past=past, slopes=slopes)


def advance(
    loop: Loop,
    solver: Solver,
    field: Field,
    grid: tuple[Level, ...],
    *,
    first_slope: Callable[[Tensor, float], Tensor] | None = None,
    correct: Callable[[Step, Point], Point] | None = None,
    rates: Sequence[Rates] | None = None,
) -> Loop:
    """One step of `integrate` on a checked grid (`levels`)."""
    answers: list[Tensor] = []
    i, x = loop.index, loop.x
    own = rates[min(i, len(rates) - 1)] if rates else field.rates
    field = dataclasses.replace(field, record=answers.append, rates=own)
    sigma, sigma_next = grid[i : i + 2]
    now = Point(sigma, x, slope_at(first_slope if first_slope and i == 0 else field, x, sigma))
    if correct and loop.step:
        now = correct(loop.step, now)
    inner = grid[:-1] if is_zero(grid[-1]) else grid
    step = Step(i, inner, now, sigma_next, loop.past, loop.slopes)
    x = now.x0 if is_zero(sigma_next) else solver(field, step)
    past = (now, *loop.past)[:MAX_PAST]
    return Loop(x, i + 1, past, newest(answers, loop.slopes), step)


def integrate(
    solver: Solver,
    field: Field,
    x: Tensor,
    sigmas: Tensor | Sequence[Level],
    *,
    first_slope: Callable[[Tensor, float], Tensor] | None = None,
    correct: Callable[[Step, Point], Point] | None = None,
    rates: Sequence[Rates] | None = None,
    detach: bool = False,
) -> Iterator[Tensor]:
    """Yield x [B, *] at sigmas[1], ..., sigmas[N], from x [B, *] at sigmas[0].

    `sigmas` falls; it may end in 0, a step that every solver takes by denoising (x0 is
    yielded last). `first_slope(x, sigma)` stands in for the network's first call (AFS), and
    `correct` may move a point once its slope is known, as predictor-corrector methods do.
    `rates` are guidance rates by step, the last for all that follow. `sigmas` may hold tensors
    [B, 1, 1...] of each sample's own levels, which are taken as they are.
    `detach` cuts the gradient between steps, so that each step learns alone. `field.tally`
    counts the calls. The state is float32 at least. Raises ValueError for a bad grid.
    """
    own = not isinstance(sigmas, Tensor) and any(isinstance(s, Tensor) for s in sigmas)
    grid = tuple(sigmas) if own else levels(sigmas)  # type: ignore[arg-type]
    loop = Loop.start(x)
    while loop.index < len(grid) - 1:
        loop = advance(
            loop, solver, field, grid, first_slope=first_slope, correct=correct, rates=rates
        )
        yield loop.x.squeeze(1)
        if detach:
            loop = loop.detached()


def slope_at(
    field: Callable[[Tensor, Any], Tensor], x: Tensor, sigma: Level
) -> Callable[[], Tensor]:
    """The field at one place, not yet evaluated."""
    return lambda: field(x, sigma)


def is_zero(sigma: Level) -> bool:
    """Whether a level is the final 0; each sample's own levels never are."""
    return not isinstance(sigma, Tensor) and sigma == 0


def newest(answers: list[Tensor], slopes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The newest slopes, each on its own: those of the `answers` [B, K, *], then earlier ones."""
    points = [point for d in answers for point in d.split(1, 1)]
    return (*reversed(points), *slopes)[:MAX_SLOPES]


def levels(sigmas: Tensor | Sequence[float]) -> tuple[float, ...]:
    """A grid as floats; ValueError unless it has two levels or more, falling, the last >= 0."""
    grid = tuple(float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas))
    falling = all(a > b for a, b in pairwise(grid))
    if len(grid) < 2 or not falling or not math.isfinite(grid[0]) or grid[-1] < 0:
        raise ValueError(f"sigmas must be two or more falling levels >= 0, not {list(grid)}")
    return grid
