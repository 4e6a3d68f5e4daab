"""From seeds to images: what an image depends on, and what it does not."""

from dataclasses import replace

import pytest
import torch

from backends.base import Backend, NoiseLevels
from backends.edm import pixel_backend
from backends.generate import Job, generate
from backends.mixture import Mixture, mixture_backend
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW, VE
from solvers.sampler import (
    SOLVERS,
    Sampler,
    SolverOptions,
    hand_made,
)
from tests.tiny import tiny_edm

CPU = torch.device("cpu")
LEVELS = NoiseLevels(VE, 0.002, 80.0)


def tiny() -> Backend:
    return pixel_backend(tiny_edm(), CPU)


MEANS = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()


def mixture(levels: NoiseLevels = LEVELS) -> Backend:
    return mixture_backend(
        Mixture(MEANS, torch.full((4,), 0.2).double(), torch.full((4,), 0.25).double()), levels
    )


def latents(
    model: Backend, sampler: Sampler, jobs: list[Job], batch: int, chunk: int | None = None
) -> torch.Tensor:
    batches = generate(model, sampler, jobs, batch=batch, points_chunk=chunk)
    return torch.cat([part.latents for part in batches])


JOBS = [Job(seed, seed % 3) for seed in range(7)]


@pytest.mark.parametrize("name", [*SOLVERS, "dpmpp-3", "unipc-2", "deis-4"])
def test_an_image_depends_on_its_own_job_alone(name: str) -> None:
    """Kernels differ a little between batch sizes: 1e-4 of latents in about [-1, 1]."""
    options = SolverOptions(s_churn=10.0 if name == "edm" else 0.0)
    method = hand_made(name, LEVELS, 6, options=options)
    model = tiny()
    together = latents(model, method, JOBS, batch=7)
    apart = latents(model, method, JOBS[::-1], batch=2).flip(0)
    assert torch.allclose(together, apart, atol=1e-4 * together.abs().max().item())


@pytest.mark.parametrize("name", ["cifar10/cifar10-5nfe", "cifar10/cifar10-5nfe-ipndm"])
def test_a_predictor_samples_with_the_calls_that_it_promises(name: str) -> None:
    predictor = load_predictor(find_predictor(name))
    method = predictor.sampler(LEVELS)
    (part,) = generate(mixture(), method, [Job(0), Job(1)], batch=2)
    assert part.tally.calls == method.calls == predictor.nfe == 5
    assert part.tally.rows == 2 * predictor.evaluations == 16


def test_points_in_chunks_give_the_same_numbers() -> None:
    predictor = load_predictor(find_predictor("cifar10-5nfe"))
    method = predictor.sampler(LEVELS)
    model = mixture()
    once = latents(model, method, [Job(0), Job(1)], batch=2)
    chunked = latents(model, method, [Job(0), Job(1)], batch=2, chunk=1)
    assert torch.allclose(once, chunked, atol=1e-12)


def test_denoise_to_zero_ends_on_the_denoiser() -> None:
    method = hand_made("ipndm", LEVELS, 5)
    model = mixture()
    plain = latents(model, method, [Job(3)], batch=1)
    to_zero = replace(method, sigmas=(*method.sigmas, 0.0))
    ended = latents(model, to_zero, [Job(3)], batch=1)
    sigma = torch.full((1,), method.sigmas[-1], dtype=torch.float64)
    assert torch.allclose(ended, model.denoise(plain, sigma, None), atol=1e-12)
    assert to_zero.calls == 5


def test_guidance_pulls_towards_the_class() -> None:
    model = mixture()
    method = hand_made("heun", LEVELS, 20)
    target = MEANS[2]

    def distance(rate: float) -> float:
        jobs = [Job(seed, 2) for seed in range(8)]
        result = latents(model, replace(method, guidance_rate=rate), jobs, batch=8)
        return (result - target).square().mean().item()

    unguided = latents(model, method, [Job(seed) for seed in range(8)], batch=8)
    assert distance(1.0) < (unguided - target).square().mean().item()
    assert distance(0.0) == pytest.approx((unguided - target).square().mean().item())


def test_a_half_network_keeps_a_float_state() -> None:
    network = tiny_edm().cast(torch.bfloat16)
    (part,) = generate(pixel_backend(network, CPU), hand_made("euler", LEVELS, 3), JOBS, batch=7)
    assert part.latents.dtype == torch.float32


def test_a_flow_predictor_is_not_for_a_ve_model() -> None:
    flow, ve = (load_predictor(find_predictor(n)) for n in ("sd3-512-best", "cifar10-5nfe"))
    with pytest.raises(ValueError, match="not for a ve model"):
        flow.sampler(LEVELS)
    with pytest.raises(ValueError, match="not for a flow model"):
        ve.sampler(NoiseLevels(FLOW, 0.001, 1.0))
