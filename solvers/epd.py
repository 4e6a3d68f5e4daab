"""Ensemble parallel directions (Zhu et al. 2025, arXiv:2507.14797): K learned slopes a step."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.classic import EDM, Euler
from solvers.exponential import DEIS, UniPC
from solvers.field import Field
from solvers.integrate import Solver, Step


@dataclass(frozen=True)
class Directions:
    """Where K more slopes are taken in each of N steps, and how they are mixed.

    Every tensor is [N, K], or [B, N, K] for a table of its own per sample.
    """

    r: Tensor  # place in [0, 1] from sigma to sigma_next, on the log-sigma axis
    weight: Tensor  # >= 0, sums to 1 over K
    time_scale: Tensor  # the network is told time_scale * sigma
    dir_scale: Tensor  # multiplies the slope

    def to(self, like: Tensor) -> "Directions":
        """The table on the device and in the dtype of `like`."""
        return Directions(*(t.to(like) for t in self.tensors()))

    def row(self, i: int, ndim: int) -> "Directions":
        """Step i, each tensor [B or 1, K, 1...] with `ndim` dimensions."""
        k = self.r.shape[-1]
        cut = (t[..., i, :].reshape(-1, k, *[1] * (ndim - 2)) for t in self.tensors())
        return Directions(*cut)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in the order of the constructor."""
        return self.r, self.weight, self.time_scale, self.dir_scale


@dataclass(frozen=True)
class EPD:
    """Take K slopes at points that `base` reaches, and step along their mixture.

    With `base=Euler()` this is the EPD solver; with a multistep base it is the plug-in. Put
    the table where the samples are (`table.to(x)`) before the loop, so that no step waits for
    a copy. Raises ValueError for a base that cannot serve, and in the loop for a table whose
    number of rows is not that of the steps.
    """

    table: Directions
    base: Solver = dataclasses.field(default_factory=Euler)

    def __post_init__(self) -> None:
        reasons = {
            UniPC: "its corrector moves each point after its slopes have been used",
            EDM: "its noise would differ between the points of one step",
            EPD: "its points would need points of their own",
        }
        reason = reasons.get(type(self.base))
        if self.base == DEIS(4, "rhoab"):
            reason = "its weights are those of a whole step, wherever the points lie"
        if reason:
            raise ValueError(f"EPD cannot stand on {type(self.base).__name__}: {reason}")

    def __call__(self, field: Field, step: Step) -> Tensor:
        now, rows = step.now, self.table.r.shape[-2]
        if rows != len(step.sigmas) - 1:
            raise ValueError(f"a table of {rows} steps cannot take {len(step.sigmas) - 1} steps")
        row = self.table.row(step.index, now.x.ndim).to(now.x)
        sigma = now.sigma * (step.sigma_next / now.sigma) ** row.r
        x = self.base(field, dataclasses.replace(step, sigma_next=sigma))
        d = field(x, sigma, row.time_scale * sigma)
        mix = (row.weight * row.dir_scale * d).sum(1, keepdim=True)
        return torch.add(now.x, mix, alpha=float(step.h))
