"""Means with 95 % intervals, of one set of images and of pairs.

Efron 1979, Annals of Statistics 7(1), 1-26: percentiles of the means of resamples.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, t
from torch import Tensor

from src.text import number

RESAMPLES = 4000
QUANTILE = 1.959964  # of the normal distribution, for 95 %
AT_ONCE = 4_000_000  # numbers that are drawn at once
FEW = 30  # values below which percentiles are too narrow


@dataclass(frozen=True)
class Estimate:
    """A number, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.2731 [0.2712, 0.2749]`."""
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


def mean_of(values: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of values [N], N >= 1, and where it would lie for other images of the kind.

    Resamples of fewer than 30 values vary too little: their ends are widened as Student's are
    (Student 1908, Biometrika 6(1), 1-25). One value alone has no width. ValueError for another
    shape.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a mean needs values [N], not {list(values.shape)}")
    wide = values.double().cpu().numpy()
    mean = float(wide.mean())
    if len(wide) == 1 or not np.isfinite(wide).all():
        return Estimate(mean, mean, mean)
    ends = bootstrap(
        (wide,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, AT_ONCE // len(wide)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    n, wider = len(wide), 1.0
    if n < FEW:
        wider = float(t.ppf(0.975, n - 1)) / QUANTILE * (n / (n - 1)) ** 0.5
    return Estimate(mean, *(mean + wider * (float(end) - mean) for end in (ends.low, ends.high)))


def win_rate(differences: Tensor) -> Estimate:
    """The share of differences [N] above zero, those of zero counting a half.

    The interval has a width for a share of 0 or 1 too: Wilson 1927, Journal of the American
    Statistical Association 22(158), 209-212.
    """
    share, n = float(((differences.sign().double() + 1) / 2).mean()), len(differences)
    middle = (share + QUANTILE**2 / (2 * n)) / (1 + QUANTILE**2 / n)
    spread = share * (1 - share) / n + QUANTILE**2 / (4 * n**2)
    half = QUANTILE * spread**0.5 / (1 + QUANTILE**2 / n)
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))
