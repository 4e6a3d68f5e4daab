"""Write the reference statistics of the shipped model's test set, and what real images score.

Needs the data, which nothing else here does: Debian's package dataset-fashion-mnist.

    python -m eval.reference
"""

import gzip
import math
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from eval.features import EFFICIENTNET as ABOUT
from eval.frechet import SHIPPED, Moments, Reference, all_moments, load_reference, save_reference
from eval.machine import provenance
from rewards.efficientnet import PACKAGES, Features, load_features
from src.images import grid, read_png, save_png
from src.options import OneLineCommand, one_line_errors

DATA = Path("/usr/share/datasets/fashion-mnist")
PAD = 2
SHIPPED_REAL = 1000
REAL_IMAGES = SHIPPED.parent / "real-images.png"
COLUMNS = 40
REAL_COUNTS = (50, 100, 128, 200, 256, 500, 1000, 2000, 5000, 10_000)
"""The numbers of training images whose distance to the test set is recorded."""


def read_images(path: Path) -> Tensor:
    """A gzipped IDX file of grey images -> [N, 1, H, W] in [0, 1]. ValueError for another."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: {error}: apt install dataset-fashion-mnist?") from error
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in (4, 8, 12)]
    if raw[:4] != b"\0\0\x08\x03" or len(raw) != 16 + math.prod(shape):
        raise ValueError(f"{path} is no IDX file of images")
    return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(shape)[:, None] / 255


def padded(images: Tensor) -> Tensor:
    """28x28 -> 32x32 with black, as the model makes them."""
    return F.pad(images, (PAD, PAD, PAD, PAD))


def real_images(count: int) -> Tensor | None:
    """The first `count` shipped real images [N, 1, 32, 32] in [0, 1]; None if they are fewer."""
    if count > SHIPPED_REAL or not REAL_IMAGES.is_file():
        return None
    picture, _ = read_png(REAL_IMAGES)
    side = picture.shape[2] // COLUMNS
    tiles = picture.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)
    return padded(tiles[:count])


def extract_all(images: Tensor, features: Features, what: str) -> Tensor:
    """The features [N, 1280] of images [N, 1, 28, 28], with a bar."""
    parts = tqdm(padded(images).split(100), desc=what)
    return torch.cat([features(part) for part in parts])


def real_distances(real: Tensor, reference: Reference) -> dict[str, float]:
    """The distance of the first n real images' features to the reference, by n."""
    counts = [n for n in REAL_COUNTS if n <= len(real)]
    return {str(n): reference.distance(all_moments([real[:n]])) for n in counts}


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), default=DATA, help="The IDX files.")
@click.option("--outdir", type=click.Path(path_type=Path), default=SHIPPED.parent)
@one_line_errors
def main(data: Path, outdir: Path) -> None:
    """Measure the 10,000 test images, and 10,000 training images against them.

    Writes test-features.npz, with the distances of real images in its `about`, and
    real-images.png, the first 1000 of those training images, for the demo's row of real ones.
    """
    features = load_features()
    train = read_images(data / "train-images-idx3-ubyte.gz")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    chosen = train[order[: max(REAL_COUNTS)]]
    test = extract_all(read_images(data / "t10k-images-idx3-ubyte.gz"), features, "test")
    real = extract_all(chosen, features, "train")
    target = outdir / SHIPPED.name
    statistics = all_moments(test.split(1000))
    about = described(statistics)
    save_reference(target, statistics, about)
    distances = real_distances(real, load_reference(target))
    save_reference(target, statistics, about | {"real_images": distances})
    save_png(outdir / REAL_IMAGES.name, grid(chosen[:SHIPPED_REAL], COLUMNS))
    for n, distance in distances.items():
        click.echo(f"{n:>6} training images: Frechet distance {distance:.4f}")
    click.echo(f"wrote {target} and {outdir / REAL_IMAGES.name}")


def described(statistics: Moments) -> dict[str, Any]:
    """What the file says of itself."""
    return {
        "images": f"the {statistics.count} test images of Fashion-MNIST (Debian "
        f"dataset-fashion-mnist), 28x28 padded with black to 32x32",
        "features": ABOUT,
        "packages": PACKAGES,
        "real_images_are": "the first n of the training images, in an order drawn by seed 0",
        "made_by": "python -m eval.reference",
        **provenance(torch.device("cpu")),
    }


if __name__ == "__main__":
    main()
