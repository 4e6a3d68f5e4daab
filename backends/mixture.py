"""A Gaussian mixture, whose denoiser is exact: no network, no error but the solver's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.base import Backend, Prompt, classifier_free, pixels
from solvers.field import Condition
from solvers.process import FLOW, VE, Process
from solvers.schedules import NoiseLevels
from src.files import read_json

CPU = torch.device("cpu")


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


def mixture_backend(
    mixture: Mixture,
    levels: NoiseLevels,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float64,
) -> Backend:
    """A mixture as a backend, under the process of `levels`; a prompt is a component's number."""
    shape, count = tuple(mixture.means.shape[1:]), len(mixture.weight)
    height, width = (1, 1, *shape)[-2:]

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        m = Mixture(*(t.to(x) for t in (mixture.means, mixture.std, mixture.weight)))
        weight = cond.given["weight"].to(x) if cond else m.weight[None]
        if levels.process == VE:
            return m.posterior_mean(x, sigma, weight)
        alpha = (1 - sigma).clamp(min=torch.finfo(x.dtype).eps)
        return m.posterior_mean(x / alpha.reshape(-1, *[1] * (x.ndim - 1)), sigma / alpha, weight)

    def prior(prompt: Prompt) -> Tensor:
        if prompt is None:
            return mixture.weight
        if not isinstance(prompt, int) or not 0 <= prompt < count:
            raise ValueError(f"class {prompt!r} is out of range: the mixture has 0 to {count - 1}")
        return torch.nn.functional.one_hot(torch.tensor(prompt), count).to(mixture.weight)

    def encode(prompts: Sequence[Prompt]) -> Condition | None:
        if all(prompt is None for prompt in prompts):
            return None
        null = mixture.weight.expand(len(prompts), -1)
        return Condition({"weight": torch.stack([prior(p) for p in prompts])}, {"weight": null})

    return Backend(
        family="analytic",
        denoise=denoise,
        encode=encode,
        decode=pixels,
        guide=classifier_free,
        levels=levels,
        shape=shape,
        size=(height, width),
        device=device,
        dtype=dtype,
    )


def load_mixture(folder: Path, device: torch.device = CPU) -> Backend:
    """The backend of a folder's mixture; ValueError for a file that is no mixture."""
    return mixture_backend(*read_mixture(folder, device), device)


def read_mixture(folder: Path, device: torch.device = CPU) -> tuple[Mixture, NoiseLevels]:
    """The mixture and the levels that config.json describes.

    Its entries: process, sigma_min, sigma_max, shape, means [M, prod(shape)], std and weight [M].

    Raises ValueError naming the file and what is wrong in it.
    """
    path = folder / "config.json"
    config = read_json(path)
    if missing := {"process", "shape", "means", "std", "weight"} - set(config):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")

    def numbers(name: str) -> Tensor:
        try:
            values = torch.tensor(config[name], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} must be numbers") from error
        if not values.ndim or not bool(values.isfinite().all()):
            raise ValueError(f"{path}: {name} must be a list of finite numbers")
        return values.to(device)

    means, std, weight, shape = *map(numbers, ("means", "std", "weight")), config["shape"]
    count = len(means)
    if std.shape != (count,) or weight.shape != (count,) or not bool((std > 0).all()):
        raise ValueError(f"{path}: std and weight must each have {count} positive entries")
    if not math.isclose(weight.sum().item(), 1, abs_tol=1e-6) or not bool((weight >= 0).all()):
        raise ValueError(f"{path}: the weights must be >= 0 and sum to 1")
    if means.numel() != count * math.prod(shape):
        raise ValueError(f"{path}: means do not fit the shape {shape}")
    process = Process(config["process"])
    low, high = (0.001, 1.0) if process == FLOW else (0.002, 80.0)
    levels = NoiseLevels(process, config.get("sigma_min", low), config.get("sigma_max", high))
    return Mixture(means.reshape(count, *shape), std, weight), levels
