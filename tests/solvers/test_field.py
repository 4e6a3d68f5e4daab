"""The slope: its formula, its rows, its conditions, its count; and guidance by a scale."""

import pytest
import torch
from torch import Tensor

from solvers.field import Condition, Field, Guided, Tally
from tests.solvers.gauss import LATENTS, flow, gauss, ve


class Recorder:
    """A denoiser that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Condition | None]] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        self.asked.append((x, sigma, cond))
        return 0 * x


def points(k: int, like: Tensor = LATENTS) -> tuple[Tensor, Tensor]:
    """x [B, K, *] and levels [B, K, 1...], all different."""
    b, ndim = len(like), like.ndim
    x = torch.stack([like * (i + 1) / 2 for i in range(k)], 1)
    sigma = torch.linspace(0.3, 4, b * k, dtype=like.dtype).reshape(b, k, *[1] * (ndim - 1))
    return x, sigma


def test_the_slope_by_its_formula_of_flow_matching_the_velocity() -> None:
    d = Field(ve)(LATENTS[:, None], 2.0)[:, 0]
    assert torch.allclose(d, (LATENTS - ve(LATENTS, torch.tensor([2.0, 2.0]))) / 2, atol=1e-15)

    def denoiser(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
        return x - sigma.reshape(-1, 1, 1, 1) * torch.cos(x)

    d = Field(denoiser)(LATENTS[:, None], 0.7)[:, 0]
    assert torch.allclose(d, torch.cos(LATENTS), atol=1e-14)


def test_points_in_one_call_in_chunks_and_one_by_one_are_the_same() -> None:
    x, sigma = points(5)
    for denoiser in (ve, flow, gauss):
        at_once = Field(denoiser)(x, sigma)
        single = (Field(denoiser)(x[:, k : k + 1], sigma[:, k : k + 1]) for k in range(5))
        assert torch.allclose(at_once, torch.cat(list(single), 1), atol=1e-13)
        for chunk in (1, 2, 3, 5, 9):
            chunked = Field(denoiser, points_chunk=chunk)
            assert torch.allclose(chunked(x, sigma), at_once, atol=1e-13)
            assert chunked.tally == Tally(calls=1, rows=10)


def test_rows_are_tiled_with_their_levels_and_conditions() -> None:
    """All samples stand at the first point before any stands at the second."""
    recorder, (x, sigma) = Recorder(), points(3)
    cond = Condition({"text": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, {"text": torch.zeros(2, 2)})
    field = Field(recorder, cond)
    d = field(x, sigma, 1.1 * sigma)  # the network may be told another level
    rows, levels, seen = recorder.asked[0]
    assert torch.equal(rows, torch.cat([x[:, 0], x[:, 1], x[:, 2]]))
    assert torch.equal(levels, torch.cat([1.1 * sigma[:, k] for k in range(3)]).flatten())
    assert torch.equal(d, x / sigma)
    assert seen is not None
    assert seen.given["text"].tolist() == [[1, 2], [3, 4]] * 3
    assert seen.null is not None
    assert seen.null["text"].shape == (6, 2)
    field(x[:, :1], 1.0)
    assert field.tally == Tally(calls=2, rows=8)


COND = Condition({"label": torch.tensor([1.0, 2.0])}, {"label": torch.tensor([0.5, 0.5])})


def test_guidance_by_hand_takes_one_call_of_twice_the_rows_nothing_first() -> None:
    def labelled(x: Tensor, _sigma: Tensor, cond: Condition | None) -> Tensor:
        assert cond is not None
        return cond.given["label"].reshape(-1, 1, 1, 1) * x

    x0 = Guided(labelled, 3.0)(torch.ones(2, 1, 1, 1), torch.ones(2), COND)
    assert x0.flatten().tolist() == [0.5 + 3 * 0.5, 0.5 + 3 * 1.5]
    recorder = Recorder()
    Guided(recorder, 3.0)(LATENTS, torch.ones(2), COND)
    ((rows, levels, cond),) = recorder.asked
    assert cond is not None
    assert torch.equal(rows, torch.cat([LATENTS, LATENTS]))
    assert len(levels) == 4
    assert cond.given["label"].tolist() == [0.5, 0.5, 1, 2]


@pytest.mark.parametrize("cond", [None, Condition(COND.given), COND])
def test_guidance_of_1_or_without_a_nothing_leaves_the_network_alone(
    cond: Condition | None,
) -> None:
    recorder = Recorder()
    Guided(recorder, 1.0 if cond is COND else 4.0)(LATENTS, torch.ones(2), cond)
    assert recorder.asked[0][0] is LATENTS
    assert recorder.asked[0][2] is cond


@pytest.mark.parametrize("shape", [(5,), (7, 3), (3, 4, 4), (2, 3, 4, 4)])
def test_a_sample_may_have_any_shape(shape: tuple[int, ...]) -> None:
    like = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, sigma = points(3, like)
    assert torch.allclose(Field(gauss)(x, sigma), x * sigma / (0.25 + sigma**2), atol=1e-14)


@pytest.mark.parametrize("backbone", [torch.bfloat16, torch.float16])
def test_a_half_precision_backbone_leaves_the_slope_in_float32(backbone: torch.dtype) -> None:
    def half(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
        return gauss(x.to(backbone), sigma.to(backbone))

    x = LATENTS[:, None].float()
    d = Field(half)(x, 2.0)
    assert d.dtype == torch.float32
    assert (d - Field(gauss)(x, 2.0)).abs().max() < 0.01
