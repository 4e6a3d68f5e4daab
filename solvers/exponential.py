"""Multistep solvers with a clock of their own: DPM-Solver++, UniPC and DEIS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from solvers.classic import checked_order, mixed, newest_slopes
from solvers.field import Field
from solvers.integrate import Point, Step
from solvers.process import VE, Level, Process, clamp_low, expm1
from solvers.schedules import VPClock, one_of

QUADRATURE_NODES = 32
SHORTEST_STEP = 1e-20


@dataclass(frozen=True)
class Exponential:
    """One step's numbers in the clock lambda = log(alpha / sigma), for data or noise prediction.

    With model m (x0 or the noise) the exact solution for constant m is
    ratio * x - gain * (exp(hh) - 1) * m (arXiv:2211.01095, Eqs. 9 and 8 of its Sec. 3 and 4).
    """

    step: Step
    process: Process
    predict_x0: bool
    threshold_below: float = 0.0  # x0 is dynamically thresholded at levels below this

    @cached_property
    def h(self) -> Level:
        """The step in lambda; above 0 also for a point of EPD that has not moved."""
        clock, step = self.process.half_log_snr, self.step
        return clamp_low(clock(step.sigma_next) - clock(step.now.sigma), SHORTEST_STEP)

    @property
    def hh(self) -> Level:
        """The exponent: -h for data prediction, h for noise prediction."""
        return -self.h if self.predict_x0 else self.h

    @property
    def gain(self) -> Level:
        """What multiplies the model's part."""
        sigma = self.step.sigma_next
        return self.process.alpha(sigma) if self.predict_x0 else sigma

    def model(self, point: Point) -> Tensor:
        """What is taken as constant over a step: x0 or the noise at `point`."""
        if self.predict_x0:
            below = self.threshold_below  # 0 or infinite but for UniPC: levels may be a sample's
            limited = below == math.inf or (below and point.sigma < below)
            return dynamic_threshold(point.x0) if limited else point.x0
        return point.d if self.process == VE else point.x0 + point.d

    def linear(self) -> Tensor:
        """The first-order step, Euler's (of a thresholded slope, where x0 is thresholded).

        Written without division by alpha, so that flow matching may start at sigma = 1.
        """
        now, sigma_next = self.step.now, self.step.sigma_next
        if not self.predict_x0:
            return now.x + self.step.h * now.d
        ratio = sigma_next / now.sigma
        gained = self.process.alpha(sigma_next) - self.process.alpha(now.sigma) * ratio
        return ratio * now.x + gained * self.model(now)

    def gap(self, point: Point) -> Level:
        """How far `point` lies ahead of now, in units of the step."""
        clock = self.process.half_log_snr
        return (clock(point.sigma) - clock(self.step.now.sigma)) / self.h


def dynamic_threshold(x0: Tensor, quantile: float = 0.995) -> Tensor:
    """Clip each sample to its 99.5 % quantile s and divide by it, where s > 1.

    Saharia et al. 2022 (Imagen, arXiv:2205.11487, Sec. 2.3). For pixels in [-1, 1] only.
    """
    s = torch.quantile(x0.flatten(2).abs(), quantile, dim=-1).clamp(min=1)
    s = s.reshape(*s.shape, *[1] * (x0.ndim - 2))
    return x0.clamp(-s, s) / s


@dataclass(frozen=True)
class DPMpp:
    """DPM-Solver++ multistep (Lu et al. 2022, arXiv:2211.01095), data or noise prediction.

    Order 3 is the published formula, which counts half of its last term: its error falls as that
    of order 2, with a smaller constant. UniPC(3) without corrector has the whole term.
    `thresholding` is for pixels and data prediction; the published comparisons have it on. With
    `count_zero` a last step to 0 is one of those that lower the order, as diffusers counts.
    Raises ValueError for an order other than 1 to 3.
    """

    order: int = 2
    predict_x0: bool = True
    lower_order_final: bool = True
    process: Process = VE
    thresholding: bool = False
    count_zero: bool = False

    def __post_init__(self) -> None:
        checked_order(self, self.order, highest=3)
        assert self.predict_x0 or not self.thresholding, "thresholding clips x0"

    def __call__(self, field: Field, step: Step) -> Tensor:
        order = usable_order(step, self)
        bound = math.inf if self.thresholding else 0.0
        e = Exponential(step, self.process, self.predict_x0, bound)
        if order == 1:
            return e.linear()
        points = [step.now, *step.past[: order - 1]]
        models, gaps = [e.model(p) for p in points], [e.gap(p) for p in points]
        d0 = (models[0] - models[1]) / (gaps[0] - gaps[1])
        phi1 = expm1(e.hh)
        if order == 2:
            return e.linear() - e.gain * phi1 / 2 * d0
        d1 = (models[1] - models[2]) / (gaps[1] - gaps[2])
        bend = (d0 - d1) / (gaps[0] - gaps[2])
        phi2 = phi1 / e.hh - 1
        phi3 = phi2 / e.hh - 1 / 2
        return e.linear() - e.gain * (phi2 * (d0 + (gaps[0] - gaps[1]) * bend) + phi3 * bend)


@dataclass(frozen=True)
class UniPC:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867), data or noise prediction.

    The predictor is the step; pass `correct` to the loop for the corrector. `thresholding` is
    for pixels and data prediction; as published, it spares the estimate at the first level.
    `count_zero` is as in DPMpp.
    Raises ValueError for an order other than 1 to 3, a variant other than bh1 and bh2, or flow
    matching with noise prediction, whose corrector has no limit at sigma = 1.
    """

    order: int = 3
    variant: str = "bh2"  # or bh1
    predict_x0: bool = True
    lower_order_final: bool = True
    process: Process = VE
    thresholding: bool = False
    count_zero: bool = False

    def __post_init__(self) -> None:
        checked_order(self, self.order, highest=3)
        one_of("variant of UniPC", self.variant, ("bh1", "bh2"))
        if self.process != VE and not self.predict_x0:
            raise ValueError("UniPC on flow matching predicts data: it needs predict_x0=True")
        assert self.predict_x0 or not self.thresholding, "thresholding clips x0"

    def __call__(self, field: Field, step: Step) -> Tensor:
        return self.advance(step, arrived=None)

    def correct(self, step: Step, arrived: Point) -> Point:
        """The point where `step` ends, moved by what the network said there.

        What the network predicts (x0, or the noise) stays as it was evaluated.
        """
        x, sigma = self.advance(step, arrived), arrived.sigma
        if self.predict_x0:
            return Point(sigma, x, lambda: (x - arrived.x0) / sigma)
        return Point(sigma, x, lambda: arrived.d)  # the noise of VE

    def advance(self, step: Step, arrived: Point | None) -> Tensor:
        """The step, by the points behind it and, for the corrector, the one it arrived at."""
        order = usable_order(step, self)
        bound = step.sigmas[0] if self.thresholding else 0.0
        e = Exponential(step, self.process, self.predict_x0, bound)
        others = [*step.past[: order - 1], *([arrived] if arrived else [])]
        if not others:
            return e.linear()
        gaps, hh, now = [float(e.gap(p)) for p in others], float(e.hh), e.model(step.now)
        scale = hh if self.variant == "bh1" else math.expm1(hh)
        weights = unipc_weights(gaps, hh, scale)
        slopes = [(e.model(p) - now) / gap for p, gap in zip(others, gaps, strict=True)]
        return e.linear() - e.gain * scale * mixed(weights, slopes)


def usable_order(step: Step, solver: DPMpp | UniPC) -> int:
    """The order that the history allows, and near the end no more than the steps left."""
    order = min(solver.order, len(step.past) + 1)
    left = len(step.sigmas) - 1 - step.index + (solver.count_zero and step.to_zero)
    return min(order, left) if solver.lower_order_final else order


def unipc_weights(gaps: Sequence[float], hh: float, scale: float) -> list[float]:
    """Solve UniPC's order conditions (Eq. 11); for a single other point the weight is 1/2."""
    if len(gaps) == 1:
        return [0.5]
    phi, factorial, powers, target = math.expm1(hh) / hh - 1, 1, [], []
    for k in range(len(gaps)):
        powers.append([gap**k for gap in gaps])
        target.append(phi * factorial / scale)
        factorial *= k + 2
        phi = phi / hh - 1 / factorial
    matrix, right = (torch.tensor(t, dtype=torch.float64) for t in (powers, target))
    return torch.linalg.solve(matrix, right).tolist()


@dataclass(frozen=True)
class DEIS:
    """Adams-Bashforth in a clock of its own (Zhang & Chen 2023, arXiv:2204.13902).

    "tab" takes the slope as a polynomial in the VP process's time, "rhoab" in sigma. The time
    is that of the VP process whose ends are the ends of the grid, or of the usual one for a
    range too narrow for that. As published, "rhoab" of order 4 keeps the weights of its fourth
    step for all later ones; prefer "tab" there. Raises ValueError for an order other than 1 to
    4 or an unknown mode.
    """

    order: int = 3
    mode: str = "tab"  # or rhoab

    def __post_init__(self) -> None:
        checked_order(self, self.order, highest=4)
        one_of("mode of DEIS", self.mode, ("tab", "rhoab"))

    def __call__(self, field: Field, step: Step) -> Tensor:
        slopes = newest_slopes(step, self.order)
        if len(slopes) == 1:
            return step.now.x + step.h * slopes[0]
        if self.mode == "rhoab" and len(slopes) == 4:
            knots, end = list(step.sigmas[3::-1]), step.sigmas[4]
        else:
            knots = [step.now.sigma, *(p.sigma for p in step.past)][: len(slopes)]
            end = step.sigma_next
        return step.now.x + mixed(self.weights(step, knots, end), slopes)

    def weights(self, step: Step, knots: list[float], end: Level) -> list[Level]:
        """The integral over sigma, from knots[0] to `end`, of each knot's polynomial."""
        if self.mode == "rhoab":
            return quadrature(knots, gauss_legendre(2, knots[0], end))
        try:
            clock = VPClock.between(step.sigmas[-1], step.sigmas[0])
        except ValueError:
            clock = VPClock(beta_d=19.9, beta_min=0.1)  # the usual one
        times = [clock.time(knot) for knot in knots]
        nodes = gauss_legendre(QUADRATURE_NODES, times[0], clock.time(end))
        return quadrature(times, [(t, weight * clock.speed(t)) for t, weight in nodes])


def quadrature(knots: Sequence[Level], nodes: Sequence[tuple[Level, Level]]) -> list[Level]:
    """The integral of each knot's Lagrange polynomial, by (place, weight) nodes."""
    weights: list[Level] = []
    for j, own in enumerate(knots):
        others = [*knots[:j], *knots[j + 1 :]]
        values = (math.prod((place - k) / (own - k) for k in others) * w for place, w in nodes)
        weights.append(sum(values))
    return weights


def gauss_legendre(n: int, start: Level, end: Level) -> list[tuple[Level, Level]]:
    """n (place, weight) pairs that integrate from start to end (Golub & Welsch 1969)."""
    half, middle = (end - start) / 2, (end + start) / 2
    return [(middle + half * node, half * weight) for node, weight in legendre_rule(n)]


@cache
def legendre_rule(n: int) -> list[tuple[float, float]]:
    """The n nodes and weights on [-1, 1]."""
    k = torch.arange(1, n, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return list(zip(nodes.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))
