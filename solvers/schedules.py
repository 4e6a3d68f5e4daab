"""Decreasing noise levels sigmas [num_steps] in float64, for num_steps - 1 steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.process import Level, log

VP_FIRST_TIME = 1e-3
"""The time of sigma_min in the VP process, as the published schedules have it."""


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7) -> Tensor:
    """Equal steps in sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, Eq. 5)."""
    checked(num_steps, sigma_min, sigma_max, rho)
    return stretched(num_steps, sigma_max ** (1 / rho), sigma_min ** (1 / rho)) ** rho


def log_snr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Equal steps in log sigma (Lu et al. 2022, arXiv:2206.00927)."""
    checked(num_steps, sigma_min, sigma_max)
    return stretched(num_steps, math.log(sigma_max), math.log(sigma_min)).exp()


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> Tensor:
    """Equal steps in t^(1/rho), t in [1e-3, 1] of the VP process with these end levels."""
    checked(num_steps, sigma_min, sigma_max, rho)
    t = stretched(num_steps, 1.0, VP_FIRST_TIME ** (1 / rho)) ** rho
    sigmas = VPClock.between(sigma_min, sigma_max).sigma(t)
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def discrete(
    num_steps: int,
    first: float,
    last: float,
    sigma_of: Callable[[Tensor], Tensor],
    rho: float = 1,
) -> Tensor:
    """Equal steps in t^(1/rho) of a network's own timesteps, from t = `last` down to `first`.

    `sigma_of` maps timesteps [n] to levels [n], rising with t. Raises ValueError unless
    0 <= first < last.
    """
    checked(num_steps, 1.0, 2.0, rho)
    if not 0 <= first < last:
        raise ValueError(f"timesteps must rise from first >= 0, not {first} to {last}")
    return sigma_of(stretched(num_steps, last ** (1 / rho), first ** (1 / rho)) ** rho)


def flowmatch(
    num_steps: int,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """The levels of diffusers' FlowMatchEulerDiscreteScheduler without the final 0.

    The static `shift` (Esser et al. 2024, arXiv:2403.03206, Eq. 23) maps s to
    shift s / (1 + (shift - 1) s). The scheduler applies it twice: to the ends of the range that
    it spaces evenly, and to the levels themselves. With dynamic shifting (`mu`, by resolution,
    FLUX) the ends stay as they are, and exp(mu) is the shift of the levels. Like the
    scheduler's, the levels are rounded to float32. Raises ValueError for a shift <= 0.
    """
    if num_steps < 2 or not 0 < shift < math.inf:
        raise ValueError(f"flowmatch needs num_steps >= 2 and shift > 0, not {num_steps}, {shift}")
    ends = torch.tensor([1.0, 1 / num_train_timesteps], dtype=torch.float32)
    if mu is None:
        ends = shifted(ends, shift)
    even = stretched(num_steps, *ends.tolist())
    return shifted(even, shift if mu is None else math.exp(mu)).float().double()


def custom(sigmas: Sequence[float]) -> Tensor:
    """An explicit list of levels; ValueError unless two or more, finite, positive and falling."""
    grid = torch.tensor(sigmas, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or not bool(grid.isfinite().all()):
        raise ValueError(f"sigmas must be two or more finite levels, not {list(sigmas)}")
    if grid[-1] <= 0 or bool((grid.diff() >= 0).any()):
        raise ValueError(f"sigmas must fall and stay above 0, not {list(sigmas)}")
    return grid


def shifted(s: Tensor, shift: float) -> Tensor:
    """shift s / (1 + (shift - 1) s)."""
    return shift * s / (1 + (shift - 1) * s)


def stretched(num_steps: int, start: float, end: float) -> Tensor:
    """num_steps evenly spaced values, both ends exact, in float64."""
    return torch.linspace(start, end, num_steps, dtype=torch.float64)


def checked(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> None:
    """ValueError for fewer than two levels, an empty or infinite range, or rho <= 0."""
    if num_steps < 2:
        raise ValueError(f"num_steps must be 2 or more (levels, both ends counted), not {num_steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    if not 0 < rho < math.inf:
        raise ValueError(f"schedule_rho must be above 0, not {rho}")


@dataclass(frozen=True)
class VPClock:
    """Time of the linear VP process, sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    beta_d: float
    beta_min: float

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float) -> "VPClock":
        """The process with sigma(1e-3) = sigma_min and sigma(1) = sigma_max.

        Raises ValueError where no such process exists: sigma_min is too near to sigma_max.
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / VP_FIRST_TIME - high) / (VP_FIRST_TIME - 1)
        if not (0 < low < high and 0 < beta_d and beta_d * (0.5 - VP_FIRST_TIME) < high):
            ends = f"sigma_min {sigma_min} and sigma_max {sigma_max}"
            raise ValueError(f"no VP process has the ends {ends}: lower sigma_min")
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Level) -> Level:
        """The level at time t."""
        exponent = self.beta_d * t**2 / 2 + self.beta_min * t
        if isinstance(exponent, Tensor):
            return torch.expm1(exponent).sqrt()
        return math.sqrt(math.expm1(exponent))

    def time(self, sigma: Level) -> Level:
        """The time at which `sigma` is reached."""
        growth = log(1 + sigma**2)
        return ((self.beta_min**2 + 2 * self.beta_d * growth) ** 0.5 - self.beta_min) / self.beta_d

    def speed(self, t: Level) -> Level:
        """d sigma / dt at time t."""
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) * (1 + sigma**2) / (2 * sigma)
