"""What a solver sees of a trajectory: points, a step, and where the loop stands.

The loop itself is `solvers.sampler.Sampler.states`, the only one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.field import Field
from solvers.process import Level

MAX_PAST, MAX_SLOPES = 3, 4


@dataclass(frozen=True)
class Point:
    """A place on the trajectory; its slope is evaluated when a solver first asks for it."""

    sigma: Any  # a Level, which is a float but for grids of each sample's own
    x: Tensor  # [B, 1, *]
    slope: Callable[[], Tensor]

    @cached_property
    def d(self) -> Tensor:
        """The slope dx/dsigma here, [B, 1, *]."""
        return self.slope()

    @property
    def x0(self) -> Tensor:
        """The clean estimate x - sigma d, [B, 1, *]."""
        return self.x - self.sigma * self.d

    def detached(self) -> "Point":
        """The same point, through which no gradient flows; a slope not asked for stays so."""
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
    to_zero: bool = False  # whether the grid has a final 0

    @property
    def h(self) -> Level:
        """The step in sigma, negative."""
        return self.sigma_next - self.now.sigma


class Solver(Protocol):
    """A step is a pure function: no state, no printing, gradients flow through it."""

    def __call__(self, field: Field, step: Step) -> Tensor:
        """The state x at step.sigma_next, [B, K or 1, *]."""
        ...


@dataclass(frozen=True)
class Loop:
    """Where a trajectory stands: all that its next step depends on, as a value.

    Who cannot call the network from inside takes a step again with one more answer each time.
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
        """The same place, through which no gradient flows."""
        past = tuple(point.detached() for point in self.past)
        slopes = tuple(d.detach() for d in self.slopes)
        return dataclasses.replace(self, x=self.x.detach(), past=past, slopes=slopes)


def levels(sigmas: Tensor | Sequence[float]) -> tuple[float, ...]:
    """A grid as floats; ValueError unless it has two levels or more, falling, the last >= 0."""
    grid = tuple(float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas))
    falling = all(a > b for a, b in pairwise(grid))
    if len(grid) < 2 or not falling or not math.isfinite(grid[0]) or grid[-1] < 0:
        raise ValueError(f"sigmas must be two or more falling levels >= 0, not {list(grid)}")
    return grid
