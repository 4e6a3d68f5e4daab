"""EPD turned inside out: the caller asks the network, one point after another.

`integrate` calls the network; a diffusers pipeline calls its scheduler. B rows, * one sample.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from solvers.epd import Directions
from solvers.field import Field
from solvers.integrate import MAX_PAST, Point, Solver, Step
from solvers.process import Process

Clean = Callable[[Tensor, Tensor], Tensor]
"""x [B, *] and the levels [B] that the network was told -> its x0 [B, *]."""


@dataclass(frozen=True)
class Call:
    """One call of the network: its interval, and which of the K points, None for the start."""

    interval: int
    point: int | None
    start: float  # sigma at the start of the interval
    sigma: float  # sigma of x in this call
    told: float  # the level that the network is told


@dataclass
class Interleaved:
    """A picture under way: which call is next, and what the calls of this interval gave."""

    table: Directions
    base: Solver
    sigmas: tuple[float, ...]
    process: Process
    afs: bool = False
    index: int = 0
    first: int = 0
    start: Point | None = None  # of this interval, [B, 1, *]
    points: Tensor | None = None  # [B, K, *]
    slopes: list[Tensor] = field(default_factory=list)  # [B, *] each
    past: tuple[Point, ...] = ()
    given: Tensor | None = None  # what the caller got last, in its dtype
    exact: Tensor | None = None  # the same in float32

    def __post_init__(self) -> None:
        self.calls = tuple(call for i in range(len(self.sigmas) - 1) for call in self.interval(i))

    def interval(self, i: int) -> list[Call]:
        """The calls of an interval, its start first unless AFS does without."""
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        r, time_scale = self.table.r[i].tolist(), self.table.time_scale[i].tolist()
        at = [sigma * (following / sigma) ** place for place in r]
        calls = [
            Call(i, k, sigma, s, c * s)
            for k, (s, c) in enumerate(zip(at, time_scale, strict=True))
        ]
        return calls if self.afs and i == 0 else [Call(i, None, sigma, sigma, sigma), *calls]

    @property
    def now(self) -> Call:
        """The next call; ValueError after the last one."""
        if self.index >= len(self.calls):
            raise ValueError(f"all {len(self.calls)} timesteps are taken: call set_timesteps")
        return self.calls[self.index]

    def begin(self, index: int) -> None:
        """Start at this call; ValueError unless it is the first of an interval."""
        starts = [0, *(j for j, pair in enumerate(pairwise(self.calls), 1) if new(*pair))]
        if index not in starts:
            n = len(self.calls)
            strengths = ", ".join(f"{(n - j) / n:.4g}" for j in starts)
            raise ValueError(
                f"timestep {index} of {n} is inside an interval of the table: "
                f"use num_inference_steps={n} and a strength of {strengths}"
            )
        self.index = self.first = index

    def seen(self, x: Tensor) -> Tensor:
        """Where the network is asked: x itself but for AFS, which moves to the first point."""
        if self.starts_without_call:
            return self.reached(self.analytic(x))[:, 0].to(x.dtype)
        return x

    def step(self, sample: Tensor, clean: Clean) -> Tensor:
        """The next place to ask at, after the call at `sample` [B, *]."""
        if sample is self.given and self.exact is not None:
            x = self.exact
        else:
            x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        self.exact = self.advanced(x, clean)
        self.given = self.exact.to(sample.dtype)
        self.index += 1
        return self.given

    def advanced(self, x: Tensor, clean: Clean) -> Tensor:
        """The same in float32."""
        call = self.now
        if self.starts_without_call:
            self.enter(self.analytic(x))
            assert self.points is not None
            x = self.points[:, 0]
        d = (x - clean(x, x.new_full((len(x),), call.told))) / call.sigma
        if call.point is None:
            self.enter(Point(call.sigma, x[:, None], lambda: d[:, None]))
            following = 0
        else:
            self.slopes.append(d)
            following = call.point + 1
        assert self.points is not None
        return self.points[:, following] if following < self.table.r.shape[1] else self.left()

    @property
    def starts_without_call(self) -> bool:
        """Whether the next call is the first one, and AFS stands in for the start."""
        return self.afs and self.index == 0

    def analytic(self, x: Tensor) -> Point:
        """The start with AFS."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))[:, None]
        return Point(self.sigmas[0], wide, lambda: self.process.first_slope(wide, self.sigmas[0]))

    def enter(self, start: Point) -> None:
        """Begin an interval."""
        self.start, self.slopes = start, []
        self.points = self.reached(start)

    def reached(self, start: Point) -> Tensor:
        """The K points of this interval, [B, K, *]."""
        i, x = self.now.interval, start.x
        row = self.table.row(i, x.ndim).to(x)
        sigma = start.sigma * (self.sigmas[i + 1] / start.sigma) ** row.r
        step = Step(i, self.sigmas, start, sigma, self.past)
        return self.base(Field(unasked), step)

    def left(self) -> Tensor:
        """x at the end of this interval."""
        assert self.start is not None
        i, x = self.now.interval, self.start.x
        row = self.table.row(i, x.ndim).to(x)
        mix = (row.weight * row.dir_scale * torch.stack(self.slopes, 1)).sum(1)
        self.past = (self.start, *self.past)[:MAX_PAST]
        return x.squeeze(1) + (self.sigmas[i + 1] - self.start.sigma) * mix


def new(before: Call, after: Call) -> bool:
    """Whether another interval begins."""
    return before.interval != after.interval


def unasked(_x: Tensor, _sigma: Tensor, _cond: object) -> Tensor:
    """For bases that look at the start's slope alone; ValueError for those that ask again."""
    raise ValueError("this base makes calls of its own: a stock pipeline cannot give them")
