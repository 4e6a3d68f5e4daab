"""Features gathered over ranks and in parts; what was done before is not done again."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval import gather as module
from eval.features import Space
from eval.frechet import frechet_distance
from eval.gather import Gathered, How, gather
from eval.pictures import find_pictures
from src.images import read_png, save_png
from tests.eval.pictures import features, fill, nan_features

ROOT = Path(__file__).parents[2]
SPACE = Space("cheap", "five numbers of an image", features)
ALL = How(keep=True)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 4)


def expected(folder: Path) -> Tensor:
    images = [read_png(path)[0] for path in sorted(folder.glob("*.png"))]
    return torch.cat([features(image[None]) for image in images])


def same(a: Gathered, b: Gathered) -> bool:
    near = torch.allclose(a.moments.covariance, b.moments.covariance, rtol=1e-6, atol=1e-9)
    return near and a.moments.count == b.moments.count and torch.equal(a.features, b.features)


def test_features_come_in_the_order_of_the_pictures(tmp_path: Path) -> None:
    found = gather(find_pictures(fill(tmp_path, 11)), SPACE, ALL)
    assert torch.allclose(found.features, expected(tmp_path), atol=1e-6)
    assert torch.allclose(found.moments.mean, found.features.double().mean(0), rtol=1e-9)
    assert found.bad == {}


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_changes_nothing(tmp_path: Path, batch: int) -> None:
    pictures = find_pictures(fill(tmp_path, 11))
    assert same(gather(pictures, SPACE, replace(ALL, batch=batch)), gather(pictures, SPACE, ALL))


def test_features_are_not_held_unless_asked_for(tmp_path: Path) -> None:
    assert len(gather(find_pictures(fill(tmp_path, 5)), SPACE, How()).features) == 0


def test_what_was_done_before_is_not_done_again(tmp_path: Path) -> None:
    """The network fails on the third part; the second run begins there."""
    pictures = find_pictures(fill(tmp_path / "images", 11))
    seen: list[int] = []

    def failing(images: Tensor) -> Tensor:
        if sum(seen) >= 8:
            raise ValueError("the network broke")
        return counting(images)

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return features(images)

    how = replace(ALL, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="the network broke"):
        gather(pictures, replace(SPACE, extract=failing), how)
    assert sum(seen) == 8
    found = gather(pictures, replace(SPACE, extract=counting), how)
    assert sum(seen) == 11
    assert same(found, gather(pictures, SPACE, ALL))


def test_a_changed_picture_or_network_is_measured_anew(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", 6)
    how = replace(ALL, cache=tmp_path / "cache")
    before = gather(find_pictures(folder), SPACE, how)
    (folder / "000001.png").write_bytes((folder / "000003.png").read_bytes())
    after = gather(find_pictures(folder), SPACE, how)
    assert torch.equal(after.features[1], before.features[3])
    other = replace(SPACE, weights="other", extract=lambda images: features(images) + 1)
    assert torch.equal(gather(find_pictures(folder), other, how).features, after.features + 1)


def test_a_broken_cache_entry_is_made_again(tmp_path: Path) -> None:
    pictures, cache = find_pictures(fill(tmp_path / "images", 6)), tmp_path / "cache"
    first = gather(pictures, SPACE, replace(ALL, cache=cache))
    for path in cache.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:40])
    assert same(gather(pictures, SPACE, replace(ALL, cache=cache)), first)


def test_bad_pictures_and_features_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", 9)
    (folder / "000002.png").write_bytes(b"no picture")
    whole = read_png(folder / "000005.png")[0]
    whole[:, 0, 0] = 0
    save_png(folder / "000005.png", whole)
    space = replace(SPACE, extract=nan_features)
    how = How(keep=True, skip_bad=True, cache=tmp_path / "cache")
    for _ in range(2):
        found = gather(find_pictures(folder), space, how)
        assert sorted(found.bad) == ["000002.png", "000005.png"]
        assert found.moments.count == len(found.features) == 7
    with pytest.raises(ValueError, match=r"000002\.png is not a readable"):
        gather(find_pictures(folder), space, replace(how, skip_bad=False))


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    save_png(tmp_path / "000001.png", torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"000001\.png are not finite"):
        gather(find_pictures(tmp_path), replace(SPACE, extract=nan_features), ALL)


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    space = replace(SPACE, extract=lambda images: images)
    with pytest.raises(ValueError, match=r"cheap must return features \[4, D\], not \[4, 3, 8, 8"):
        gather(find_pictures(fill(tmp_path, 4)), space, ALL)


def test_one_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than 2 images"):
        gather(find_pictures(fill(tmp_path, 1)), SPACE, ALL)


WORK = """
import json, sys, torch
from pathlib import Path
from eval import gather
from eval.features import Space
from eval.pictures import find_pictures
from src import ranks
from tests.eval.pictures import features
gather.PART = 4
ranks.init(torch.device("cpu"))
told = []
for place in sys.argv[1:]:
    try:
        space = Space("cheap", "five numbers of an image", features)
        found = gather.gather(find_pictures(Path(place)), space, gather.How(keep=True))
        one = found.moments
        numbers = [t.tolist() for t in (one.mean, one.covariance, found.features)]
        told.append([one.count, *numbers])
    except ValueError as error:
        told.append(str(error))
ranks.close()
print(json.dumps(told))
"""


def on_two_ranks(*folders: Path) -> list[list[Any]]:
    """What each rank tells of each folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, *map(str, folders)],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    return [json.loads(p.communicate(timeout=120)[0]) for p in processes]


def test_two_ranks_know_what_one_does_and_a_bad_picture_of_one_ends_both(tmp_path: Path) -> None:
    whole, broken = fill(tmp_path / "whole", 13), fill(tmp_path / "broken", 8)
    (broken / "000006.png").write_bytes(b"")
    one = gather(find_pictures(whole), SPACE, ALL)
    for (count, mean, covariance, rows), error in on_two_ranks(whole, broken):
        assert count == 13
        mu, sigma = torch.tensor(mean).double(), torch.tensor(covariance).double()
        assert torch.allclose(mu, one.moments.mean, rtol=1e-6)
        assert torch.allclose(sigma, one.moments.covariance, rtol=1e-5, atol=1e-8)
        assert torch.allclose(torch.tensor(rows), one.features, atol=1e-6)
        apart = frechet_distance(mu, sigma, one.moments.mean, one.moments.covariance)
        assert apart == pytest.approx(0, abs=1e-6)
        assert "000006.png is not a readable" in error
