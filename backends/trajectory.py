"""The loop turned inside out: a pipeline calls the network, and asks a scheduler what is next.

`integrate` calls its field; a pipeline calls its scheduler. So a step is taken again with the
answers so far, up to the place where it asks for one more: the same code, the same numbers.

B images, K points of a request, C copies of an image among the rows of a pipeline (K where it
takes all points in one call, else 1). Rows are [B * C, *], the copies of an image side by side,
as `num_images_per_prompt` lays them out; under guidance by rows the same rows follow once more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from backends.parametrization import Parametrization
from solvers.epd import ParallelMultistep
from solvers.field import Rates, of_points
from solvers.integrate import Loop
from solvers.process import Level
from solvers.sampler import Sampler

LEVELS = ("network_sigma", "sigma")


class Asked(Exception):
    """Raised where a step asks for an answer that is not there yet."""

    def __init__(self, x: Tensor, sigma: Level, network_sigma: Level, rates: Rates | None) -> None:
        """x [B, K, *], at levels [1 or B, K, 1...] or one, and those that the network is given."""
        super().__init__()
        self.x, self.sigma, self.network_sigma, self.rates = x, sigma, network_sigma, rates


@dataclass(frozen=True)
class Answers:
    """A field that gives the slopes so far, in order, and raises Asked for the next."""

    slopes: list[Tensor]  # [B, K, *] each
    record: Callable[[Tensor], object] = lambda _d: None
    rates: Rates | None = None
    used: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        sigma: Level,
        network_sigma: Level | None = None,
        rates: Rates | None = None,
    ) -> Tensor:
        """x [B, K, *] at sigma -> its slope [B, K, *]."""
        if len(self.used) == len(self.slopes):
            level = sigma if network_sigma is None else network_sigma
            own = of_points(self.rates, x.shape[1]) if rates is None else rates
            raise Asked(x, sigma, level, own)
        self.used.append(self.slopes[len(self.used)])
        self.record(self.used[-1])
        return self.used[-1]


def advanced(sampler: Sampler, loop: Loop, slopes: list[Tensor]) -> Loop:
    """The loop after a step with these slopes; Asked where it needs one more."""
    answers: Any = Answers(slopes)
    return sampler.advance(answers, loop)


@dataclass(frozen=True)
class Call:
    """One call of the pipeline's network: some of the K points of a request of a sampler."""

    interval: int
    points: slice
    k: int
    sigma: tuple[float, ...]  # of x, for each copy of an image
    network_sigma: tuple[float, ...]  # the level that the network is given there
    rates: tuple[float, ...] | None = None  # guidance there, where the table has its own
    first: bool = False  # of its interval
    blank: bool = False  # the answer is not used: x moves to where the first request is


def calls_of(sampler: Sampler, copies: int) -> list[Call]:
    """A sampler's calls in order, by running it on nothing; ValueError for what has no rows."""
    calls: list[Call] = []
    loop, slopes = Loop.start(torch.zeros(1, 1)), []
    sampler = sampler.at(loop.x)  # its table may be on a GPU already
    while loop.index < len(sampler.sigmas) - 1:
        try:
            loop, slopes = advanced(sampler, loop, slopes), []
        except Asked as asked:
            k, rates = asked.x.shape[1], asked.rates
            if isinstance(rates, Tensor):
                raise ValueError("a table for each image is for our own loop") from None
            if copies > 1 and k not in (1, copies):
                raise ValueError(f"{k} points do not go into {copies} rows of an image") from None
            for i in range(k if copies == 1 else 1):
                points = slice(i, i + 1) if copies == 1 else slice(0, k)
                levels = [asked.sigma, asked.network_sigma, *([rates] if rates else [])]
                each = [per_copy(level, k, points, copies) for level in levels]
                first = not slopes and i == 0
                calls.append(Call(loop.index, points, k, *each, first=first))
            slopes = [*slopes, torch.zeros_like(asked.x)]
    return calls


def per_copy(level: Any, k: int, points: slice, copies: int) -> tuple[float, ...]:
    """Levels of a request's points, or its one level, for each copy of an image."""
    if isinstance(level, Tensor):
        level = level.detach().reshape(-1).expand(k).tolist()
    here = tuple(level if isinstance(level, list | tuple) else [level] * k)[points]
    return here if len(here) == copies else here[:1] * copies


@dataclass
class Trajectory:
    """Images under way: which call is next, and what the calls so far have brought.

    `still` is for pipelines that hand the network x as it is: where the first request is
    elsewhere (AFS, parallel multistep), a blank call comes first. `rate` is the guidance where the
    second half of the rows is under the negative prompt; a table's own takes its place.
    """

    sampler: Sampler
    model: Parametrization
    copies: int = 1
    still: bool = False
    rate: float | None = None
    index: int = 0
    first: int = 0
    loop: Loop | None = None
    answers: list[Tensor] = field(default_factory=list)  # of this interval, [B, K, *] each
    points: list[Tensor] = field(default_factory=list)  # of this request, [B, 1 or K, *] each
    rows: Tensor | None = None  # what the pipeline was handed last, exactly

    def __post_init__(self) -> None:
        self.calls = calls_of(self.sampler, self.copies)
        self.moved = any(sigma != self.sampler.sigmas[0] for sigma in self.calls[0].sigma)
        if self.still and self.moved:
            one = {n: getattr(self.calls[0], n)[:1] * self.copies for n in LEVELS}
            self.calls.insert(0, replace(self.calls[0], **one, points=slice(0, 1), blank=True))
        self.network_sigma, self.at = (
            torch.tensor([getattr(call, name) for call in self.calls], dtype=torch.float64)
            for name in LEVELS
        )  # [calls, C]

    @property
    def branches(self) -> int:
        """How often each row stands in the batch: twice under guidance by rows."""
        return 1 if self.rate is None else 2

    @property
    def now(self) -> Call:
        """The next call; ValueError after the last one."""
        if self.index >= len(self.calls):
            raise ValueError(f"all {len(self.calls)} timesteps are taken: call set_timesteps")
        return self.calls[self.index]

    @property
    def alike(self) -> bool:
        """Whether the copies of an image are the same in the next call."""
        return self.now.blank or self.now.k == 1

    @property
    def unguided(self) -> bool:
        """Whether the negative prompt counts for nothing in the next call, where it has rows."""
        return self.rate is not None and set(self.now.rates or (self.rate,)) == {1}

    @property
    def beginnings(self) -> list[int]:
        """The calls at which images may begin: those that open an interval."""
        if isinstance(self.sampler.solver, ParallelMultistep):
            return [0]  # later intervals need the slopes of the calls before
        opening = [i for i, call in enumerate(self.calls) if call.first]
        return [i for i in opening if not (i and self.calls[i - 1].blank)]

    def begin(self, index: int) -> None:
        """Begin at this call; ValueError inside an interval, whose start is not there."""
        if index not in self.beginnings:
            n = len(self.calls)
            strengths = ", ".join(repr((n - j) / n).removesuffix(".0") for j in self.beginnings)
            if self.beginnings == [0]:
                raise ValueError(
                    f"a run cannot begin at timestep {index} of {n}: each call of this solver "
                    "needs those before; use a strength of 1, or an EPD predictor"
                )
            raise ValueError(
                f"timestep {index} of {n} is inside an interval of the solver: "
                f"use num_inference_steps={n} and a strength of {strengths}"
            )
        if index != self.first:
            self.index, self.first, self.loop = index, index, None

    def level(self) -> tuple[float, ...]:
        """The level of x in the next call, for each copy of an image."""
        unbegun = self.loop is None and self.index == self.first
        if unbegun or self.now.blank:
            return (self.sampler.sigmas[self.opening],) * self.copies
        return self.now.sigma

    @property
    def opening(self) -> int:
        """The interval in which images begin: the first one may have no call (AFS)."""
        return self.calls[self.first].interval if self.first else 0

    def start(self, x: Tensor) -> Tensor:
        """Set out from x [B, *] -> the rows of the first call, in float32."""
        begun = self.loop = replace(Loop.start(x), index=self.opening)
        self.sampler = self.sampler.at(self.loop.x)
        self.at, self.network_sigma = self.at.to(self.loop.x), self.network_sigma.to(self.loop.x)
        self.answers, self.points = [], []
        rows = self.turned()
        if self.now.blank:  # of which the pipeline has x as it is
            rows = self.rows = self.laid_out(begun.x)
        return rows

    def turned(self) -> Tensor:
        """As far as the answers go: the rows to ask about next, or x [B, *] at the end."""
        assert self.loop is not None
        while self.loop.index < len(self.sampler.sigmas) - 1:
            try:
                self.loop, self.answers = advanced(self.sampler, self.loop, self.answers), []
            except Asked as asked:
                self.rows = self.laid_out(asked.x[:, self.now.points])
                return self.rows
        return self.loop.x.squeeze(1)

    def laid_out(self, x: Tensor) -> Tensor:
        """x [B, K or 1, *] as rows, in every branch."""
        x = x.expand(-1, self.copies, *x.shape[2:]).flatten(0, 1)
        return torch.cat([x] * self.branches)

    def images(self, rows: Tensor) -> Tensor:
        """Rows of a pipeline -> the first of each image's copies, [B, *]."""
        return rows[: len(rows) // self.branches : self.copies]

    def edited(self, sample: Tensor, scale: float = 1.0) -> Tensor:
        """A pipeline's rows in float32: what it was handed, and what was done to it since."""
        assert self.rows is not None
        rows = torch.cat([self.rows] * (len(sample) // len(self.rows)))  # twice under guidance
        if scale == 1:  # as it mostly is: two operations less a call
            return rows + (sample.to(rows.dtype) - rows.to(sample.dtype).to(rows.dtype))
        handed = (rows * scale).to(sample.dtype).to(rows.dtype)
        return rows + (sample.to(rows.dtype) - handed) / scale

    def seen(self, sample: Tensor) -> Tensor:
        """What the network sees of a pipeline's rows."""
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self.loop is not None:
            x = self.edited(sample)
        elif self.moved and not self.still:
            x = replace(self, rate=None).start(x[:: self.copies])
        level = self.network_sigma[self.index].to(x).repeat(len(x) // self.copies)
        return self.model.seen(x, level).to(sample.dtype)

    def answer(self, sample: Tensor, output: Tensor, scale: float = 1.0) -> Tensor:
        """The network's output for a pipeline's rows -> the rows of the next call, or x [B, *].

        The pipeline's rows are `scale` times x; what is given back is x itself.
        """
        call = self.now
        if self.loop is None:
            wide = torch.promote_types(sample.dtype, torch.float32)
            x = self.start(self.images(sample).to(wide) / scale)
            x = x if self.moved and not self.still else self.edited(sample, scale)
        else:
            x = self.edited(sample, scale)
        assert self.loop is not None
        assert self.rows is not None
        if call.first:  # an edit of x goes on from here
            self.loop = replace(self.loop, x=self.loop.x + self.images(x - self.rows)[:, None])
        level, at = self.network_sigma[self.index], self.at[self.index]
        self.index += 1
        if not call.blank:
            x0 = self.model.clean(x, level.repeat(len(x) // self.copies), output)
            d = self.guided(x, x0, call)
            d = d / at.reshape(1, -1, *[1] * (d.ndim - 2))
            self.points.append(d[:, :1] if call.k == 1 else d)
            if call.points.stop == call.k:
                self.answers.append(torch.cat(self.points, 1))
                self.points = []
        return self.turned()

    def guided(self, x: Tensor, x0: Tensor, call: Call) -> Tensor:
        """x - x0 of the rows, [B, C, *], the two branches mixed by the rate of each point."""
        shape = (self.branches, -1, self.copies)
        x, x0 = x.unflatten(0, shape), x0.unflatten(0, shape)
        if self.rate is None:
            return x[0] - x0[0]
        rates = call.rates or (self.rate,) * self.copies
        if len(set(rates)) == 1:
            return x[0] - x0[1].lerp(x0[0], rates[0])
        each = zip(x0[1].unbind(1), x0[0].unbind(1), rates, strict=True)
        return x[0] - torch.stack([null.lerp(given, rate) for null, given, rate in each], 1)
