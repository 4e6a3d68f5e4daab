"""The Frechet distance between two sets of images, by the Gaussians of their features.

Heusel et al. 2017, arXiv:1706.08500, Eq. 6, with the features of `eval.features`. The distance
grows as images get fewer, so figures compare only at one number of images.

    python -m eval.frechet samples/fashion-mnist-32/heun_nfe127

Shapes: N features of D numbers each.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.pictures import Pictures, find_pictures, read_batches
from rewards.efficientnet import load_features
from src.files import to_json, write_atomically
from src.options import Device, OneLineCommand, one_line_errors

SHIPPED = Path(__file__).resolve().parent.parent / "src/models/fashion-mnist-32/test-features.npz"
READ_AT_ONCE = 64

BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy raises on a file that is no whole .npz of these arrays."""

Extractor = Callable[[Tensor], Tensor]
"""Images [N, C, H, W] in [0, 1] -> features [N, D]."""


@dataclass(frozen=True)
class Moments:
    """Running statistics in float64: any split into batches gives the same, to rounding."""

    count: int
    mean: Tensor  # [D]
    scatter: Tensor  # [D, D], the sum of (f - mean)(f - mean)^T

    @property
    def covariance(self) -> Tensor:
        """[D, D], the unbiased one; ValueError for fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more, not {self.count}")
        return self.scatter / (self.count - 1)


def moments(features: Tensor) -> Moments:
    """The statistics of features [N, D], N >= 1. ValueError for NaN and infinity."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"statistics need features [N, D], not {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("the features hold NaN or infinity")
    wide = features.double()
    mean = wide.mean(0)
    centred = wide - mean
    return Moments(len(wide), mean, centred.T @ centred)


def merged(a: Moments, b: Moments) -> Moments:
    """The statistics of two sets together (Chan, Golub & LeVeque 1979, Eq. 2.1)."""
    count = a.count + b.count
    apart = b.mean - a.mean
    between = torch.outer(apart, apart) * (a.count * b.count / count)
    return Moments(count, a.mean + apart * (b.count / count), a.scatter + b.scatter + between)


def all_moments(batches: Iterable[Tensor]) -> Moments:
    """The statistics of batches of features [N, D]; ValueError where there are none."""
    parts = (moments(features) for features in batches if len(features))
    first = next(parts, None)
    if first is None:
        raise ValueError("there are no images to measure")
    return reduce(merged, parts, first)


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), mu [D], sigma [D, D].

    With sigma1 = R R^T, the eigenvalues of sigma1 sigma2 are those of R^T sigma2 R, which is
    symmetric and >= 0: no matrix root, nothing complex, and singular covariances will do.
    Raises ValueError for sizes that differ and numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(t, dtype=torch.float64) for t in (mu1, sigma1, mu2, sigma2)
    )
    d = len(mu1)
    sizes = [list(t.shape) for t in (mu1, sigma1, mu2, sigma2)]
    if sizes != [[d], [d, d]] * 2:
        raise ValueError(f"the Gaussians have the sizes {sizes}, not [D], [D, D] twice")
    if not all(t.isfinite().all() for t in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold NaN or infinity")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt()
    product = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace = sigma1.trace() + sigma2.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + trace).item())


@dataclass(frozen=True)
class Reference:
    """The Gaussian that images are measured against, and what it was made from."""

    count: int | None  # None where the file does not say
    mean: Tensor  # [D] float64
    covariance: Tensor  # [D, D] float64
    about: dict[str, Any]

    def distance(self, other: Moments) -> float:
        """The Frechet distance from here to these images."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def save_reference(path: Path, images: Moments, about: dict[str, Any]) -> None:
    """Write the mean in float64 and the covariance's upper triangle in float32, compressed."""
    d = len(images.mean)
    upper = images.covariance[torch.triu_indices(d, d).unbind()].float()
    with write_atomically(path) as temp, temp.open("wb") as file:
        np.savez_compressed(
            file,
            count=np.int64(images.count),
            mean=images.mean.numpy(),
            upper=upper.numpy(),
            about=np.array(to_json(about)),
        )


def load_reference(path: Path) -> Reference:
    """Read such a file, or EDM's (mu, sigma); ValueError, in one line, for a broken one."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not isinstance(file, Mapping):
                raise ValueError("a single array")
            count = int(file["count"]) if "count" in file else None
            about = json.loads(str(file["about"])) if "about" in file else {}
            if "sigma" in file:
                mean, covariance = (torch.from_numpy(file[n]).double() for n in ("mu", "sigma"))
            else:
                mean = torch.from_numpy(file["mean"]).double()
                covariance = full(torch.from_numpy(file["upper"]).double(), len(mean))
    except FileNotFoundError as error:
        raise ValueError(
            f"no reference statistics at {path}: see python -m eval.reference"
        ) from error
    except BROKEN as error:
        raise ValueError(f"{path} holds no reference statistics ({error})") from error
    check_reference(mean, covariance, count, path)
    return Reference(count, mean, covariance, about)


def check_reference(mean: Tensor, covariance: Tensor, count: int | None, path: Path) -> None:
    """ValueError where the parts of a file do not fit, or are not finite."""
    sizes = f"{list(mean.shape)} and {list(covariance.shape)}"
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: a mean and a covariance of the sizes {sizes} do not fit")
    if count is not None and count < 2:
        raise ValueError(f"{path}: statistics of {count} images have no covariance")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path}: the statistics hold NaN or infinity")


def full(upper: Tensor, d: int) -> Tensor:
    """The symmetric matrix [D, D] of an upper triangle; ValueError for another size."""
    if upper.shape != (d * (d + 1) // 2,):
        raise ValueError(f"an upper triangle of {list(upper.shape)} numbers for {d} features")
    matrix = torch.zeros(d, d, dtype=torch.float64)
    rows, columns = torch.triu_indices(d, d).unbind()
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix


def folder_moments(pictures: Pictures, extract: Extractor) -> Moments:
    """The statistics of pictures, which may differ in size; with a progress bar."""

    def features() -> Iterator[Tensor]:
        with tqdm(total=len(pictures.items), unit="image", disable=None) as bar:
            for alike in read_batches(pictures, range(len(pictures.items)), batch=READ_AT_ONCE):
                yield extract(alike.images / 255)
                bar.update(len(alike.which))

    return all_moments(features())


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.argument("place", type=click.Path(path_type=Path, exists=True))
@click.option("--reference", type=click.Path(path_type=Path), default=SHIPPED, help="An .npz.")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(place: Path, reference: Path, device: torch.device) -> None:
    """Print the Frechet distance of a folder of images, or of what its samples.json lists.

    \b
    python -m eval.frechet samples/fashion-mnist-32/heun_nfe127
    python -m eval.frechet my-images --reference my-statistics.npz
    """  # noqa: D301 - click's mark for lines to keep
    known = load_reference(reference)
    found = folder_moments(find_pictures(place), load_features(device))
    distance = known.distance(found)
    click.echo(
        f"Frechet distance {distance:.4f} of {found.count} images to the {known.count} of "
        f"{reference.name} (it falls as images get more: compare at one number only)"
    )


if __name__ == "__main__":
    main()
