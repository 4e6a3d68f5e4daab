"""FID's arithmetic against an independent one, and its two commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner, Result

from eval.fid import main
from eval.frechet import frechet_distance, moments
from eval.kid import kernel_distance, precision_recall
from rewards.clip import load_towers
from src.images import read_png, save_png
from tests.eval.pictures import CHEAP, features, fill
from tests.rewards.twins import write_open_clip_folder


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [*map(str, options)])


def cheap(command: str, *options: object) -> Result:
    return run(command, *options, "--features", CHEAP, "--device", "cpu")


def seen(folder: Path) -> torch.Tensor:
    images = [read_png(path)[0] for path in sorted(folder.glob("*.png"))]
    return torch.cat([features(image[None]) for image in images])


def scipys(a: np.ndarray, b: np.ndarray) -> float:
    """Eq. 6 of arXiv:1706.08500 with a matrix square root."""
    mu1, mu2 = a.mean(0), b.mean(0)
    sigma1, sigma2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(sigma1 @ sigma2)))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


def test_the_distance_is_that_of_scipys_matrix_root() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(200, 64)) @ generator.normal(size=(64, 64))
    b = generator.normal(size=(150, 64)) @ generator.normal(size=(64, 64)) + 0.3
    x, y = moments(torch.from_numpy(a)), moments(torch.from_numpy(b))
    found = frechet_distance(x.mean, x.covariance, y.mean, y.covariance)
    assert found == pytest.approx(scipys(a, b), rel=1e-9)


def test_clip_features_are_its_image_embeddings(tmp_path: Path) -> None:
    """Of the model that the reward clip loads."""
    towers = write_open_clip_folder(tmp_path / "clip")
    folder, out = fill(tmp_path / "a", 6), tmp_path / "a.npz"
    options = ["--features", "clip", "--weights", towers, "--device", "cpu"]
    done = run("ref", "--data", folder, "--dest", out, "--keep_features", *options)
    assert done.exit_code == 0, done.output
    reward = load_towers(towers, torch.device("cpu"), False)
    image, _ = read_png(folder / "000003.png")
    with np.load(out) as file:
        expected = reward.images(image[None])[0].detach().numpy()
        assert np.allclose(file["features"][3], expected, atol=1e-5)
        assert "of length 1 [16], input 32x32" in str(file["about"])


def test_a_reference_is_edms_file(tmp_path: Path) -> None:
    """Which its own script reads: mu and sigma, in float64."""
    folder = fill(tmp_path / "images", 12)
    done = cheap("ref", "--data", folder, "--dest", tmp_path / "ref.npz")
    assert done.exit_code == 0, done.output
    known = seen(folder).double().numpy()
    with np.load(tmp_path / "ref.npz") as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert np.allclose(file["mu"], known.mean(0), rtol=1e-6)
        assert np.allclose(file["sigma"], np.cov(known, rowvar=False), rtol=1e-4, atol=1e-8)


def test_a_file_of_edm_is_a_reference(tmp_path: Path) -> None:
    a, b = fill(tmp_path / "a", 12), seen(fill(tmp_path / "b", 15, 100)).double().numpy()
    np.savez(tmp_path / "edm.npz", mu=b.mean(0), sigma=np.cov(b, rowvar=False))
    out = tmp_path / "out.json"
    done = cheap("calc", "--images", a, "--ref", tmp_path / "edm.npz", "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["fid"] == pytest.approx(scipys(seen(a).double().numpy(), b), abs=1e-6)
    assert (found["count"], found["ref_count"], found["left_out"]) == (12, None, {})
    assert f"{found['fid']:.6g}" in done.output


def test_all_metrics_against_a_folder_a_zip_and_a_kept_reference(tmp_path: Path) -> None:
    a, b = fill(tmp_path / "a", 12), fill(tmp_path / "b", 15, 100)
    done = cheap("ref", "--data", b, "--dest", tmp_path / "b.npz", "--keep_features")
    assert done.exit_code == 0, done.output
    found = []
    for place in (b, tmp_path / "b.npz"):
        out = tmp_path / "out.json"
        options = ["--images", a, "--ref", place, "--metrics", "fid,kid,pr", "--out", out]
        done = cheap("calc", *options, "--batch", 1 + len(found) * 6)
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text()))
    kid = kernel_distance(seen(a), seen(b))
    precision, recall = precision_recall(seen(a), seen(b))
    for one in found:
        assert one["fid"] == pytest.approx(found[0]["fid"], rel=1e-6)
        assert one["kid"] == pytest.approx(kid.value, rel=1e-4)
        assert one["kid_95"] == pytest.approx([kid.low, kid.high], rel=1e-4)
        assert (one["precision"], one["recall"]) == (precision, recall)


def test_a_set_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    folder, out = fill(tmp_path / "a", 12), tmp_path / "out.json"
    assert cheap("calc", "--images", folder, "--ref", folder, "--out", out).exit_code == 0
    assert json.loads(out.read_text())["fid"] == pytest.approx(0, abs=1e-6)


def test_num_draws_a_subset_by_the_seed(tmp_path: Path) -> None:
    folder, found = fill(tmp_path / "a", 12), []
    for seed in (0, 0, 1):
        out = tmp_path / "out.json"
        options = ["--num", 6, "--seed", seed, "--out", out]
        done = cheap("calc", "--images", folder, "--ref", folder, *options)
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text()))
    assert [one["count"] for one in found] == [6, 6, 6]
    assert found[0]["fid"] == found[1]["fid"] != found[2]["fid"]


def test_few_images_come_with_a_warning(tmp_path: Path) -> None:
    done = cheap("calc", "--images", fill(tmp_path, 4), "--ref", tmp_path)
    assert "not more than the 5 features" in done.stderr


def refused(done: Result, said: str) -> None:
    assert done.exit_code != 0
    last = done.output.strip().splitlines()
    assert said in last[-1], done.output
    assert len(last) == 1, done.output


def test_each_mistake_is_one_line(tmp_path: Path) -> None:
    a = fill(tmp_path / "a", 6)
    none, text, nan = (tmp_path / n for n in ("none.npz", "text.npz", "nan.npz"))
    text.write_text("no reference")
    np.savez(nan, mu=np.full(5, np.nan), sigma=np.eye(5))
    np.savez(tmp_path / "7.npz", mu=np.zeros(7), sigma=np.eye(7))
    images = ["calc", "--images", a, "--ref"]
    refused(cheap(*images, none), "no reference statistics at")
    refused(cheap(*images, text), "holds no reference statistics")
    refused(cheap(*images, nan), "NaN")
    refused(cheap(*images, tmp_path / "7.npz"), "the images have 5 features, the reference 7")
    refused(cheap(*images, a, "--num", 7), "has 6 images, not 7: lower --num")
    refused(cheap(*images, a, "--metrics", "fib"), "no metric 'fib': did you mean fid?")
    refused(cheap("calc", "--images", tmp_path / "none", "--ref", a), "no such folder")
    refused(run("calk"), "No such command 'calk'")
    refused(run(*images, a, "--features", "inceptoin"), "did you mean inception?")
    refused(run(*images, a, "--weights", none), "inception: no such file or folder")
    refused(run(*images, a, "--weights", text), "text.npz is no file of weights")
    refused(cheap("ref", "--data", a, "--dest", tmp_path / "ref.txt"), "must end in .npz")


def test_missing_weights_are_told_with_the_way_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EPD_INCEPTION", "EPD_CLIP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    a = fill(tmp_path / "a", 3)
    refused(run("calc", "--images", a, "--ref", a), "missing weights: inception")
    refused(run("calc", "--images", a, "--ref", a, "--features", "clip"), "missing weights: clip")


def test_a_reference_of_other_features_is_refused(tmp_path: Path) -> None:
    a, dest = fill(tmp_path / "a", 6), tmp_path / "a.npz"
    assert cheap("ref", "--data", a, "--dest", dest).exit_code == 0
    other = "tests.eval.pictures:nan_features"
    done = run("calc", "--images", a, "--ref", dest, "--features", other, "--device", "cpu")
    refused(done, "holds other features")
    done = cheap("calc", "--images", a, "--ref", dest, "--metrics", "kid")
    refused(done, "holds no features, which kid and pr need")


def test_a_truncated_picture_is_refused_or_counted(tmp_path: Path) -> None:
    a, b = fill(tmp_path / "a", 9), fill(tmp_path / "b", 9)
    save_png(b / "000003.png", torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)))
    broken = a / "000002.png"
    broken.write_bytes(broken.read_bytes()[:70])
    refused(cheap("calc", "--images", a, "--ref", b), "000002.png is not a readable")
    out = tmp_path / "out.json"
    done = cheap("calc", "--images", a, "--ref", b, "--skip-bad", "--out", out)
    assert done.exit_code == 0, done.output
    assert "1 images left out" in done.stderr
    found = json.loads(out.read_text())
    assert found["count"] == 8
    assert list(found["left_out"]) == ["000002.png"]
