"""Decreasing noise levels sigmas [num_steps] in float64, for num_steps - 1 steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from solvers.process import FLOW, Level, Process, expm1, log

SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
NO_EXPONENT = ("logsnr", "flowmatch")
"""Those without a rho."""
VP_FIRST_TIME = 1e-3
"""The time of sigma_min in the VP process, as the published schedules have it."""


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7) -> Tensor:
    """Equal steps in sigma^(1/rho) (Karras et al. 2022, arXiv:2206.00364, Eq. 5).

    For an infinite rho in log sigma (Lu et al. 2022, arXiv:2206.00927). Both ends are exact.
    Raises ValueError for fewer than 2 levels, levels that do not fall, or a rho <= 0.
    """
    lowest = 0 if rho < math.inf else 1e-300
    if num_steps < 2 or not lowest <= sigma_min < sigma_max < math.inf or not rho > 0:
        given = f"{num_steps}, {sigma_min} to {sigma_max}, {rho}"
        raise ValueError(f"a grid needs num_steps >= 2, 0 < low < high and rho > 0, not {given}")
    in_logs = math.isinf(rho)
    ends = [math.log(s) if in_logs else s ** (1 / rho) for s in (sigma_max, sigma_min)]
    even = torch.linspace(ends[0], ends[1], num_steps, dtype=torch.float64)
    return with_ends(even.exp() if in_logs else even**rho, sigma_max, sigma_min)


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> Tensor:
    """Equal steps in t^(1/rho), t in [1e-3, 1] of the VP process with these end levels."""
    clock = VPClock.between(sigma_min, sigma_max)
    times = polynomial(num_steps, VP_FIRST_TIME, 1.0, rho)
    return with_ends(torch.as_tensor(clock.sigma(times)), sigma_max, sigma_min)


def flowmatch(num_steps: int, *, shift: float = 1.0, mu: float | None = None) -> Tensor:
    """The levels of diffusers' FlowMatchEulerDiscreteScheduler without the final 0.

    The static `shift` (Esser et al. 2024, arXiv:2403.03206, Eq. 23) maps s to
    shift s / (1 + (shift - 1) s). The scheduler applies it twice: to the ends of the range that
    it spaces evenly, and to the levels themselves, which are float32 as there. With dynamic
    shifting (`mu`, FLUX) the ends stay, and exp(mu) is the shift. ValueError for a shift <= 0.
    """
    factor = shift if mu is None else math.exp(mu)
    if num_steps < 2 or not 0 < factor < math.inf:
        given = f"{num_steps} and {shift if mu is None else mu}"
        raise ValueError(f"flowmatch needs num_steps >= 2 and a shift above 0, not {given}")
    ends = torch.tensor([1.0, 1 / 1000], dtype=torch.float32)  # of 1000 timesteps
    if mu is None:
        ends = shifted(ends, shift)
    first, last = ends.tolist()
    evenly = torch.linspace(first, last, num_steps, dtype=torch.float64)
    return shifted(evenly, factor).float().double()


def shifted(s: Tensor, shift: float) -> Tensor:
    """shift s / (1 + (shift - 1) s)."""
    return shift * s / (1 + (shift - 1) * s)


def with_ends(values: Tensor, start: float, end: float) -> Tensor:
    """Values with these ends, which powers and logarithms miss by a rounding."""
    return torch.cat([values.new_tensor([start]), values[1:-1], values.new_tensor([end])])


def one_of(what: str, value: str, choices: Sequence[str]) -> None:
    """ValueError with the choices and the nearest of them, unless the value is one."""
    if value not in choices:
        near = get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices)}"
        raise ValueError(f"unknown {what} {value[:80]!r}: {hint}")


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
            raise ValueError(
                f"no VP process has the ends {ends}: lower sigma_min, or "
                "take another schedule, as polynomial"
            )
        return cls(beta_d, beta_min)

    def sigma(self, t: Level) -> Level:
        """The level at time t."""
        return expm1(self.beta_d * t**2 / 2 + self.beta_min * t) ** 0.5

    def time(self, sigma: Level) -> Level:
        """The time at which `sigma` is reached."""
        growth = log(1 + sigma**2)
        rate = (self.beta_min**2 + 2 * self.beta_d * growth) ** 0.5
        return 2 * growth / (self.beta_min + rate)

    def speed(self, t: Level) -> Level:
        """The derivative d sigma / dt at time t."""
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
    """The levels that a network is trained on, and how its schedules are spaced."""

    process: Process
    sigma_min: float
    sigma_max: float
    timesteps: Timesteps | None = None
    shift: float = 1.0
    mu: float | None = None  # dynamic shift, by resolution
    own: Callable[[int, float | None], Sequence[float]] | None = None  # (num_steps, mu): a grid

    def grid(self, name: str, num_steps: int, *, rho: float | None = None) -> Tensor:
        """Noise levels [num_steps] in float64, falling, spaced by the schedule of that name.

        `rho` None is the schedule's own exponent. The timesteps of "discrete" are not rounded,
        but both its ends are exact, for any rho. Raises ValueError for an unknown name, bad
        ranges, or a schedule that the network lacks.
        """
        low, high, t = self.sigma_min, self.sigma_max, self.timesteps
        match name:
            case "polynomial":
                return polynomial(num_steps, low, high, 7 if rho is None else rho)
            case "logsnr":
                return polynomial(num_steps, low, high, math.inf)
            case "time_uniform":
                return time_uniform(num_steps, low, high, 1 if rho is None else rho)
            case "discrete" if t:
                times = polynomial(num_steps, t.first, t.last, 1 if rho is None else rho)
                return t.sigma_of(times).double()
            case "flowmatch" if self.own:
                return torch.tensor(self.own(num_steps, self.mu), dtype=torch.float64)
            case "flowmatch" if self.process == FLOW:
                return flowmatch(num_steps, shift=self.shift, mu=self.mu)
        one_of("schedule", name, SCHEDULES)
        raise ValueError(f"this network has no {name!r} schedule")
