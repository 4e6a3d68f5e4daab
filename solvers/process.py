"""The two noising processes: x at level sigma is alpha(sigma) * x0 + sigma * eps."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Level: TypeAlias = float | Tensor
"""A noise level: a float for the whole batch, or [B or 1, K or 1, 1...] in the state's dtype."""
NEAREST_TO_NOISE = 1e-6
"""Least alpha whose logarithm is taken: at sigma = 1 flow matching has no signal left."""


@dataclass(frozen=True)
class Process:
    """How signal and noise mix: "ve" (alpha = 1) or "flow" (alpha = 1 - sigma).

    Raises ValueError for any other name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in ("ve", "flow"):
            raise ValueError(f"unknown process {self.name!r}: choose ve or flow")

    def alpha(self, sigma: Level) -> Level:
        """The factor of the clean sample at `sigma`."""
        return 1 - sigma if self.name == "flow" else 0 * sigma + 1

    def half_log_snr(self, sigma: Level) -> Level:
        """The clock log(alpha / sigma) of DPM-Solver++ (arXiv:2211.01095) and UniPC."""
        return log(clamp_low(self.alpha(sigma), NEAREST_TO_NOISE)) - log(sigma)

    def free_slope(self, x: Tensor, sigma: Level) -> Tensor:
        """x / sqrt(alpha^2 + sigma^2), without a call.

        The slope where noise drowns the data: at the first level that of VE (AFS, Dockhorn et al.
        2022, arXiv:2210.05475), and x / sigma of flow matching; further on any direction.
        """
        return x / (self.alpha(sigma) ** 2 + sigma**2) ** 0.5


VE, FLOW = Process("ve"), Process("flow")


def log(level: Level) -> Level:
    """The natural logarithm of a float or a tensor."""
    return level.log() if isinstance(level, Tensor) else math.log(level)


def expm1(level: Level) -> Level:
    """The value of exp(level) - 1 for a float or a tensor, exact near 0."""
    return torch.expm1(level) if isinstance(level, Tensor) else math.expm1(level)


def clamp_low(level: Level, low: float) -> Level:
    """The larger of the two, elementwise."""
    return level.clamp(min=low) if isinstance(level, Tensor) else max(level, low)
