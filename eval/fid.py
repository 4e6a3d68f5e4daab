"""FID and its kin of a folder or a zip of images, compatible with EDM's fid.py.

    python -m eval.fid ref --data dataset.zip --dest dataset.npz
    python -m eval.fid calc --images samples --ref dataset.npz --num 50000
    torchrun --nproc_per_node=2 -m eval.fid calc --images samples --ref dataset.npz

FID is the Frechet distance (Heusel et al. 2017, arXiv:1706.08500, Eq. 6) in the features of
Inception; other features make other distances, which compare with nothing but themselves. The
distance falls as images get more, so figures compare only at one number of images.

Shapes: N (or M) images, D features.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from eval.features import SPACES, FeatureSpace, load_space
from eval.machine import provenance
from eval.pictures import Pictures, find_pictures, read_batches, subset
from src import ranks
from src.files import check_writable, nearest, to_json, write_atomically, write_json
from src.options import Device, Names, OneLineCommand, OneLineGroup
from src.stats import Estimate

METRICS = {"fid": 2, "kid": 3, "pr": 4}
"""What is measured, and how many images of each set that needs."""
ROWS = 1024  # of a block of pairs; memory is ROWS times the larger set
NORMAL_95 = 1.959963984540054
BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(zipfile.BadZipFile, zlib.error, MemoryError, ArithmeticError, RecursionError),
)
"""What numpy raises on a file that is no whole .npz of these arrays."""
PACKED = 20
"""How many times its size a file of statistics may unpack to."""


@dataclass(frozen=True)
class Statistics:
    """The Gaussian of a set's features in float64, and the features where they were kept."""

    count: int  # 0 where a file does not say
    mean: Tensor  # [D]
    covariance: Tensor  # [D, D], the unbiased one; of one image zeros
    about: Mapping[str, Any] = field(default_factory=dict)
    features: Tensor | None = None  # [N, D] float32

    def distance(self, other: "Statistics") -> float:
        """The Frechet distance to another set. ValueError for another number of features."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def measure_pictures(
    pictures: Pictures,
    space: FeatureSpace,
    *,
    batch: int,
    keep: bool,
    least: int = 2,
    size: int = 0,
) -> Statistics:
    """The statistics of all pictures, on every rank; `keep` keeps their features.

    Otherwise memory does not grow with the pictures. Raises ValueError, on every rank, for
    pictures that cannot be read or have features that are not finite, for fewer than `least`, and
    for other than `size` features, where a size is given.
    """
    if len(pictures.items) < least:
        raise ValueError(f"{pictures.place} has fewer than {least} images to measure")
    mine: Statistics | None = None
    kept: dict[int, Tensor] = {}
    which = ranks.share(range(len(pictures.items)))
    with ranks.together(), ranks.progress(len(which), "image") as bar:
        for alike in read_batches(pictures, which, batch=batch):
            features = space(alike.images / 255)
            for at in (~features.isfinite().all(1)).nonzero()[:1, 0].tolist():
                name = pictures.place / pictures.items[alike.which[at]].name
                raise ValueError(f"the features of {name} are not finite (NaN or infinity)")
            if size not in (0, features.shape[1]):
                said = f"the images have {features.shape[1]} features"
                raise ValueError(f"{said}, the reference {size}")
            new = statistics_of(features)
            mine = merged(mine, new) if mine else new
            if keep:  # rows of their own: a view is pickled with all that it is a view of
                kept |= {i: row.clone() for i, row in zip(alike.which, features, strict=True)}
            bar.update(len(alike.which))
    shares = ranks.of_each_rank((mine, kept))
    total = reduce(merged, [share for share, _ in shares if share])
    rows = {i: row for _, some in shares for i, row in some.items()}
    features = torch.stack([rows[i] for i in sorted(rows)]) if keep else None
    about = {"features": space.about, "version": space.version, "images": str(pictures.place)}
    return replace(total, about=about, features=features)


def statistics_of(features: Tensor) -> Statistics:
    """The statistics of features [N, D], N >= 1. ValueError for NaN and infinity."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"statistics need features [N, D], not {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("the features hold NaN or infinity")
    wide = features.double()
    mean = wide.mean(0)
    centred = wide - mean
    return Statistics(len(wide), mean, centred.T @ centred / max(len(wide) - 1, 1))


def merged(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of two sets together (Chan, Golub & LeVeque 1979, Eq. 2.1).

    ValueError for features of two sizes, as a function that does not pool gives of two sizes of
    images.
    """
    if len(a.mean) != len(b.mean):
        both = f"{len(a.mean)} features of one image, {len(b.mean)} of another"
        raise ValueError(f"{both}: make the images of one size, or let the features pool")
    count, apart = a.count + b.count, b.mean - a.mean
    scatter = torch.outer(apart, apart) * (a.count * b.count / count)
    scatter += a.covariance * (a.count - 1) + b.covariance * (b.count - 1)
    return Statistics(count, a.mean + apart * (b.count / count), scatter / (count - 1))


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), mu [D], sigma [D, D].

    With sigma1 = R R^T, the eigenvalues of sigma1 sigma2 are those of R^T sigma2 R, which is
    symmetric and >= 0: no matrix root, nothing complex, and singular covariances will do.
    Raises ValueError for sizes that differ and numbers that are not finite.
    """
    parts = [torch.as_tensor(t, dtype=torch.float64) for t in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = parts
    d = len(mu1)
    sizes = [list(t.shape) for t in parts]
    if sizes != [[d], [d, d]] * 2:
        raise ValueError(f"the Gaussians have the sizes {sizes}, not [D], [D, D] twice")
    if not all(t.isfinite().all() for t in parts):
        raise ValueError("the statistics hold NaN or infinity")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt()
    product = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace = sigma1.trace() + sigma2.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + trace).item())


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """KID (Binkowski et al. 2018, arXiv:1801.01401) of features x [M, D], y [N, D], M, N >= 3.

    The squared maximum mean discrepancy under k(a, b) = (a . b / D + 1)^3, as the unbiased
    U-statistic over all pairs, where the published code averages it over random subsets: the
    same expectation with less noise, and nothing drawn. It may fall below zero. The interval is
    normal, by the jackknife over the images of both sets, whose variance is not too small in
    expectation (Efron & Stein 1981). Raises ValueError for fewer images.
    """
    x, y = _pair(x, y, 3)
    m, n = len(x), len(y)

    def sums(a: Tensor, b: Tensor) -> Tensor:
        parts = a.split(ROWS)
        return torch.cat([((part @ b.T / a.shape[1] + 1) ** 3).sum(1) for part in parts])

    xx, yy = (sums(a, a) - (a.square().sum(1) / a.shape[1] + 1) ** 3 for a in (x, y))
    xy, yx = sums(x, y), sums(y, x)
    within_x, within_y, between = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * between / (m * n)
    less_x = (within_x - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (between - xy) / ((m - 1) * n)
    less_y = (within_y - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (between - yx) / (m * (n - 1))
    spread = sum((t - t.mean()).square().sum() * (1 - 1 / len(t)) for t in (less_x, less_y))
    half = NORMAL_95 * float(spread) ** 0.5
    return Estimate(value.item(), value.item() - half, value.item() + half)


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """The shares of generated images near real ones, and of real ones near generated ones.

    Near is within the ball of one of the others, which reaches its k-th nearest neighbour in
    its own set (Kynkaanniemi et al. 2019, arXiv:1904.06991). generated [M, D], real [N, D].
    Raises ValueError for k images or fewer.
    """
    generated, real = _pair(generated, real, k + 1)

    def covered(x: Tensor, y: Tensor) -> float:
        # the nearest of all is the image itself
        balls = torch.cat([torch.cdist(p, y).kthvalue(k + 1, 1).values for p in y.split(ROWS)])
        inside = sum(int((torch.cdist(p, y) <= balls).any(1).sum()) for p in x.split(ROWS))
        return inside / len(x)

    return covered(generated, real), covered(real, generated)


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64; ValueError unless they are features of one size, finite, `least` each."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features {list(x.shape)} and {list(y.shape)} are of two kinds")
    if min(len(x), len(y)) < least:
        raise ValueError(f"this needs {least} images of each set, not {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the features hold NaN or infinity")
    return x.double(), y.double()


def save_statistics(path: Path, images: Statistics) -> None:
    """Write `mu` [D] and `sigma` [D, D] in float64 as EDM does, and what they are of.

    ValueError where the file cannot be written.
    """
    arrays: dict[str, Any] = {"mu": images.mean.numpy(), "sigma": images.covariance.numpy()}
    arrays |= {"count": np.int64(images.count), "about": np.array(to_json(dict(images.about)))}
    if images.features is not None:
        arrays["features"] = images.features.numpy()
    with write_atomically(path) as temp, temp.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: Path) -> Statistics:
    """The statistics in an .npz, ours or EDM's (mu, sigma alone).

    Raises ValueError, in one line, for a file that is missing or broken, or whose parts do not
    fit.
    """
    if not path.is_file():
        raise ValueError(f"no reference statistics at {path}: make them by python -m eval.fid ref")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(e.file_size for e in archive.infolist()) > PACKED * path.stat().st_size:
                raise ValueError("it unpacks to far more than it holds")
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not isinstance(file, Mapping):
                raise ValueError("a single array")
            count = int(file["count"]) if "count" in file else 0
            about = json.loads(str(file["about"])) if "about" in file else {}
            mean, sigma = (torch.from_numpy(file[name]) for name in ("mu", "sigma"))
            if mean.is_complex() or sigma.is_complex():
                raise ValueError("complex numbers")
            mean, sigma = mean.double(), sigma.double()
            features = torch.from_numpy(file["features"]) if "features" in file else None
            if not isinstance(about, dict) or count < 0:
                raise ValueError("of something else")
    except BROKEN as error:
        # NumPy's words are: read it unsafely
        why = error if zipfile.is_zipfile(path) else "it is no .npz"
        raise ValueError(f"{path} holds no reference statistics ({why})") from error
    if mean.ndim != 1 or not len(mean) or sigma.shape != (len(mean), len(mean)):
        sizes = f"{list(mean.shape)} and {list(sigma.shape)}"
        raise ValueError(f"{path}: a mean and a covariance of the sizes {sizes} do not fit")
    if count == 1:
        raise ValueError(f"{path}: the statistics of one image have no covariance")
    if not (mean.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{path}: the statistics hold NaN or infinity")
    rounding = 1e-3 * sigma.abs().max()
    if (sigma - sigma.T).abs().max() > rounding or sigma.diag().min() < -rounding:
        raise ValueError(f"{path}: its sigma is no covariance, symmetric and not below 0")
    return Statistics(count, mean, sigma, about, features)


def check_space(path: Path, statistics: Statistics, space: FeatureSpace) -> None:
    """ValueError where a file says that its features are not those of this space."""
    features = statistics.about.get("features", space.about)
    if features != space.about:
        raise ValueError(f"{path} holds other features ({features}) than --features {space.name}")
    if statistics.about.get("version", space.version) != space.version:
        fix = "make it again by python -m eval.fid ref"
        raise ValueError(f"{path} is of {space.name} as it was with other weights or code: {fix}")


def reference_of(
    place: Path, space: FeatureSpace, *, batch: int, keep: bool, least: int
) -> Statistics:
    """What images are held against: an .npz, or the images of a folder or zip.

    Raises ValueError for a file of other features, and where it has none to `keep`.
    """
    if place.is_dir() or place.suffix in (".zip", ".json"):
        pictures = find_pictures(place)
        return measure_pictures(pictures, space, batch=batch, keep=keep, least=least)
    reference = load_statistics(place)
    check_space(place, reference, space)
    if keep and reference.features is None:
        fix = "give a folder or zip as --ref, or make it by eval.fid ref --keep_features"
        raise ValueError(f"{place} holds no features, which kid and pr need: {fix}")
    return reference


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that both have."""
    spaces = f"{', '.join(SPACES)} or MODULE:NAME."
    command = click.option("--device", type=Device(), default="auto")(command)
    size = click.option("--batch", type=click.IntRange(1), default=64, help="Images read at once.")
    weights = click.option("--weights", type=click.Path(path_type=Path), help="Of the features.")
    return click.option("--features", default="inception", help=spaces)(weights(size(command)))


@click.group(cls=OneLineGroup)
def main() -> None:
    """FID and its kin, with the sub-commands and numbers of EDM's fid.py."""


def least_of(metrics: Sequence[str]) -> int:
    """How many images of each set these metrics need; ValueError for none, and an unknown one."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"no metric '{name}': did you mean {nearest(name, METRICS)}?")
    if not metrics:
        raise ValueError(f"--metrics names none: choose from {', '.join(METRICS)}")
    return max(METRICS[name] for name in metrics)


@main.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder or zip.")
@click.option("--ref", type=click.Path(path_type=Path), required=True, help=".npz, folder, zip.")
@click.option("--num", type=click.IntRange(2), help="How many; fewer are an error. Default: all.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Draws them where there are more.")
@click.option("--metrics", type=Names(), default="fid", help="Of fid,kid,pr.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON with the numbers.")
@reading_options
def calc(images: Path, ref: Path, metrics: list[str], **options: Any) -> None:
    """Compare images with reference statistics, or with images.

    \b
    python -m eval.fid calc --images samples --ref cifar10-32x32.npz --num 50000
    python -m eval.fid calc --images a --ref b --features efficientnet --metrics fid,kid,pr
    python -m eval.fid calc --images a --ref b --features dinov2 --weights dinov2-large
    """  # noqa: D301
    least = least_of(metrics)
    pictures = subset(find_pictures(images), options["num"], options["seed"])
    if len(pictures.items) < least:
        said = f"--metrics {','.join(metrics)} needs {least} images, not {len(pictures.items)}"
        raise ValueError(f"{said}: give more in {images}, or raise --num")
    if options["out"]:
        check_writable(options["out"])
    device = ranks.init(options["device"])
    space = load_space(options["features"], device, options["weights"])
    how = {"batch": options["batch"], "keep": metrics != ["fid"]}
    reference = reference_of(ref, space, least=least, **how)
    measured = measure_pictures(pictures, space, size=len(reference.mean), **how)

    def report() -> None:
        count, size = measured.count, len(measured.mean)
        numbers: dict[str, Any] = {}
        if "fid" in metrics:
            numbers["fid"] = reference.distance(measured)
            name = "FID" if space.name == "inception" else f"Frechet distance ({space.name})"
            click.echo(f"{name} {numbers['fid']:.6g}")
        if measured.features is not None and reference.features is not None:
            features = measured.features.to(device), reference.features.to(device)
            if "kid" in metrics:
                kid = kernel_distance(*features)
                numbers |= {"kid": kid.value, "kid_95": [kid.low, kid.high]}
                click.echo(f"kid {kid.value:.6g}\nkid_95 {kid.low:.4g} to {kid.high:.4g}")
            if "pr" in metrics:
                numbers["precision"], numbers["recall"] = precision_recall(*features)
                click.echo("precision {precision:.6g}\nrecall {recall:.6g}".format(**numbers))
        click.echo(f"{count} images, {size} features ({space.name}), {ref}")
        if "fid" in metrics and count <= size:
            few = f"{count} images are not more than the {size} features"
            click.echo(f"{few}: it is far too high, compare at this number only", err=True)
        if options["out"]:
            about = {"images": str(images), "ref": str(ref), "features": space.about}
            about |= {"count": count, "ref_count": reference.count or None}
            write_json(options["out"], {**numbers, **about, **provenance(device)})

    ranks.on_first(report)
    ranks.close()


@main.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder or zip.")
@click.option("--dest", type=click.Path(path_type=Path), required=True, help="The .npz to write.")
@click.option("--keep_features", is_flag=True, help="For kid and pr: 8 KB an image.")
@reading_options
def ref(data: Path, dest: Path, **options: Any) -> None:
    """Write the reference statistics of a data set.

    \b
    python -m eval.fid ref --data cifar10-32x32.zip --dest cifar10-32x32.npz
    """  # noqa: D301
    if dest.suffix != ".npz":
        raise ValueError(f"--dest {dest} must end in .npz")
    pictures = find_pictures(data)
    device = ranks.init(options["device"])
    space = load_space(options["features"], device, options["weights"])
    how = {"batch": options["batch"], "keep": options["keep_features"]}
    check_writable(dest)
    measured = measure_pictures(pictures, space, **how)

    def save() -> None:
        save_statistics(dest, replace(measured, about={**measured.about, **provenance(device)}))
        click.echo(
            f"{measured.count} images, {len(measured.mean)} features ({space.name}), {dest}"
        )

    ranks.on_first(save)
    ranks.close()


if __name__ == "__main__":
    main()
