"""Preconditioning: what surrounds a raw network to make it a denoiser.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364, table 1. With F the raw network,

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)

Shapes: B batch. Arguments carry the published names, in the published order.
"""

from dataclasses import dataclass
from math import exp, inf, sqrt
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """The four factors of table 1 at B noise levels, each [B]."""

    skip: Tensor | float
    out: Tensor
    into: Tensor | float
    noise: Tensor


def rows(factor: Tensor | float) -> Tensor | float:
    """A factor [B] made to multiply images [B, C, H, W]."""
    return factor[:, None, None, None] if isinstance(factor, Tensor) else factor


class Precond(Protocol):
    """A column of table 1: its factors, and the noise levels it was made for."""

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and highest sigma."""
        ...

    def __call__(self, sigma: Tensor) -> Scaling:
        """The factors at sigma [B]."""
        ...


@dataclass(frozen=True)
class EDMPrecond:
    """Unit variance in and out of the network (table 1, "Ours")."""

    sigma_min: float = 0.0
    sigma_max: float = inf
    sigma_data: float = 0.5

    @property
    def levels(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def __call__(self, sigma: Tensor) -> Scaling:
        total = sigma.square() + self.sigma_data**2
        root = total.rsqrt()
        return Scaling(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data * root,
            into=root,
            noise=sigma.log() / 4,
        )


@dataclass(frozen=True)
class VPPrecond:
    """The variance-preserving SDE with linear beta (table 1, "VP")."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    @property
    def levels(self) -> tuple[float, float]:

        def sigma(t: float) -> float:
            return sqrt(exp(self.beta_d * t**2 / 2 + self.beta_min * t) - 1)

        return sigma(self.epsilon_t), sigma(1.0)

    def __call__(self, sigma: Tensor) -> Scaling:
        variance = sigma.square()
        bend = (self.beta_min**2 + 2 * self.beta_d * variance.log1p()).sqrt()
        return Scaling(
            skip=1.0,
            out=-sigma,
            into=(variance + 1).rsqrt(),
            noise=(self.M - 1) * (bend - self.beta_min) / self.beta_d,
        )


@dataclass(frozen=True)
class VEPrecond:
    """The variance-exploding SDE (table 1, "VE")."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def levels(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def __call__(self, sigma: Tensor) -> Scaling:
        return Scaling(skip=1.0, out=sigma, into=1.0, noise=(sigma / 2).log())


PRECONDS: dict[str, Any] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
}
SHORT = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}
