"""`brisque`: its parts against the package brisque 0.2.0, its order on spoilt images.

The package takes the same steps but three: it fits the pixels by the asymmetric distribution,
leaves out neighbours across the edge, and halves images without antialiasing. So parts compare.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor

from rewards import brisque
from rewards.base import score
from rewards.brisque import Brisque, asymmetric, exponent, features, normalised
from rewards.registry import Setup, Shelf, load_reward
from src.images import read_image

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "brisque.json").read_text())
PLACES = ((0, 0), (5, 7), (50, 31), (95, 95))
PRODUCTS = {
    "horizontal": (slice(None), slice(None, -1), slice(None), slice(1, None)),
    "vertical": (slice(None, -1), slice(None), slice(1, None), slice(None)),
    "main_diagonal": (slice(None, -1), slice(None, -1), slice(1, None), slice(1, None)),
    "secondary_diagonal": (slice(1, None), slice(None, -1), slice(None, -1), slice(1, None)),
}


def pattern(k: int, size: int = 96) -> Tensor:
    """The k-th image of the recorded cases, grey levels [size, size]."""
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float64),) * 2, indexing="ij")
    waves = (
        50 * (0.11 * x + 0.3 * k).sin() * (0.07 * y).cos() + 30 * (0.023 * x * y / (1 + k)).sin()
    )
    tiles = 25 * ((x // (7 + k) + y // 11) % 2)
    noise = ((12.9898 * x + 78.233 * y + k).sin() * 43758.5453).abs() % 1 - 0.5
    levels = 128 + waves + tiles + (0, 8, 20, 45, 90)[k % 5] * noise
    return levels.round().clamp(0, 255)


def images(count: int = 8) -> Tensor:
    return torch.stack([pattern(k) for k in range(count)])[:, None].expand(-1, 3, -1, -1) / 255


def photograph() -> Tensor:
    """[1, 3, 240, 200]: the face of Grace Hopper, which comes with matplotlib."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pixels, _ = read_image(path, str(path))
    return pixels[None, :, 40:280, 150:350] / 255


@pytest.fixture(scope="module")
def reward() -> Brisque:
    return brisque.load(Shelf(Setup()))


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_contrast_is_normalised_and_fitted_as_in_the_package(case: dict[str, Any]) -> None:
    x = normalised(pattern(case["k"])[None, None])
    found = [x[0, i, j].item() for i, j in PLACES]
    assert found == pytest.approx(case["mscn"], rel=1e-6, abs=1e-8)
    for name, (a, b, c, d) in PRODUCTS.items():
        product = (x[0, a, b] * x[0, c, d]).flatten()[None]
        alpha, mean, left, right = (value.item() for value in asymmetric(product))
        theirs = case["fits"][name]
        assert alpha == pytest.approx(theirs[0], abs=6e-4)  # ours is off a table
        assert mean == pytest.approx(theirs[1], rel=0.02, abs=1e-4)
        assert (left**0.5, right**0.5) == pytest.approx(theirs[2:], rel=1e-9)


@pytest.mark.parametrize("case", GOLDEN["regression"])
def test_the_regression_gives_the_packages_numbers(
    case: dict[str, Any], reward: Brisque, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = torch.tensor([case["features"]], dtype=torch.float64)
    monkeypatch.setattr(brisque, "features", lambda _: given)
    assert reward.quality(images(1)).item() == pytest.approx(case["score"], rel=1e-5)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_the_exponent_of_a_known_distribution_is_found(shape: float) -> None:
    """Laplace has 1, Gauss has 2: |x|^shape is gamma distributed."""
    torch.manual_seed(0)
    power = torch.distributions.Gamma(1 / shape, 1.0).sample((200_000,)).double()
    size = power ** (1 / shape)
    found = exponent((size.mean() ** 2 / size.square().mean())[None])
    assert found.item() == pytest.approx(shape, rel=0.02)


@pytest.mark.parametrize("worse", ["noise", "blur"])
def test_the_more_an_image_is_spoilt_the_lower_it_scores(worse: str, reward: Brisque) -> None:
    plain = photograph()
    noise = torch.randn(plain.shape, generator=Generator().manual_seed(0))

    def spoilt(much: int) -> Tensor:
        if worse == "blur":
            return F.avg_pool2d(plain, 2 * much + 1, 1, much, count_include_pad=False)
        return (plain + 0.08 * much * noise).clamp(0, 1)

    found = [reward(spoilt(much), [""]).item() for much in (0, 1, 2, 3)]
    assert found == sorted(found, reverse=True)


def test_a_batch_scores_as_its_images_one_by_one(reward: Brisque) -> None:
    given = images()
    alone = [score(reward, image[None], ["x"]) for image in given]
    torch.testing.assert_close(score(reward, given, ["x"] * 8), torch.cat(alone))


@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (3, 200)])
def test_flat_and_small_images_have_a_number(
    shade: float, size: tuple[int, int], reward: Brisque
) -> None:
    flat = torch.full((2, 3, *size), shade)
    assert score(reward, flat, ["", ""]).isfinite().all()


def test_it_comes_with_the_repository_and_needs_no_package() -> None:
    assert features(images(1)).shape == (1, 36)
    assert -60 < load_reward("brisque")(photograph(), [""]).item() < 20


def test_a_broken_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"vectors": torch.zeros(3, 36)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(brisque, "MODEL", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="these are other weights"):
        load_reward("brisque")
