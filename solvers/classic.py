"""Textbook solvers. Each is one step; the loop is in `integrate`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from solvers.field import Field
from solvers.integrate import Point, Step
from solvers.process import Level

# Adams-Bashforth weights for equal steps, newest slope first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def checked_order(solver: object, order: object, highest: int) -> None:
    """ValueError unless `order` is a whole number from 1 to `highest`."""
    if type(order) is not int or not 1 <= order <= highest:
        raise ValueError(f"{type(solver).__name__} has the orders 1 to {highest}, not {order!r}")


@dataclass(frozen=True)
class Euler:
    """First order; the same as DDIM (Song et al. 2021, arXiv:2010.02502)."""

    def __call__(self, field: Field, step: Step) -> Tensor:
        return step.now.x + step.h * step.now.d


@dataclass(frozen=True)
class Heun:
    """Second order, explicit trapezoid (Karras et al. 2022, arXiv:2206.00364, Alg. 1)."""

    def __call__(self, field: Field, step: Step) -> Tensor:
        x = step.now.x + step.h * step.now.d
        return step.now.x + step.h * (step.now.d + field(x, step.sigma_next)) / 2


@dataclass(frozen=True)
class EDM:
    """Heun after a little noise is put back (Karras et al. 2022, Alg. 2, "churn").

    `noise(index, x)` gives standard normal noise like x [B, 1, *] for step `index`; let it
    come from a generator per sample, so that it does not depend on the batch. Raises ValueError
    for a negative or infinite s_churn or s_noise, or an empty range of levels.
    """

    noise: Callable[[int, Tensor], Tensor] = field(repr=False)
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        good = 0 <= self.s_churn < math.inf and 0 <= self.s_noise < math.inf
        if not good or not self.s_min <= self.s_max:
            given = f"{self.s_churn}, {self.s_noise}, {self.s_min} and {self.s_max}"
            raise ValueError(f"EDM needs s_churn, s_noise >= 0 and s_min <= s_max, not {given}")

    def __call__(self, field: Field, step: Step) -> Tensor:
        return Heun()(field, dataclasses.replace(step, now=self.churned(field, step)))

    def churned(self, field: Field, step: Step) -> Point:
        """Where the step begins, a little noise later."""
        now, gamma = step.now, 0.0
        if self.s_min <= now.sigma <= self.s_max:
            steps = len(step.sigmas) - 1 + step.to_zero
            gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        if not gamma:
            return now
        sigma = now.sigma * (1 + gamma)
        spread = self.s_noise * math.sqrt(sigma**2 - now.sigma**2)
        x = now.x + spread * self.noise(step.index, now.x)
        return Point(sigma, x, lambda: field(x, sigma))


@dataclass(frozen=True)
class DPM2:
    """Second order, midpoint at sigma^(1-r) sigma_next^r (Lu et al. 2022, arXiv:2206.00927).

    Raises ValueError unless 0 < r <= 1.
    """

    r: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise ValueError(f"r of DPM2 must be above 0 and at most 1, not {self.r}")

    def __call__(self, field: Field, step: Step) -> Tensor:
        sigma = step.now.sigma ** (1 - self.r) * step.sigma_next**self.r
        d = field(step.now.x + (sigma - step.now.sigma) * step.now.d, sigma)
        b = 1 / (2 * self.r)
        return step.now.x + step.h * (b * d + (1 - b) * step.now.d)


@dataclass(frozen=True)
class IPNDM:
    """Adams-Bashforth as if steps were equal (Zhang & Chen 2023, arXiv:2204.13902, iPNDM).

    Where they are not, orders above 2 converge as order 2, with a smaller constant. Raises
    ValueError for an order other than 1 to 4.
    """

    order: int = 3

    def __post_init__(self) -> None:
        checked_order(self, self.order, highest=4)

    def __call__(self, field: Field, step: Step) -> Tensor:
        slopes = newest_slopes(step, self.order)
        return step.now.x + step.h * mixed(ADAMS_BASHFORTH[len(slopes) - 1], slopes)


@dataclass(frozen=True)
class IPNDMv:
    """Adams-Bashforth for steps as they are (arXiv:2204.13902, iPNDM with variable steps).

    The formulas are the published ones (DEIS and diff-sampler). Order 3 keeps its order where
    neighbouring steps are nearly equal; order 4 converges as order 3, and off grids even in log
    sigma as order 2: prefer DEIS(4). Raises ValueError for an order other than 1 to 4.
    """

    order: int = 3

    def __post_init__(self) -> None:
        checked_order(self, self.order, highest=4)

    def __call__(self, field: Field, step: Step) -> Tensor:
        slopes = newest_slopes(step, self.order)
        behind = [step.now.sigma, *(p.sigma for p in step.past)]
        gaps = [a - b for a, b in pairwise(behind[: len(slopes)])]
        return step.now.x + step.h * mixed(variable_weights(step.h, gaps), slopes)


def variable_weights(h: Level, gaps: Sequence[float]) -> list[Level]:
    """Weights of the newest slopes for a step h after the earlier steps `gaps` (newest first).

    `first`, `second` and `third` weigh the backward differences, scaled to the newest gap.
    """
    if not gaps:
        return [1.0]
    h1 = gaps[0]
    first = h / (2 * h1)
    if len(gaps) == 1:
        return [1 + first, -first]
    h2 = gaps[1]
    ratio = h1 / h2
    near = h / (h + h1)
    second = (1 - near / 3 * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
    weights = [1 + first + second, -first - (1 + ratio) * second, ratio * second]
    if len(gaps) == 2:
        return weights
    h3 = gaps[2]
    far = h1 * (h1 + h2) / (h2 * (h2 + h3))
    third = (1 - near / 3) / 2 + (1 - near / 2) * h / (6 * (h + h1 + h2))
    third = third * h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    return [
        weights[0] + third,
        weights[1] - (1 + ratio + far) * third,
        weights[2] + (ratio + far * (1 + h2 / h3)) * third,
        -far * ratio * third,
    ]


def newest_slopes(step: Step, order: int) -> list[Tensor]:
    """The slope now and up to order - 1 earlier ones."""
    return [step.now.d, *(p.d for p in step.past[: order - 1])]


def mixed(weights: Sequence[Level], slopes: Sequence[Tensor]) -> Any:
    """The sum of weight * slope."""
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
