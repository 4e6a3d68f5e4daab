"""Decreasing noise levels sigmas [num_steps] in float64, for num_steps - 1 steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.process import Level, Process, log

SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
VP_FIRST_TIME = 1e-3
"""The time of sigma_min in the VP process, as the published schedules have it."""


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7) -> Tensor:
    """Equal steps in sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, Eq. 5)."""
    checked(num_steps, sigma_min, sigma_max, rho)
    return powers(num_steps, sigma_max, sigma_min, rho)


def log_snr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Equal steps in log sigma (Lu et al. 2022, arXiv:2206.00927)."""
    checked(num_steps, sigma_min, sigma_max)
    sigmas = even(num_steps, math.log(sigma_max), math.log(sigma_min)).exp()
    return with_ends(sigmas, sigma_max, sigma_min)


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> Tensor:
    """Equal steps in t^(1/rho), t in [1e-3, 1] of the VP process with these end levels."""
    checked(num_steps, sigma_min, sigma_max, rho)
    t = powers(num_steps, 1.0, VP_FIRST_TIME, rho)
    sigmas = torch.as_tensor(VPClock.between(sigma_min, sigma_max).sigma(t))
    return with_ends(sigmas, sigma_max, sigma_min)


def discrete(
    num_steps: int,
    first: float,
    last: float,
    sigma_of: Callable[[Tensor], Tensor],
    rho: float = 1,
) -> Tensor:
    """Equal steps in t^(1/rho) of a network's own timesteps, from t = `last` down to `first`.

    `sigma_of` maps timesteps [n] to levels [n], rising with t. The timesteps are not rounded,
    but both ends are exact, for any rho. Raises ValueError unless 0 <= first < last.
    """
    checked(num_steps, 1.0, 2.0, rho)
    if not 0 <= first < last < math.inf:
        raise ValueError(f"timesteps must rise from first >= 0, not {first} to {last}")
    return sigma_of(powers(num_steps, last, first, rho)).double()


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
    factor = shift if mu is None else math.exp(mu)
    if num_steps < 2 or num_train_timesteps < 2 or not 0 < factor < math.inf:
        given = f"{num_steps}, {num_train_timesteps} and {shift if mu is None else mu}"
        raise ValueError(
            f"flowmatch needs num_steps >= 2, num_train_timesteps >= 2 and shift > 0, not {given}"
        )
    ends = torch.tensor([1.0, 1 / num_train_timesteps], dtype=torch.float32)
    if mu is None:
        ends = shifted(ends, shift)
    return shifted(even(num_steps, *ends.tolist()), factor).float().double()


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


def even(num_steps: int, start: float, end: float) -> Tensor:
    """num_steps evenly spaced values in float64."""
    return torch.linspace(start, end, num_steps, dtype=torch.float64)


def powers(num_steps: int, start: float, end: float, rho: float) -> Tensor:
    """Values whose 1/rho-th powers are evenly spaced, both ends exact."""
    return with_ends(even(num_steps, start ** (1 / rho), end ** (1 / rho)) ** rho, start, end)


def with_ends(values: Tensor, start: float, end: float) -> Tensor:
    """The same values with these ends, which powers and logarithms miss by a rounding."""
    return torch.cat([values.new_tensor([start]), values[1:-1], values.new_tensor([end])])


def checked(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> None:
    """ValueError for fewer than two levels, an empty or infinite range, or rho <= 0."""
    if num_steps < 2:
        raise ValueError(f"num_steps must be 2 or more, both ends counted, not {num_steps}")
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

        Raises ValueError where no such process has rising levels: the ends are too near.
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / VP_FIRST_TIME - high) / (VP_FIRST_TIME - 1)
        beta_min = high - beta_d / 2
        if not (0 < low < high and min(beta_min + beta_d, beta_min + beta_d * VP_FIRST_TIME) > 0):
            ends = f"sigma_min {sigma_min} and sigma_max {sigma_max}"
            raise ValueError(f"no VP process has the ends {ends}: lower sigma_min")
        return cls(beta_d, beta_min)

    def sigma(self, t: Level) -> Level:
        """The level at time t."""
        exponent = self.beta_d * t**2 / 2 + self.beta_min * t
        if isinstance(exponent, Tensor):
            return torch.expm1(exponent).sqrt()
        return math.sqrt(math.expm1(exponent))

    def time(self, sigma: Level) -> Level:
        """The time at which `sigma` is reached."""
        growth = log(1 + sigma**2)
        rate = (self.beta_min**2 + 2 * self.beta_d * growth) ** 0.5
        return 2 * growth / (self.beta_min + rate)

    def speed(self, t: Level) -> Level:
        """d sigma / dt at time t."""
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) * (1 + sigma**2) / (2 * sigma)


@dataclass(frozen=True)
class Timesteps:
    """A network's own discrete clock, for the `discrete` schedule."""

    first: float
    last: float
    sigma_of: Callable[[Tensor], Tensor]  # timesteps [n] -> levels [n], rising


@dataclass(frozen=True)
class NoiseLevels:
    """The levels that a network knows, and how its schedules are spaced."""

    process: Process
    sigma_min: float
    sigma_max: float
    timesteps: Timesteps | None = None
    shift: float = 1.0
    mu: float | None = None  # dynamic shift, by resolution
    own: Callable[[int, float | None], Sequence[float]] | None = None  # (num_steps, mu): a grid

    def grid(
        self,
        name: str,
        num_steps: int,
        *,
        rho: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Tensor:
        """Noise levels [num_steps] in float64, falling, spaced by the schedule of that name.

        Raises ValueError for an unknown name, bad ranges, or a schedule that the network lacks.
        """
        low = self.sigma_min if sigma_min is None else sigma_min
        high = self.sigma_max if sigma_max is None else sigma_max
        match name:
            case "polynomial":
                return polynomial(num_steps, low, high, 7 if rho is None else rho)
            case "logsnr":
                return log_snr(num_steps, low, high)
            case "time_uniform":
                return time_uniform(num_steps, low, high, 1 if rho is None else rho)
            case "discrete" if self.timesteps:
                t = self.timesteps
                rho = 1 if rho is None else rho
                return discrete(num_steps, t.first, t.last, t.sigma_of, rho)
            case "flowmatch" if self.own:
                return custom(self.own(num_steps, self.mu))
            case "flowmatch" if self.process.name == "flow":
                return flowmatch(num_steps, shift=self.shift, mu=self.mu)
            case "discrete" | "flowmatch":
                raise ValueError(f"this network has no {name!r} schedule")
            case _:
                names = ", ".join(SCHEDULES)
                raise ValueError(f"unknown schedule {name!r}: choose from {names}")
