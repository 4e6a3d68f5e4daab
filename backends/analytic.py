"""A Gaussian mixture, whose denoiser is known exactly: no network, no error but the solver's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.base import NoiseLevels, Prompt, classifier_free, pixels
from solvers.field import Condition, Denoiser
from solvers.process import FLOW, VE, process_named
from src.files import read_json

CPU = torch.device("cpu")
ENTRIES = ("means", "std", "weight")


@dataclass(frozen=True)
class Mixture:
    """M isotropic Gaussians: means [M, *], std [M], weight [M] summing to 1."""

    means: Tensor
    std: Tensor
    weight: Tensor

    def posterior_mean(self, x: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
        """E[x0 | x0 + sigma eps = x] for x [B, *], sigma [B], prior weights [B or 1, M]."""
        flat, means = x.flatten(1), self.means.flatten(1)
        variance = self.std**2 + sigma[:, None] ** 2
        distance = torch.cdist(flat, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        log_density = -distance / (2 * variance) - flat.shape[1] / 2 * variance.log()
        share = (weight.log() + log_density).softmax(1)
        pull = share * self.std**2 / variance
        mean = pull.sum(1, keepdim=True) * flat + (share * sigma[:, None] ** 2 / variance) @ means
        return mean.reshape(x.shape)


@dataclass(frozen=True)
class AnalyticBackend:
    """The mixture under the VE or the flow process; a prompt is the number of a component."""

    mixture: Mixture
    levels: NoiseLevels
    device: torch.device = CPU
    dtype: torch.dtype = torch.float64

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.mixture.means.shape[1:])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, the last two of the shape."""
        height, width = (1, 1, *self.latent_shape)[-2:]
        return height, width

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> the exact posterior mean [B, *]."""
        m = Mixture(
            *(t.to(x) for t in (self.mixture.means, self.mixture.std, self.mixture.weight))
        )
        weight = cond.given["weight"].to(x) if cond else m.weight[None]
        if self.levels.process == VE:
            return m.posterior_mean(x, sigma, weight)
        alpha = (1 - sigma).clamp(min=torch.finfo(x.dtype).eps)
        return m.posterior_mean(x / alpha.reshape(-1, *[1] * (x.ndim - 1)), sigma / alpha, weight)

    def guided(self, rate: float, cond: Condition | None) -> Denoiser:
        """Guidance away from the whole mixture."""
        return classifier_free(self, rate, cond)

    def usual_prompt(self, seed: int) -> Prompt:
        """The whole mixture, for every seed."""
        return None

    def encode(self, prompts: Sequence[Prompt]) -> Condition | None:
        """Component numbers -> their prior weights, "nothing" being the whole mixture."""
        if all(prompt is None for prompt in prompts):
            return None
        prior = self.mixture.weight
        given = torch.stack([prior if p is None else self.one(p) for p in prompts])
        return Condition({"weight": given}, {"weight": prior.expand(len(prompts), -1)})

    def one(self, prompt: Prompt) -> Tensor:
        """All the weight on one component."""
        count = len(self.mixture.weight)
        if not isinstance(prompt, int) or not 0 <= prompt < count:
            raise ValueError(f"class {prompt!r} is out of range: the mixture has 0 to {count - 1}")
        return torch.nn.functional.one_hot(torch.tensor(prompt), count).to(self.mixture.weight)

    def decode(self, latents: Tensor) -> Tensor:
        """Samples [B, C, H, W] in about [-1, 1] -> images in [0, 1]."""
        return pixels(latents)


def load_analytic(folder: Path, device: torch.device = CPU) -> AnalyticBackend:
    """Read config.json: process, sigma_min, sigma_max, shape, means [M, prod(shape)], std, weight.

    Raises ValueError naming the file and what is wrong in it.
    """
    path = folder / "config.json"
    config = read_json(path)
    missing = {"process", "shape", "means", "std", "weight"} - set(config)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    means, std, weight = (numbers(config[key], f"{path}: {key}") for key in ENTRIES)
    count = len(means)
    if std.shape != (count,) or weight.shape != (count,) or not bool((std > 0).all()):
        raise ValueError(f"{path}: std and weight must each have {count} positive entries")
    if not math.isclose(weight.sum().item(), 1, abs_tol=1e-6) or not bool((weight >= 0).all()):
        raise ValueError(f"{path}: the weights must be >= 0 and sum to 1")
    shape = config["shape"]
    if means.numel() != count * math.prod(shape):
        raise ValueError(f"{path}: means do not fit the shape {shape}")
    process = process_named(config["process"])
    low, high = (0.001, 1.0) if process == FLOW else (0.002, 80.0)
    levels = NoiseLevels(process, config.get("sigma_min", low), config.get("sigma_max", high))
    mixture = Mixture(*(t.to(device) for t in (means.reshape(count, *shape), std, weight)))
    return AnalyticBackend(mixture, levels, device)


def numbers(values: object, name: str) -> Tensor:
    """A list of numbers, nested or not, in float64; ValueError, naming it, for anything else."""
    try:
        found = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers") from error
    if not found.ndim or not bool(found.isfinite().all()):
        raise ValueError(f"{name} must be a list of finite numbers")
    return found
