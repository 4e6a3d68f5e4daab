"""The vector field that every solver integrates.

Shapes: B batch, K points evaluated together, * one sample (C, H, W for images). The rows of a
network call are tiled, all samples at point 1, then all at point 2 and so on: [K * B, *].
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solvers.process import Level


@dataclass(frozen=True)
class Condition:
    """What a network is told besides x: tensors of B rows, and the same for "nothing"."""

    given: dict[str, Tensor]
    null: dict[str, Tensor] | None = None

    def repeat(self, k: int) -> "Condition":
        """All rows k times over, [B, ...] -> [k * B, ...]."""
        if k == 1:
            return self
        return Condition(tiled(self.given, k), self.null and tiled(self.null, k))


def tiled(tensors: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Every tensor's rows k times over, [B, ...] -> [k * B, ...]."""
    return {name: v.repeat(k, *[1] * (v.ndim - 1)) for name, v in tensors.items()}


class Denoiser(Protocol):
    """Estimates the clean sample. Backends are denoisers; so are wrappers of denoisers."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None, /) -> Tensor:
        """x [B, *] at noise level sigma [B] -> E[x0 | x, sigma] [B, *]."""
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
    heard: Callable[[Tensor], object] | None = None  # told every result, for the loop

    def __call__(self, x: Tensor, sigma: Level, network_sigma: Level | None = None) -> Tensor:
        """x [B, K, *] at sigma -> d [B, K, *].

        `network_sigma` is the level that the network is told, where it is not `sigma`.
        """
        told = sigma if network_sigma is None else network_sigma
        self.tally.calls += 1
        self.tally.rows += x.shape[0] * x.shape[1]
        d = (x - self.denoised(x, levels_of(x, told))) / sigma
        if self.heard:
            self.heard(d)
        return d

    def denoised(self, x: Tensor, levels: Tensor) -> Tensor:
        """x [B, K, *] at levels [B, K] -> x0 [B, K, *], at most `points_chunk` points a call."""
        chunk = self.points_chunk or x.shape[1]
        if chunk >= x.shape[1]:
            return self.asked(x, levels)
        parts = zip(x.split(chunk, 1), levels.split(chunk, 1), strict=True)
        return torch.cat([self.asked(*part) for part in parts], 1)

    def asked(self, x: Tensor, levels: Tensor) -> Tensor:
        """One network call: x [B, K, *] at levels [B, K] -> x0 [B, K, *]."""
        b, k = levels.shape
        rows, told = x.transpose(0, 1).flatten(0, 1), levels.t().reshape(k * b)
        x0 = self.denoiser(rows, told, self.cond and self.cond.repeat(k))
        return x0.unflatten(0, (k, b)).transpose(0, 1)


def levels_of(x: Tensor, level: Level) -> Tensor:
    """A level for each sample and point of x [B, K, *], [B, K]."""
    if isinstance(level, Tensor):
        return level.to(x).reshape(level.shape[:2]).expand(x.shape[:2])
    return x.new_full(x.shape[:2], level)


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance, x0 = null + scale (given - null), as a denoiser of its own.

    Ho & Salimans 2022, arXiv:2207.12598, in the convention where scale 1 is no guidance.
    Both halves go to the network in one call of twice the rows, "nothing" first.
    """

    denoiser: Denoiser
    scale: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        if self.scale == 1 or cond is None or cond.null is None:
            return self.denoiser(x, sigma, cond)
        both = {name: torch.cat([cond.null[name], v]) for name, v in cond.given.items()}
        x0 = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), Condition(both))
        null, given = x0.chunk(2)
        return null.lerp(given, self.scale)
