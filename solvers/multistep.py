"""Parallel multistep: one network call an interval, its K points placed by the past.

EPD pays two calls an interval, the slope where it stands and then the K points that need it.
Here the slopes of earlier calls place the points, so N calls buy N intervals.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.field import Field
from solvers.integrate import Step
from solvers.process import VE, Process


@dataclass(frozen=True)
class MultistepTable:
    """Learned coefficients of N steps with K points and H known slopes.

    The known slopes are `known_slopes`: the free one, then those of earlier calls, newest
    first. Where fewer than H are known yet, the coefficients beyond them are not used.
    """

    a: Tensor  # [N, H] of the known slopes in the slope that places the points
    r: Tensor  # [N, K] place in [0, 1] from sigma to sigma_next on the log-sigma axis; 0 is x
    weight: Tensor  # [N, K] of the new slopes in the step; any sign
    b: Tensor  # [N, H] of the known slopes in the step
    time_scale: Tensor  # [N, K] the network is told time_scale * sigma

    def to(self, like: Tensor) -> "MultistepTable":
        """The table on the device and in the dtype of `like`."""
        return MultistepTable(*(t.to(like) for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five tensors in the order of the constructor."""
        return self.a, self.r, self.weight, self.b, self.time_scale


@dataclass(frozen=True)
class ParallelMultistep:
    """Steps by a learned table: e = sum_j a_j h_j places K points, whose slopes move x.

    x_next = x + h (sum_k weight_k d_k + sum_j b_j h_j). Needs no slope at x itself, so the
    loop never evaluates it. Put the table where the samples are (`table.to(x)`) first.
    """

    table: MultistepTable
    process: Process = VE

    def __call__(self, field: Field, step: Step) -> Tensor:
        known = known_slopes(step, self.process)
        a, r, weight, b, scale = (t[step.index] for t in self.table.tensors())
        x, sigma = placed(step, combined(a, known), r)
        d = field(x, sigma, scale.reshape(sigma.shape) * sigma)
        mix = (weight.reshape(sigma.shape) * d).sum(1, keepdim=True)
        return step.now.x + step.h * (mix + combined(b, known))


def known_slopes(step: Step, process: Process) -> tuple[Tensor, ...]:
    """What costs no call: the free slope, then those of earlier calls, newest first.

    The free slope is x / sqrt(alpha^2 + sigma^2), [B, 1, *]: at the first level that is the
    analytic slope of VE (AFS, arXiv:2210.05475) and x / sigma of flow matching, and further on
    it is a direction like any other.
    """
    now = step.now
    return (now.x / (process.alpha(now.sigma) ** 2 + now.sigma**2) ** 0.5, *step.slopes)


def combined(coefficients: Tensor, slopes: tuple[Tensor, ...]) -> Tensor:
    """Sum of coefficient [H] or [B, H] * slope over as many as both have, [B, 1, *]."""
    known = torch.cat(slopes[: coefficients.shape[-1]], 1)
    shape = (-1, known.shape[1], *[1] * (known.ndim - 2))
    return (coefficients[..., : known.shape[1]].reshape(shape) * known).sum(1, keepdim=True)


def placed(step: Step, slope: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Points x [B, K, *] and their levels [1, K, 1...] at places r [K] along `slope`."""
    now = step.now
    ratio = torch.as_tensor(step.sigma_next / now.sigma).to(r)
    sigma = (now.sigma * ratio**r).reshape(1, -1, *[1] * (now.x.ndim - 2))
    return now.x + (sigma - now.sigma) * slope, sigma
