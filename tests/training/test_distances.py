"""Distances: what they are by hand, and what they refuse."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.distances import (
    HUBER,
    NAMES,
    FeatureDistance,
    distance_named,
    huber,
    load_network,
)

CPU = torch.device("cpu")


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator)
    return x, x + 0.1 * torch.randn(2, *shape, generator=generator)


def halves(x: Tensor) -> Tensor:
    """Two features."""
    return torch.stack([x.flatten(1).sum(1), x.flatten(1)[:, 0]], 1)


def test_huber_is_square_near_and_straight_far() -> None:
    c = HUBER * 2
    near = huber(torch.full((1, 4), 1e-6), torch.zeros(1, 4)).item()
    assert near == pytest.approx(4e-12 / (2 * c), rel=1e-2, abs=3e-9)
    far = huber(torch.full((1, 4), 50.0), torch.zeros(1, 4)).item()
    assert far == pytest.approx(100 - c)


def test_features_follow_the_formula_and_the_published_code_weighs_it() -> None:
    x, y = pair(3, 2, 2)
    by_formula = FeatureDistance(halves, 10.0)(x, y)
    difference = (halves(x) - halves(y)).square()
    assert torch.allclose(by_formula, 10 * difference.sum(1))
    published = FeatureDistance(halves, 10.0, as_published=True)(x, y)
    scalar = torch.nn.functional.mse_loss(halves(x), halves(y))
    broadcast = (10 * scalar * torch.ones_like(x)).sum() / len(x)
    assert published.mean().item() == pytest.approx(broadcast.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_gradient_for_the_student_alone(name: str) -> None:
    x, y = (t.requires_grad_() for t in pair(3, 8, 8))
    loss = distance_named(name, halves)(x, y)
    assert loss.shape == (2,)
    (slope,) = torch.autograd.grad(loss.sum(), x)
    assert slope.isfinite().all()
    assert slope.abs().sum() > 0


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "f.pt").write_text("no")
    for call, message in [
        (lambda: distance_named("l3"), "choose from l2"),
        (lambda: distance_named("inception"), "--features FILE"),
        (lambda: load_network("no/such.pt", CPU), "no/such.pt"),
        (lambda: load_network(tmp_path / "f.pt", CPU), "f.pt is no TorchScript"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
