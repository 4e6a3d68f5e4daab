"""Denoisers known in closed form: the Gaussian mixture of the recorded cases, and one Gaussian."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.epd import Directions
from solvers.exponential import UniPC
from solvers.field import Condition, Denoiser, Field
from solvers.integrate import Solver
from solvers.sampler import Sampler
from solvers.schedules import polynomial

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "solvers.json").read_text()
)
LATENTS = torch.tensor(RECORDED["latents"], dtype=torch.float64).reshape(RECORDED["shape"])
MEANS, STD, WEIGHT = (
    torch.tensor(RECORDED["mixture"][name], dtype=torch.float64)
    for name in ("means", "std", "weight")
)
GAUSS_VARIANCE = 0.25


def ve(x: Tensor, sigma: Tensor, _cond: Condition | None = None) -> Tensor:
    """E[x0 | x0 + sigma eps = x] under the mixture, x [B, 3, 4, 4]."""
    return posterior_mean(x, sigma.reshape(-1, 1), torch.ones_like(sigma).reshape(-1, 1))


def flow(x: Tensor, sigma: Tensor, _cond: Condition | None = None) -> Tensor:
    """E[x0 | (1 - sigma) x0 + sigma eps = x] under the mixture; at sigma = 1 the mean of all."""
    return posterior_mean(x, sigma.reshape(-1, 1), 1 - sigma.reshape(-1, 1))


def posterior_mean(x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """E[x0 | alpha x0 + sigma eps = x], x [B, *] with sigma and alpha [B, 1]."""
    means, std, weight = MEANS.to(x), STD.to(x), WEIGHT.to(x)
    off = x.flatten(1)[:, None] - alpha[..., None] * means
    variance = alpha**2 * std**2 + sigma**2
    distance = off.square().sum(-1) / variance
    logits = weight.log() - (off.shape[-1] * variance.log() + distance) / 2
    inside = means + (alpha * std**2 / variance)[..., None] * off
    return (logits.softmax(1)[..., None] * inside).sum(1).reshape(x.shape)


def gauss(x: Tensor, sigma: Tensor, _cond: Condition | None = None) -> Tensor:
    """The denoiser of normal data with variance 1/4, in any shape [B, *]."""
    gain = GAUSS_VARIANCE / (GAUSS_VARIANCE + sigma**2)
    return gain.reshape(-1, *[1] * (x.ndim - 1)) * x


def log_snr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Equal steps in log sigma."""
    return polynomial(num_steps, sigma_min, sigma_max, math.inf)


def integrate(
    solver: Solver,
    field: Field,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    afs: bool = False,
    correct: bool = False,
    detach: bool = False,
) -> Iterator[Tensor]:
    """The states at sigmas[1], ...; UniPC's are those of its predictor, but for `correct`."""
    own = solver.__call__ if isinstance(solver, UniPC) and not correct else solver
    return Sampler(own, sigmas, afs=afs).states(field, x, detach=detach)  # type: ignore[arg-type]


def run(
    solver: Solver, sigmas: Tensor, denoiser: Denoiser = ve, x: Tensor | None = None, **how: Any
) -> Tensor:
    """The end of the trajectory from x, by default the recorded latents at the first level."""
    start = LATENTS * sigmas[0] if x is None else x
    *_, end = integrate(solver, Field(denoiser), start, sigmas, **how)
    return end


def directions(rows: list[list[float]], **factors: Tensor) -> Directions:
    """A table with places r, equal weights, and no scales but those given."""
    r = torch.tensor(rows, dtype=torch.float64)
    one = torch.ones_like(r)
    given = {"weight": one / r.shape[1], "time_scale": one, "dir_scale": one}
    return Directions(r, **(given | factors))


def learned(num_steps: int = 4, num_points: int = 2, seed: int = 0) -> Directions:
    """A table like a trained one: no two numbers the same."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(4, num_steps, num_points, dtype=torch.float64, generator=generator)
    r, weight, time_scale, dir_scale = draws
    weight = weight / weight.sum(-1, keepdim=True)
    return Directions(r, weight, 0.9 + time_scale / 5, 0.9 + dir_scale / 5)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()
