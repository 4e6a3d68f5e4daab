"""The Frechet distance, KID, precision and recall against others' arithmetic; the two commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from eval.fid import (
    frechet_distance,
    kernel_distance,
    load_statistics,
    main,
    merged,
    precision_recall,
    statistics_of,
)
from src.images import read_png, save_png
from tests.eval.drawings import CHEAP, features, fill, on_two_ranks, refused

SHIPPED = Path(__file__).parents[2] / "src/models/fashion-mnist-32/test-features.npz"


def points(count: int, seed: int, shift: float = 0.0, size: int = 4) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + shift


def pytorch_fids(a: np.ndarray, b: np.ndarray) -> float:
    """Eq. 6 of arXiv:1706.08500 with a matrix square root."""
    mu1, mu2 = a.mean(0), b.mean(0)
    sigma1, sigma2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(sigma1 @ sigma2)))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


# --- arithmetic ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, 40])  # more and fewer images than features
def test_the_distance_is_that_of_pytorch_fid_and_of_torch_fidelity(count: int) -> None:
    mixes = points(64, 0, size=64).double(), points(64, 1, size=64).double()
    a = points(count, 2, size=64).double() @ mixes[0]
    b = points(150, 3, size=64).double() @ mixes[1] + 0.3
    both = [fid_features_to_statistics(t) for t in (a, b)]
    theirs = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    distance = statistics_of(a).distance(statistics_of(b))
    assert distance == pytest.approx(theirs, rel=1e-6)
    assert distance == pytest.approx(pytorch_fids(a.numpy(), b.numpy()), rel=1e-6)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8))
def test_any_split_into_batches_gives_the_same_statistics(sizes: list[int]) -> None:
    drawn = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(3)) * 3 + 1000
    total, *rest = map(statistics_of, drawn.split(sizes))
    for part in rest:
        total = merged(total, part)
    assert total.count == len(drawn)
    assert torch.allclose(total.mean, drawn.double().mean(0), rtol=1e-12)
    assert torch.allclose(total.covariance, drawn.double().T.cov(), rtol=1e-8, atol=1e-8)


def by_pairs(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of KID, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return (float(np.dot(a.double().numpy(), b.double().numpy())) / len(a) + 1) ** 3

    def within(s: Tensor) -> float:
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
        return sum(k(s[i], s[j]) for i, j in pairs) / len(pairs)

    between = [k(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(between) / len(between)


def test_the_kernel_distance_is_that_of_all_pairs_with_the_jackknifes_interval() -> None:
    x, y = points(7, 2), points(6, 3, 1.0)
    kid = kernel_distance(x, y)
    assert kid.value == pytest.approx(by_pairs(x, y), rel=1e-10)
    less_x = np.array([by_pairs(x[torch.arange(7) != i], y) for i in range(7)])
    less_y = np.array([by_pairs(x, y[torch.arange(6) != i]) for i in range(6)])
    variance = sum((len(t) - 1) / len(t) * ((t - t.mean()) ** 2).sum() for t in (less_x, less_y))
    assert (kid.high - kid.low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=1e-4)


def test_precision_and_recall_of_points_on_a_line() -> None:
    """Third neighbours: of 0 1 2 3 at 3 2 2 3, which reach -3 to 6; of 4 5 6 20 at 16 15 14 16.

    Of 4 5 6 20 three lie in -3 to 6; of 0 1 2 3 all lie in 4 - 16 to 36. One image again and
    again is precise but recalls nothing.
    """
    line = [torch.tensor(p)[:, None] for p in ([0.0, 1, 2, 3], [4.0, 5, 6, 20], [2.0] * 4)]
    assert precision_recall(line[1], line[0]) == (0.75, 1.0)
    assert precision_recall(line[2], torch.arange(6.0)[:, None]) == (1.0, 1 / 6)
    x = points(40, 6)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_statistics_that_do_not_fit_are_refused() -> None:
    nan = float("nan")
    with pytest.raises(ValueError, match="sizes"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.zeros(2), torch.full((2, 2), nan), torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        statistics_of(torch.full((2, 3), nan))
    with pytest.raises(ValueError, match="3 images of each set, not 2 and 5"):
        kernel_distance(points(2, 0), points(5, 1))
    with pytest.raises(ValueError, match="two kinds"):
        kernel_distance(points(5, 0), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="4 images of each set, not 3 and 9"):
        precision_recall(points(3, 0), points(9, 0))


# --- commands -----------------------------------------------------------------------------


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [*map(str, options)])


def cheap(command: str, *options: object) -> Result:
    return run(command, *options, "--features", CHEAP, "--device", "cpu")


def calc(tmp_path: Path, *options: object) -> dict:
    done = cheap("calc", *options, "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    return json.loads((tmp_path / "out.json").read_text())


def seen(folder: Path) -> Tensor:
    images = [read_png(path)[0] for path in sorted(folder.glob("*.png"))]
    return torch.cat([features(image[None]) for image in images])


def test_a_reference_is_edms_file_and_edms_file_a_reference(tmp_path: Path) -> None:
    """Which its own script reads: mu and sigma, in float64."""
    a, b = fill(tmp_path / "a", 12), fill(tmp_path / "b", 15, 100)
    assert cheap("ref", "--data", b, "--dest", tmp_path / "ref.npz").exit_code == 0
    real = seen(b).double().numpy()
    with np.load(tmp_path / "ref.npz") as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert np.allclose(file["mu"], real.mean(0), rtol=1e-6)
        assert np.allclose(file["sigma"], np.cov(real, rowvar=False), rtol=1e-4, atol=1e-8)
    np.savez(tmp_path / "edm.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    by_file = calc(tmp_path, "--images", a, "--ref", tmp_path / "edm.npz")
    expected = pytorch_fids(seen(a).double().numpy(), real)
    assert by_file["fid"] == pytest.approx(expected, abs=1e-6)
    assert (by_file["count"], by_file["ref_count"]) == (12, None)


def test_all_metrics_against_a_folder_and_a_kept_reference_on_one_rank_and_on_two(
    tmp_path: Path,
) -> None:
    a, b = fill(tmp_path / "a", 12), fill(tmp_path / "b", 15, 100)
    done = cheap("ref", "--data", b, "--dest", tmp_path / "b.npz", "--keep_features")
    assert done.exit_code == 0, done.output
    x, y = seen(a), seen(b)
    kid, shares = kernel_distance(x, y), precision_recall(x, y)
    options = ["--images", a, "--metrics", "fid,kid,pr", "--ref"]
    results = [calc(tmp_path, *options, b, "--batch", 1)]
    results += [calc(tmp_path, *options, tmp_path / "b.npz", "--batch", 7)]
    cheaply = ["--features", CHEAP, "--device", "cpu", "--batch", 2, "--out"]
    on_two_ranks(main, lambda rank: ["calc", *options, b, *cheaply, tmp_path / f"{rank}.json"])
    assert not (tmp_path / "1.json").exists()
    for one in (*results, json.loads((tmp_path / "0.json").read_text())):
        assert one["fid"] == pytest.approx(statistics_of(x).distance(statistics_of(y)))
        assert one["kid"] == pytest.approx(kid.value, rel=1e-4)
        assert one["kid_95"] == pytest.approx([kid.low, kid.high], rel=1e-4)
        assert (one["precision"], one["recall"], one["count"]) == (*shares, 12)


def test_num_draws_a_subset_by_the_seed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", 12)
    options = ["--images", folder, "--ref", folder]
    assert calc(tmp_path, *options)["fid"] == pytest.approx(0, abs=1e-6)
    some = [calc(tmp_path, *options, "--num", 6, "--seed", seed) for seed in (0, 0, 1)]
    assert [one["count"] for one in some] == [6, 6, 6]
    assert some[0]["fid"] == some[1]["fid"] != some[2]["fid"]


def test_each_mistake_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EPD_INCEPTION", "EPD_CLIP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    a, broken, black = (fill(tmp_path / n, 6) for n in ("a", "broken", "black"))
    cut = broken / "000002.png"
    cut.write_bytes(cut.read_bytes()[:70])
    save_png(black / "000003.png", torch.zeros(3, 8, 8))
    none, text, nan, single = (tmp_path / n for n in ("no.npz", "t.npz", "nan.npz", "one.npz"))
    text.write_text("no reference")
    np.savez(nan, mu=np.full(5, np.nan), sigma=np.eye(5))
    with single.open("wb") as file:
        np.save(file, np.zeros(3))
    np.savez(tmp_path / "7.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(5), sigma=np.eye(4))
    np.savez(tmp_path / "no-sigma.npz", mu=np.zeros(5), sigma=np.triu(np.ones((5, 5))))
    np.savez(tmp_path / "minus.npz", mu=np.zeros(5), sigma=-np.eye(5))
    np.savez(tmp_path / "about.npz", mu=np.zeros(5), sigma=np.eye(5), about=np.array("5"))
    np.savez(tmp_path / "i.npz", mu=np.full(5, 1j), sigma=np.eye(5))
    np.savez(tmp_path / "empty.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(10**7), sigma=np.eye(5))
    sizes = fill(tmp_path / "sizes", 2)
    save_png(sizes / "000003.png", torch.rand(3, 4, 4))
    flat = ["--features", "tests.eval.drawings:unpooled", "--device", "cpu"]
    assert cheap("ref", "--data", a, "--dest", tmp_path / "a.npz").exit_code == 0
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    images = ["calc", "--images", a, "--ref"]
    other = ["--features", "tests.eval.drawings:nan_features", "--device", "cpu"]
    table = (
        (cheap("calc", "--images", broken, "--ref", a), "000002.png is not a readable"),
        (run("calc", "--images", black, "--ref", a, *other), "000003.png are not finite"),
        (cheap(*images, none, "--out", tmp_path / "new/q.json"), "no reference statistics at"),
        (cheap(*images, text), "(it is no .npz)"),
        (cheap(*images, tmp_path / "cut.npz"), "holds no reference statistics"),
        (cheap(*images, single), "(it is no .npz)"),
        (cheap(*images, nan), "NaN"),
        (cheap(*images, tmp_path / "odd.npz"), "do not fit"),
        (cheap(*images, tmp_path / "empty.npz"), "do not fit"),
        (cheap(*images, a, "--out", cut / "q.json"), "q.json: Not a directory"),
        (cheap(*images, tmp_path / "7.npz"), "the images have 5 features, the reference 7"),
        (cheap(*images, tmp_path / "no-sigma.npz"), "its sigma is no covariance"),
        (cheap(*images, tmp_path / "minus.npz"), "its sigma is no covariance"),
        (cheap(*images, tmp_path / "about.npz"), "holds no reference statistics"),
        (cheap(*images, tmp_path / "i.npz"), "holds no reference statistics"),
        (cheap(*images, tmp_path / "bomb.npz"), "unpacks to far more than it holds"),
        (cheap(*images, a, "--metrics", ""), "--metrics names none"),
        (cheap(*images, a, "--num", 3, "--metrics", "pr"), "pr needs 4 images, not 3: give"),
        (cheap(*images, sizes, "--metrics", "pr"), "sizes has fewer than 4 images"),
        (
            run("ref", "--data", sizes, "--dest", tmp_path / "new/s.npz", *flat),
            "let the features pool",
        ),
        (cheap("calc", "--images", black / "000003.png", "--ref", a), "is one picture"),
        (cheap("ref", "--data", a, "--dest", cut / "q.npz"), "q.npz: Not a directory"),
        (cheap(*images, a, "--num", 7), "has 6 images, not 7: lower --num"),
        (cheap(*images, a, "--metrics", "fib"), "no metric 'fib': did you mean fid?"),
        (cheap(*images, tmp_path / "a.npz", "--metrics", "kid"), "holds no features, which kid"),
        (cheap("calc", "--images", tmp_path / "none", "--ref", a), "no such folder"),
        (cheap("ref", "--data", a, "--dest", tmp_path / "ref.txt"), "must end in .npz"),
        (run("calk"), "No such command 'calk'"),
        (run("--foo"), "No such option '--foo'"),
        (run(*images, tmp_path / "a.npz", *other), "holds other features"),
        (run(*images, a, "--features", "inceptoin"), "did you mean inception?"),
        (run(*images, a, "--weights", none), "inception: no such file or folder"),
        (run(*images, a), "missing weights: inception"),
    )
    for done, words in table:
        refused(done, words)
    assert not (tmp_path / "new").exists()


def test_the_shipped_reference_is_of_the_whole_test_set() -> None:
    shipped = load_statistics(SHIPPED)
    assert (shipped.count, shipped.mean.shape) == (10_000, (1280,))
    assert torch.linalg.eigvalsh(shipped.covariance).min() > -1e-5
    by_count = shipped.about["real_images"]
    distances = [by_count[n] for n in sorted(by_count, key=int)]
    assert distances == sorted(distances, reverse=True)  # the bias of few images
