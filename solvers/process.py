"""The two noising processes: x at level sigma is alpha(sigma) * x0 + sigma * eps."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Level: TypeAlias = float | Tensor
"""A noise level: a float for the whole batch, or [B or 1, K or 1, 1...] in the state's dtype."""

NEAREST_TO_NOISE = 1e-6
"""Least alpha whose logarithm is taken: at sigma = 1 flow matching has no signal left."""


@dataclass(frozen=True)
class Process:
    """How signal and noise mix: "ve" (alpha = 1) or "flow" (alpha = 1 - sigma)."""

    name: Literal["ve", "flow"]

    def alpha(self, sigma: Level) -> Level:
        """The factor of the clean sample at `sigma`."""
        return 1 - sigma if self.name == "flow" else 0 * sigma + 1

    def half_log_snr(self, sigma: Level) -> Level:
        """log(alpha / sigma), the clock of DPM-Solver++ (arXiv:2211.01095) and UniPC."""
        return log(clamp_low(self.alpha(sigma), NEAREST_TO_NOISE)) - log(sigma)

    def first_slope(self, x: Tensor, sigma: float) -> Tensor:
        """The slope where noise drowns the data: AFS (Dockhorn et al. 2022, arXiv:2210.05475).

        Raises ValueError for flow matching, whose slope at sigma = 1 depends on the data.
        """
        if self.name == "flow":
            raise ValueError("afs needs a VE process; flow matching has no analytic first step")
        return x / math.sqrt(1 + sigma**2)


VE = Process("ve")
FLOW = Process("flow")


def process_named(name: str) -> Process:
    """The process of that name, "ve" or "flow"; ValueError for any other."""
    processes = {"ve": VE, "flow": FLOW}
    if name not in processes:
        raise ValueError(f"unknown process {name!r}: choose ve or flow")
    return processes[name]


def log(level: Level) -> Level:
    """Natural logarithm of a float or a tensor."""
    return level.log() if isinstance(level, Tensor) else math.log(level)


def expm1(level: Level) -> Level:
    """exp(level) - 1 of a float or a tensor, exact near 0."""
    return torch.expm1(level) if isinstance(level, Tensor) else math.expm1(level)


def clamp_low(level: Level, low: float) -> Level:
    """The larger of the two, elementwise."""
    return level.clamp(min=low) if isinstance(level, Tensor) else max(level, low)
