"""Means with 95 % intervals by the bootstrap, of one set of images and of pairs.

Efron 1979, Annals of Statistics 7(1), 1-26: percentiles of the means of resamples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 4000
AT_ONCE = 4_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Estimate:
    """A number, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_of(values: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of values [N], N >= 1, and where it would lie for other images of the kind."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a mean needs values [N], not {list(values.shape)}")
    wide = values.double()
    generator = torch.Generator().manual_seed(seed)
    means: list[Tensor] = []
    rows = max(1, AT_ONCE // len(wide))
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(wide))
        means.append(wide[torch.randint(len(wide), shape, generator=generator)].mean(1))
    ends = torch.cat(means).quantile(torch.tensor([0.025, 0.975]).double())
    return Estimate(wide.mean().item(), *ends.tolist())


def win_rate(differences: Tensor) -> Estimate:
    """The share of differences [N] above zero, those of zero counting a half."""
    return mean_of((differences.sign().double() + 1) / 2)
