"""sample_epd, as ComfyUI's sampler nodes call it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from backends.k_diffusion import epd_sampler, sample_epd
from solvers.epd import EPD
from solvers.field import Field
from solvers.integrate import integrate
from solvers.predictor import find_predictor, load_predictor

SIGMAS = torch.tensor([14.6, 5.0, 2.0, 0.8, 0.03, 0.0])
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * SIGMAS[0]


def shrink(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def test_it_is_our_loop() -> None:
    predictor = load_predictor(find_predictor("sd15-best"))
    sigmas = torch.linspace(14, 0.1, 11)
    solver = predictor.solver()
    assert isinstance(solver, EPD)
    *_, expected = integrate(solver, Field(lambda x, s, _c: shrink(x, s)), X, sigmas)
    ours = epd_sampler(predictor)(shrink, X, sigmas, None, None, True)
    assert torch.allclose(ours, expected)


def test_it_works_without_a_predictor_down_to_zero() -> None:
    """The exact solution of this field shrinks x by sqrt((1 + s^2) / (1 + t^2))."""
    sigmas = torch.cat([torch.logspace(1, -2, 100), torch.zeros(1)])
    x = sample_epd(shrink, X, sigmas, disable=True)
    assert torch.allclose(x, X / (1 + sigmas[0] ** 2) ** 0.5, rtol=2e-3)


def test_points_are_tiled_rows_and_so_are_tensors_among_the_arguments() -> None:
    asked = []

    def model(x: Tensor, sigma: Tensor, *, cond: Tensor, scale: float) -> Tensor:
        asked.append((sigma.tolist(), cond.tolist(), scale))
        return shrink(x, sigma)

    sample_epd(model, X, SIGMAS, {"cond": torch.tensor([1.0, 2.0]), "scale": 7.0}, disable=True)
    sigma, cond, scale = asked[1]
    assert cond == [1.0, 2.0, 1.0, 2.0]
    assert sigma[0] == sigma[1] > sigma[2] == sigma[3]
    assert scale == 7.0


def test_the_callback_hears_of_every_step() -> None:
    heard: list[dict[str, Any]] = []
    last = sample_epd(shrink, X, SIGMAS, callback=heard.append, disable=True)
    assert [h["i"] for h in heard] == [0, 1, 2, 3, 4]
    assert [h["sigma"] for h in heard] == pytest.approx(SIGMAS[:-1].tolist())
    assert torch.allclose(heard[0]["x"], X)
    assert torch.allclose(heard[0]["denoised"], shrink(X, SIGMAS[:1].expand(2)), atol=1e-4)
    assert torch.equal(heard[-1]["denoised"], last)


def test_another_number_of_steps_is_refused() -> None:
    predictor = load_predictor(find_predictor("sd15-best"))
    with pytest.raises(ValueError, match="a table of 10 steps cannot take 4 steps"):
        epd_sampler(predictor)(shrink, X, SIGMAS, None, None, True)


def test_a_predictor_with_afs_is_refused() -> None:
    predictor = load_predictor(find_predictor("lsun-bedroom-5nfe"))
    with pytest.raises(ValueError, match="has afs on"):
        epd_sampler(predictor)(shrink, X, SIGMAS, None, None, True)
