"""distill() for someone else's network: any shape, both processes, conditions, and refusals."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, IPNDM, Euler
from solvers.exponential import DPMpp
from solvers.field import Condition, Denoiser, Field
from solvers.predictor import Predictor
from solvers.process import FLOW
from solvers.schedules import NoiseLevels
from tests.pretend_gpu import pretend_gpu
from tests.solvers.gauss import integrate
from training.api import Settings, distill, sample

SMALL = Settings(samples=48, judges=24, positions=9, rounds=2, fine_steps=25)


def clusters(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    """The posterior mean of two points a = +1 and -1 with a little width, in every number."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    variance = 0.3**2 + sigma**2
    side = torch.tanh(x / variance)
    return (side * sigma**2 + x * 0.3**2) / variance


def velocity(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
    """The same data under flow matching."""
    alpha = (1 - sigma).clamp(min=1e-6)
    return clusters(x / alpha.reshape(-1, *[1] * (x.ndim - 1)), sigma / alpha, cond)


@pytest.fixture(scope="module")
def few() -> Predictor:
    """A table of 3 calls."""
    return distill(clusters, "ve", shape=(3,), settings=replace(SMALL, nfe=3, rounds=0))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(77))


@pytest.mark.parametrize(
    ("solver", "shape"),
    [("epd-multistep", (2, 9)), ("epd", (1, 4, 4)), ("epd-ipndm", (2, 3, 2, 2))],
)
def test_it_beats_hand_made_solvers_at_equal_calls(solver: str, shape: tuple[int, ...]) -> None:
    settings = replace(SMALL, nfe=5, solver=solver)
    predictor = distill(clusters, "ve", shape=shape, settings=settings)
    assert predictor.nfe == 5
    field, start = Field(clusters), noise(48, *shape) * 80
    levels = predictor.recipe.sigmas
    assert levels is not None
    log = torch.tensor([levels[0], levels[-1]], dtype=torch.float64).log()
    grid = torch.linspace(log[0], log[1], 301, dtype=torch.float64).exp()
    *_, fine = integrate(DPM2(), field, start, grid)
    sevens = torch.linspace(levels[0] ** (1 / 7), levels[-1] ** (1 / 7), 6) ** 7
    errors = []
    for rival in (Euler(), IPNDM(3), DPMpp(2)):
        *_, end = integrate(rival, field, start, sevens)
        errors.append((end - fine).square().mean().sqrt().item())
    ours = sample(predictor, clusters, noise(48, *shape))
    assert (ours - fine).square().mean().sqrt().item() < 0.6 * min(errors)


def test_flow_matching_is_a_process_like_the_other() -> None:
    predictor = distill(velocity, FLOW, shape=(6,), settings=replace(SMALL, nfe=4))
    assert predictor.recipe.process == "flow"
    ends = [sample(predictor, velocity, noise(32, 6))]
    for solver, count in ((Euler(), 5), (DPM2(), 401)):
        grid = torch.linspace(1, 0.001, count, dtype=torch.float64)
        ends += list(integrate(solver, Field(velocity), noise(32, 6), grid))[-1:]
    ours, euler, fine = ends
    assert (ours - fine).square().sum() < (euler - fine).square().sum() / 4


def test_a_flow_has_the_ends_of_the_levels_that_are_given() -> None:
    levels, quick = NoiseLevels(FLOW, 0.02, 0.9), replace(SMALL, nfe=3, rounds=0, learn_grid=False)
    for settings, ends in ((quick, (0.9, 0.02)), (replace(quick, sigma_max=0.8), (0.8, 0.02))):
        recipe = distill(velocity, levels, shape=(3,), settings=settings).recipe
        assert recipe.sigmas is not None
        assert recipe.sigmas[:: len(recipe.sigmas) - 1] == ends


def test_features_may_answer_on_the_cpu_and_a_gradient_reports_its_error() -> None:
    settings = replace(SMALL, nfe=3, distance="distribution", rounds=1, samples=16, judges=8)
    with pretend_gpu():
        on_gpu = replace(settings, device="cuda")
        distill(clusters, "ve", shape=(3,), settings=on_gpu, features=lambda x: (x * 2).cpu())
    settings, heard = Settings(nfe=3, method="gradient", samples=32, batch=16, judges=8), []
    distill(clusters, "ve", shape=(3,), settings=settings, report=lambda *told: heard.append(told))
    assert [what for what, _ in heard] == ["gradient"]
    assert 0 < heard[0][1] < 1


def test_conditions_and_guidance_reach_the_network() -> None:
    seen: set[float] = set()

    def conditional(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        assert cond is not None
        seen.update(cond.given["shift"].tolist())
        shift = cond.given["shift"].reshape(-1, *[1] * (x.ndim - 1))
        return clusters(x - shift, sigma, None) + shift

    def conditions(numbers: Sequence[int]) -> Condition:
        shift = torch.tensor([float(n % 2) for n in numbers])
        return Condition({"shift": shift}, {"shift": torch.full_like(shift, 0.5)})

    settings = replace(SMALL, nfe=3, guidance_rate=1.5)
    predictor = distill(conditional, "ve", shape=(4,), settings=settings, conditions=conditions)
    assert seen == {0.0, 0.5, 1.0}
    assert predictor.recipe.guidance_rate == 1.5


@pytest.mark.parametrize(
    ("answer", "shape", "says"),
    [
        (lambda x, *_: x[:1], (3,), r"\(1, 3\) for 2 samples, not \(2, 3\)"),
        (lambda *_: None, (3,), "NoneType"),
        (lambda x, *_: x * torch.nan, (3,), "not finite"),
        (lambda x, *_: x / 2, (), "of no latent"),
        (lambda x, *_: x / 2, (0,), "of no latent"),
        (lambda x, *_: x / 2, (3, -1), "of no latent"),
    ],
)
def test_a_network_or_a_shape_that_cannot_be_is_one_line(
    answer: Denoiser, shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        distill(answer, "ve", shape=shape, settings=SMALL)


@pytest.mark.parametrize(
    ("answer", "start", "says"),
    [
        (lambda x, *_: x[:1], noise(2, 3), r"gives \(1, 3\) for 4 samples, not \(4, 3\)"),
        (lambda x, *_: x[:, :1], noise(2, 3), r"gives \(4, 1\) for 4 samples"),
        (lambda x, *_: (x,), noise(2, 3), "gives tuple for 4 samples"),
        (lambda x, *_: x.long(), noise(2, 3), "int64, which is not of floats"),
        (lambda x, *_: x @ torch.eye(3).double(), noise(2, 3), "fails on float32 .*RuntimeError"),
        (clusters, noise(2, 3).long(), "noise is no tensor of floats"),
        (clusters, [0.5, 1.0], "noise is no tensor of floats .* but list"),
    ],
)
def test_a_sample_of_a_network_or_noise_that_cannot_be_is_one_line(
    few: Predictor, answer: Any, start: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        sample(few, answer, start)
    rates = torch.full((few.recipe.num_steps - 1,), 4.0).double()
    guided = replace(few, table=replace(few.table, guidance=rates))
    with pytest.raises(ValueError, match=r"guidance_rate 4.0 needs prompts or classes"):
        sample(guided, clusters, noise(2, 3))
    wide = sample(few, lambda x, s, c: clusters(x.double(), s.double(), c), noise(2, 3))
    assert torch.allclose(wide.float(), sample(few, clusters, noise(2, 3)), atol=1e-3)
