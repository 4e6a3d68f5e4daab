"""The Gaussian mixture as a backend: its denoiser against densities, its files."""

import json
from pathlib import Path

import pytest
import torch

from backends.base import Backend, NoiseLevels
from backends.load import load_backend
from backends.mixture import Mixture, load_mixture, mixture_backend
from solvers.process import FLOW, VE, Process

MIXTURE = Mixture(
    means=torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]], dtype=torch.float64),
    std=torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64),
    weight=torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
)


def backend(process: Process) -> Backend:
    return mixture_backend(MIXTURE, NoiseLevels(process, 0.01, 1.0 if process == FLOW else 80.0))


def log_density(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Of x0 + sigma eps, written out."""
    variance = MIXTURE.std**2 + sigma[:, None] ** 2
    square = ((x[:, None] - MIXTURE.means) ** 2).sum(-1)
    each = MIXTURE.weight.log() - square / (2 * variance) - (2 * torch.pi * variance).log()
    return each.logsumexp(1)


@pytest.mark.parametrize("level", [0.05, 0.7, 5.0, 80.0])
def test_the_denoiser_is_tweedies_formula(level: float) -> None:
    """E[x0 | x] = x + sigma^2 grad log p(x) (Robbins 1956; Efron 2011)."""
    sigma = torch.full((7,), level, dtype=torch.float64)
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * level
    x.requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, sigma).sum(), x)
    tweedie = x + sigma[:, None] ** 2 * score
    assert torch.allclose(backend(VE).denoise(x, sigma, None), tweedie, atol=1e-9)


def test_flow_is_ve_at_the_same_signal_to_noise() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = torch.tensor([0.1, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    ve = backend(VE).denoise(x / (1 - s[:, None]), s / (1 - s), None)
    assert torch.allclose(backend(FLOW).denoise(x, s, None), ve)


def test_a_prompt_is_a_component() -> None:
    model = backend(VE)
    cond = model.encode([1, 2])
    x = torch.zeros(2, 2, dtype=torch.float64)
    x0 = model.denoise(x, torch.full((2,), 1e4).double(), cond)
    assert torch.allclose(x0, MIXTURE.means[1:], atol=1e-3)
    assert model.encode([None, None]) is None


def config(**changes: object) -> dict[str, object]:
    good: dict[str, object] = {
        "backend": "analytic",
        "process": "ve",
        "shape": [1, 1, 2],
        "means": MIXTURE.means.tolist(),
        "std": MIXTURE.std.tolist(),
        "weight": MIXTURE.weight.tolist(),
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def test_a_folder_is_loaded_by_the_one_loader(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    model = load_backend(str(tmp_path))
    assert model.shape == (1, 1, 2)
    assert (model.levels.sigma_min, model.levels.sigma_max) == (0.002, 80.0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"means": None}, "means"),
        ({"process": "vp"}, "vp"),
        ({"weight": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"std": [0.1]}, "3 positive"),
        ({"std": [0.1, 0.0, 0.1]}, "3 positive"),
        ({"shape": [4]}, "shape"),
        ({"means": "many"}, "means"),
    ],
)
def test_a_bad_configuration_is_named(
    tmp_path: Path, changes: dict[str, object], error: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(**changes)))
    with pytest.raises(ValueError, match=error) as caught:
        load_mixture(tmp_path)
    assert "\n" not in str(caught.value)
