"""The Frechet distance in closed form, running statistics, reference files, folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eval import frechet
from eval.frechet import (
    SHIPPED,
    Moments,
    all_moments,
    frechet_distance,
    load_reference,
    main,
    merged,
    moments,
    save_reference,
)
from eval.pictures import find_pictures
from src.images import save_png
from tests.eval.small import FEATURES, cheap_features

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def covariance(d: int) -> Tensor:
    a = normal(d, d)
    return a @ a.T / d


def test_gaussians_of_one_covariance_are_as_far_apart_as_their_means() -> None:
    mu, shift, sigma = normal(6), normal(6), covariance(6)
    found = frechet_distance(mu, sigma, mu + shift, sigma)
    assert found == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_independent_numbers_add_the_squares_of_their_differences_in_spread() -> None:
    a, b = normal(7).abs(), normal(7).abs()
    zero = torch.zeros(7)
    found = frechet_distance(zero, a.square().diag(), zero, b.square().diag())
    assert found == pytest.approx((a - b).square().sum().item(), rel=1e-9)


def test_one_number_by_hand() -> None:
    """N(1, 4) and N(3, 9): (1 - 3)^2 + (2 - 3)^2."""
    one = torch.ones(1)
    assert frechet_distance(one, 4 * torch.eye(1), 3 * one, 9 * torch.eye(1)) == pytest.approx(5)


def test_two_numbers_that_do_not_commute() -> None:
    """For 2x2 matrices tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M))."""
    a = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    b = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root).item()
    zero = torch.zeros(2)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_the_same_both_ways_and_in_any_rotation() -> None:
    (m1, s1), (m2, s2) = ((normal(5), covariance(5)) for _ in range(2))
    turn = torch.linalg.qr(normal(5, 5)).Q
    there = frechet_distance(m1, s1, m2, s2)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(there, rel=1e-9)
    turned = frechet_distance(turn @ m1, turn @ s1 @ turn.T, turn @ m2, turn @ s2 @ turn.T)
    assert turned == pytest.approx(there, rel=1e-9)


def test_singular_covariances_are_served() -> None:
    """Both live on one line, where the distance is that of numbers."""
    line = torch.outer(torch.ones(4), torch.ones(4)) / 4  # the projection onto it
    zero = torch.zeros(4)
    assert frechet_distance(zero, 4 * line, zero, 9 * line) == pytest.approx(1, abs=1e-6)
    assert frechet_distance(zero, line, zero, torch.zeros(4, 4)) == pytest.approx(1, abs=1e-6)


def test_a_set_is_at_no_distance_from_itself() -> None:
    sigma = covariance(30)
    assert frechet_distance(sigma[0], sigma, sigma[0], sigma) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [torch.eye(3), torch.full((2, 2), float("nan"))])
def test_statistics_that_do_not_fit_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"sizes|NaN"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), bad)


def test_the_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    features = normal(40, 6) + 100
    found = moments(features)
    assert torch.allclose(found.mean, features.mean(0), rtol=1e-12)
    assert torch.allclose(found.covariance, features.T.cov(), rtol=1e-10)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_any_split_into_batches_gives_the_same_statistics(sizes: list[int]) -> None:
    features = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(3)) * 3 + 1000
    whole = moments(features)
    found = all_moments(features.split(sizes))
    assert found.count == whole.count
    assert torch.allclose(found.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(found.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_merging_does_not_hang_on_the_order() -> None:
    a, b, c = (moments(normal(n, 3)) for n in (2, 5, 9))
    left, right = merged(merged(a, b), c), merged(a, merged(c, b))
    assert left.count == right.count == 16
    assert torch.allclose(left.scatter, right.scatter, rtol=1e-10, atol=1e-12)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="2 images or more, not 1"):
        _ = moments(normal(1, 3)).covariance


def test_no_images_and_broken_features_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        all_moments([torch.empty(0, 3)])
    with pytest.raises(ValueError, match="NaN"):
        moments(torch.full((2, 3), float("nan")))


def test_a_reference_file_comes_back_to_float32(tmp_path: Path) -> None:
    features = normal(50, 8) * torch.arange(1, 9)
    kept = moments(features)
    save_reference(tmp_path / "r.npz", kept, {"images": "drawn"})
    found = load_reference(tmp_path / "r.npz")
    assert (found.count, found.about) == (50, {"images": "drawn"})
    assert torch.equal(found.mean, kept.mean)
    assert torch.allclose(found.covariance, kept.covariance, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.covariance, found.covariance.T)
    assert found.distance(kept) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 broken"])
def test_a_broken_reference_is_an_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no reference statistics") as error:
        load_reference(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="no reference statistics at"):
        load_reference(tmp_path / "none.npz")


@pytest.mark.parametrize("damage", ["cut", "flipped", "npy"])
def test_a_damaged_reference_is_an_error_of_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "r.npz"
    save_reference(path, moments(normal(50, 40)), {})
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 9])
    path.write_bytes(
        {"cut": whole[:middle], "flipped": flipped + whole[middle + 9 :]}.get(damage, b"")
    )
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="no reference statistics"):
        load_reference(path)


def test_statistics_whose_parts_do_not_fit_are_refused(tmp_path: Path) -> None:
    wrong = Moments(5, torch.zeros(3).double(), torch.eye(2).double())
    with pytest.raises((ValueError, IndexError)):
        save_reference(tmp_path / "r.npz", wrong, {})
    assert not (tmp_path / "r.npz").exists()


def test_the_shipped_reference_is_of_the_whole_test_set_and_small() -> None:
    found = load_reference(SHIPPED)
    assert found.count == 10_000
    assert found.mean.shape == (1280,)
    assert torch.linalg.eigvalsh(found.covariance).min() > -1e-5
    assert SHIPPED.stat().st_size < 3.6e6
    by_count = found.about["real_images"]
    distances = [by_count[n] for n in sorted(by_count, key=int)]
    assert distances == sorted(distances, reverse=True)  # the bias of few images


def folder(path: Path) -> Path:
    """Four images, of which samples.json lists three, and a grid."""
    for i in range(4):
        image = torch.rand(1, 8, 8 + i % 2, generator=torch.Generator().manual_seed(i))
        save_png(path / f"{i:06d}.png", image)
    save_png(path / "grid.png", torch.ones(1, 16, 16))
    entries = [{"file": f"{i:06d}.png", "seed": i, "class": None} for i in range(3)]
    (path / "samples.json").write_text(json.dumps({"recipe": {}, "images": entries}))
    return path


def test_samples_json_says_which_images_count(tmp_path: Path) -> None:
    place = folder(tmp_path)
    found = find_pictures(place)
    assert [p.name for p in found.items] == ["000000.png", "000001.png", "000002.png"]
    assert find_pictures(place / "samples.json") == found


def test_a_folder_without_it_counts_all_its_pngs(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place / "samples.json").unlink()
    assert len(find_pictures(place).items) == 5


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": [1]}', '{"images": [{"file": 3}]}', "{"])
def test_a_samples_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(ValueError, match=r"samples\.json|no images"):
        find_pictures(tmp_path)


def test_the_command_prints_the_distance_and_the_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frechet, "load_features", lambda _: cheap_features)
    place = folder(tmp_path / "images")
    save_reference(tmp_path / "r.npz", moments(normal(20, FEATURES)), {})
    options = [str(place), "--reference", str(tmp_path / "r.npz"), "--device", "cpu"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    assert "of 3 images to the 20 of r.npz" in done.output


def test_an_empty_folder_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path)])
    assert done.exit_code == 1
    assert "no images in" in done.output.splitlines()[-1]
