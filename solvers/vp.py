"""Networks trained on a discrete VP process, as denoisers in sigma.

sigma_t = sqrt((1 - a_t) / a_t), a_t the cumulative product of 1 - beta at timestep t = 0, ...,
T - 1; x / sqrt(1 + sigma^2) is what the network sees (Karras et al. 2022, arXiv:2206.00364,
Appendix C.3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers.process import VE
from solvers.schedules import NoiseLevels, Timesteps

PUBLISHED = {
    "ms_coco": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "lsun_bedroom_ldm": {
        "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"
    },
}  # fmt: skip
"""The betas of the published latent models, by their predictors' data set."""
MOST_TIMESTEPS = 100_000
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEAST_ALPHA = 2.0**-24
"""What schedulers write where a_t is 0, at the end of betas of zero terminal SNR (diffusers)."""


@dataclass(frozen=True)
class Table:
    """The log levels [T] of a network's timesteps; between steps they are linear in t."""

    log_sigmas: Tensor  # rising, float64, on the CPU
    copies: dict[torch.device, Tensor] = field(default_factory=dict, compare=False)

    def on(self, device: torch.device) -> Tensor:
        """The table on a device, copied there once."""
        if device not in self.copies:
            self.copies[device] = self.log_sigmas.to(device)
        return self.copies[device]

    def sigma(self, t: Tensor) -> Tensor:
        """Timesteps [n] in [0, T - 1], whole or not -> levels [n]."""
        table, last = self.on(t.device), len(self.log_sigmas) - 1
        t = t.double().clamp(0, last)
        low = t.floor().long().clamp(max=last - 1)
        return table[low].lerp(table[low + 1], t - low).exp()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Levels [n] -> timesteps [n], the ends for levels beyond them; in float64."""
        table, last = self.on(sigma.device), len(self.log_sigmas) - 1
        log = sigma.double().log().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log, right=True) - 1).clamp(0, last - 1)
        return low + (log - table[low]) / (table[low + 1] - table[low])

    @cached_property
    def levels(self) -> NoiseLevels:
        """The range of the table, and its timesteps for the `discrete` schedule."""
        ends = self.log_sigmas[[0, -1]].exp().tolist()
        last = float(len(self.log_sigmas) - 1)
        return NoiseLevels(VE, *ends, timesteps=Timesteps(0.0, last, self.sigma))


def table_of(config: Mapping[str, Any]) -> Table:
    """The table of a diffusers scheduler's config; ValueError where its betas are unknown."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a scheduler's config is a table of settings, not {config!r:.40}")
    count = config.get("num_train_timesteps", 1000)
    low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind, given = config.get("beta_schedule", "linear"), config.get("trained_betas")
    if type(count) is not int or not 2 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps {count!r} must be from 2 to {MOST_TIMESTEPS}")
    try:
        numbers = torch.as_tensor((low, high) if given is None else given, dtype=torch.float64)
        wrong = (
            numbers.ndim != 1 or len(numbers) < 2 or not ((numbers >= 0) & (numbers <= 1)).all()
        )
    except (TypeError, ValueError, RuntimeError):
        wrong = True
    if wrong:
        raise ValueError("a scheduler's betas must be two or more numbers from 0 to 1")
    if given is None and kind not in BETAS:
        raise ValueError(f"beta_schedule {kind!r} is not served: {', '.join(BETAS)}")
    if given is not None:
        betas = torch.tensor(given, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(low, high, count, dtype=torch.float64)
    elif kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, arXiv:2102.09672
        times = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        left = ((times + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    else:
        betas = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, arXiv:2305.08891, Algorithm 1
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        # some betas have less already before the end
        rising = LEAST_ALPHA * (1 + 1e-6 * torch.arange(len(alphas), dtype=torch.float64).flip(0))
        alphas = torch.maximum(alphas, rising)
    sigmas = (1 / alphas - 1).sqrt()
    if not bool(sigmas.isfinite().all()) or not bool((sigmas.diff() > 0).all()):
        raise ValueError("the scheduler's betas give levels that do not rise to a finite end")
    return Table(sigmas.log())


def prediction_of(config: Mapping[str, Any]) -> str:
    """What the network estimates; ValueError for a kind that is unknown."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type {kind!r} is not served: {', '.join(PREDICTIONS)}")
    return kind


def scaled(x: Tensor, sigma: Tensor) -> Tensor:
    """What the network sees of x [B, *] at sigma [B]."""
    return x / (1 + wide(sigma, x) ** 2).sqrt()


def clean(x: Tensor, sigma: Tensor, output: Tensor, prediction: str) -> Tensor:
    """The network's output for x [B, *] at sigma [B] as x0 [B, *]."""
    s, output = wide(sigma, x), output.to(x.dtype)
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return x / (1 + s**2) - output * s / (1 + s**2).sqrt()
    return x - s * output


def wide(sigma: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1...] like x."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))
