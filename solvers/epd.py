"""Ensemble parallel directions (Zhu et al. 2025, arXiv:2507.14797): K learned slopes a step."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.classic import EDM, Euler
from solvers.exponential import DEIS, UniPC
from solvers.field import Field
from solvers.integrate import Solver, Step
from solvers.multistep import combined

NONE_KNOWN = torch.zeros(0)


@dataclass(frozen=True)
class Directions:
    """Where K more slopes are taken in each of N steps, and how they are mixed.

    Every tensor is [N, K], or [B, N, K] for a table of its own per sample. `known` is beyond the
    published solver: [N, H] or [B, N, H], of H slopes that cost no call (`evaluated`), by default
    of none. Where fewer than H are known yet, the coefficients beyond them are not used.
    """

    r: Tensor  # place in [0, 1] from sigma to sigma_next, on the log-sigma axis
    weight: Tensor  # >= 0, sums to 1 over K
    time_scale: Tensor  # the network is told time_scale * sigma
    dir_scale: Tensor  # multiplies the slope
    known: Tensor = NONE_KNOWN  # [N, H], coefficients of any sign

    def to(self, like: Tensor) -> "Directions":
        """The table on the device and in the dtype of `like`."""
        return Directions(*(t.to(like) for t in self.tensors()))

    def row(self, i: int, ndim: int) -> "Directions":
        """Step i, each tensor [B or 1, K or H, 1...] with `ndim` dimensions."""
        one = [1] * (ndim - 2)
        cut = (t[..., i, :].reshape(-1, t.shape[-1], *one) for t in self.tensors())
        return Directions(*cut)

    def tensors(self) -> tuple[Tensor, ...]:
        """r, weight, time_scale, dir_scale and, where H is above 0, known."""
        four = self.r, self.weight, self.time_scale, self.dir_scale
        return (*four, self.known) if self.history else four

    @property
    def history(self) -> int:
        """H."""
        return self.known.shape[-1]


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
        if row.history:
            mix = mix + combined(row.known.flatten(1), evaluated(step))
        return torch.add(now.x, mix, alpha=float(step.h))


def evaluated(step: Step) -> tuple[Tensor, ...]:
    """The slopes [B, 1, *] that EPD has anyway: d_n, then those of earlier calls, newest first.

    d_n is the slope where the step stands; under AFS the first one is analytic, which is no call,
    and so no earlier slope of the next step. The earlier ones are, of the step before, its points
    from the last to the first, those that a base of two calls asked for on the way to them, and
    its own d_n; then those of the step before that. None is there twice, as `step.slopes` was
    closed before d_n was asked for.
    """
    return (step.now.d, *step.slopes)
