"""Reading the data, and the real images that are shipped."""

import gzip
from pathlib import Path

import pytest
import torch

from eval import reference
from eval.frechet import Reference, moments
from eval.reference import SHIPPED_REAL, padded, read_images, real_distances, real_images
from src.images import grid, save_png
from tests.eval.small import FEATURES
from tests.eval.small import reference as unit_reference


def idx(path: Path, images: bytes, count: int, side: int = 3) -> Path:
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, side, side))
    path.write_bytes(gzip.compress(head + images))
    return path


def test_an_idx_file_is_read_row_by_row(tmp_path: Path) -> None:
    found = read_images(idx(tmp_path / "a.gz", bytes(range(18)), 2))
    assert found.shape == (2, 1, 3, 3)
    assert torch.equal(found[1, 0, 0], torch.tensor([9.0, 10, 11]) / 255)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no IDX file"):
        read_images(idx(tmp_path / "a.gz", bytes(17), 2))
    with pytest.raises(ValueError, match="dataset-fashion-mnist"):
        read_images(tmp_path / "none.gz")


def test_images_are_padded_with_black() -> None:
    found = padded(torch.ones(1, 1, 28, 28))
    assert found.shape == (1, 1, 32, 32)
    assert found.sum() == 28 * 28
    assert found[..., :2, :].sum() == 0


def test_real_images_come_back_from_their_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(80, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    save_png(tmp_path / "real.png", grid(images, 40))
    monkeypatch.setattr(reference, "REAL_IMAGES", tmp_path / "real.png")
    found = real_images(50)
    assert found is not None
    assert found.shape == (50, 1, 32, 32)
    assert (found[..., 2:-2, 2:-2] - images[:50]).abs().max() <= 0.5 / 255 + 1e-6


def test_more_real_images_than_are_shipped_are_none() -> None:
    assert real_images(SHIPPED_REAL + 1) is None


def test_the_shipped_real_images_are_fashion() -> None:
    found = real_images(SHIPPED_REAL)
    assert found is not None
    assert found.shape == (SHIPPED_REAL, 1, 32, 32)
    assert found.mean().item() == pytest.approx(0.286 * 28**2 / 32**2, abs=0.01)


def test_real_distances_are_of_the_first_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "REAL_COUNTS", (4, 6, 99))
    features = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(0))
    known: Reference = unit_reference()
    found = real_distances(features, known)
    assert found == {str(n): known.distance(moments(features[:n])) for n in (4, 6)}
