"""The vector field that every solver integrates.

Shapes: B batch, K points evaluated together, * one sample (C, H, W for images). The rows of a
network call are tiled, all samples at point 1, then all at point 2 and so on: [K * B, *].
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from solvers.process import Level

Rates: TypeAlias = tuple[float, ...] | Tensor
"""Guidance rates of a call: a float for each of its K points, or [B, K], each image's own."""


@dataclass(frozen=True)
class Condition:
    """What a network is told besides x: tensors of B rows, and the same for "nothing".

    `rates` are this call's, if not the denoiser's own: of equal blocks of the rows, or [B].
    """

    given: dict[str, Tensor]
    null: dict[str, Tensor] | None = None
    rates: Rates | None = None

    def repeat(self, k: int, rates: Rates | None = None) -> "Condition":
        """The condition with all rows k times over, [k * B, ...], for a call at these rates."""
        if k == 1 and rates is None:
            return self
        rates = rates.t().flatten() if isinstance(rates, Tensor) else rates
        return Condition(tiled(self.given, k), self.null and tiled(self.null, k), rates)


def tiled(tensors: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Every tensor's rows k times over, [B, ...] -> [k * B, ...]."""
    return {name: v.repeat(k, *[1] * (v.ndim - 1)) for name, v in tensors.items()}


class Denoiser(Protocol):
    """Estimates the clean sample. Backends are denoisers; so are wrappers of denoisers."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None, /) -> Tensor:
        """The estimate E[x0 | x, sigma] [B, *] from x [B, *] at noise levels sigma [B]."""
        ...


@dataclass
class Tally:
    """What a loop asked of the network: sequential calls, and rows (one per image and point)."""

    calls: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Field:
    """The slope dx/dsigma = (x - D(x, sigma)) / sigma at any number of points per sample.

    All points go to the network in one call; `points_chunk` bounds how many do at once where
    memory is short, and changes nothing else. `tally` counts calls and rows.
    """

    denoiser: Denoiser
    cond: Condition | None = None
    points_chunk: int | None = None
    tally: Tally = dataclasses.field(default_factory=Tally, compare=False)
    record: Callable[[Tensor], object] | None = None  # gets every result, for the loop
    rates: Rates | None = None  # of calls that say nothing else; None: the denoiser's own

    def __call__(
        self,
        x: Tensor,
        sigma: Level,
        network_sigma: Level | None = None,
        rates: Rates | None = None,
    ) -> Tensor:
        """The slopes d [B, K, *] of x [B, K, *] at sigma.

        `network_sigma` is the level that the network is told, where it is not `sigma`, and
        `rates` are the points' guidance rates, where they are not the interval's.
        """
        (b, k), level = x.shape[:2], sigma if network_sigma is None else network_sigma
        self.tally.calls += 1
        self.tally.rows += b * k
        if isinstance(level, Tensor):
            levels = level.to(x).reshape(level.shape[:2]).expand(b, k)
        else:
            levels = x.new_full((b, k), level)
        rates = of_points(self.rates, k) if rates is None else rates
        chunk = self.points_chunk or k
        x0 = []
        for p in (slice(i, i + chunk) for i in range(0, k, chunk)):
            n, rows = levels[:, p].shape[1], x[:, p].transpose(0, 1).flatten(0, 1)
            cut = rates[:, p] if isinstance(rates, Tensor) else rates and rates[p]
            cond = self.cond and self.cond.repeat(n, cut)
            answer = self.denoiser(rows, levels[:, p].t().reshape(n * b), cond)
            x0.append(answer.unflatten(0, (n, b)).transpose(0, 1))
        d = (x - (torch.cat(x0, 1) if len(x0) > 1 else x0[0])) / sigma
        if self.record:
            self.record(d)
        return d


def of_points(rates: Rates | None, k: int) -> Rates | None:
    """An interval's one rate for each of k points."""
    if isinstance(rates, Tensor):
        return rates.expand(-1, k)
    return rates and rates * k


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance, x0 = null + scale (given - null), as a denoiser of its own.

    Ho & Salimans 2022, arXiv:2207.12598, in the convention where scale 1 is no guidance.
    Both halves go to the network in one call, "nothing" first; rows at scale 1 have no such half.
    Rates that come with the condition take the place of `scale`.
    """

    denoiser: Denoiser
    scale: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        rates = (self.scale,) if cond is None or cond.rates is None else cond.rates
        shared = not isinstance(rates, Tensor)
        if cond is None or cond.null is None or (shared and set(rates) == {1}):
            return self.denoiser(x, sigma, cond)
        if not shared:
            rates = (rates.to(x).reshape(-1, *[1] * (x.ndim - 1)),)
        elif len(set(rates)) == 1:
            rates = rates[:1]
        size = len(x) // len(rates)
        parts = [slice(i * size, (i + 1) * size) for i in range(len(rates))]
        guided = [p for p, rate in zip(parts, rates, strict=True) if not (shared and rate == 1)]

        def joined(null: Tensor, given: Tensor) -> Tensor:
            return torch.cat([*(null[part] for part in guided), given])

        both = {name: joined(cond.null[name], v) for name, v in cond.given.items()}
        x0 = self.denoiser(joined(x, x), joined(sigma, sigma), Condition(both))
        *nulls, given = x0.split([*[size] * len(guided), len(x)])
        if len(rates) == 1:
            return nulls[0].lerp(given, rates[0])
        pairs = zip(parts, rates, strict=True)
        return torch.cat(
            [given[p] if r == 1 else nulls.pop(0).lerp(given[p], r) for p, r in pairs]
        )
