"""Fashion-MNIST as tensors (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; MIT licence)."""

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images [N, 1, 32, 32] in [-1, 1], padded with black from 28x28, and classes [N].

    split is train or t10k. ValueError where the data are not there.
    """
    try:
        images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:, None]
        labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()
    except FileNotFoundError as error:
        hint = "apt install dataset-fashion-mnist"
        raise ValueError(f"no Fashion-MNIST in {folder}: {hint}") from error
    return F.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0), labels


def rows_of(step: int, images: int, batch: int, seed: int) -> Tensor:
    """Which images [batch] a step takes: every epoch all of them, in an order of its own."""
    epoch, place = divmod(step, images // batch)
    order = torch.randperm(images, generator=Generator().manual_seed(seed * 100_003 + epoch))
    return order[place * batch :][:batch]


def _read_idx(path: Path) -> Tensor:
    """Return the bytes of a gzipped IDX file, in the shape that its header says."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    return torch.frombuffer(bytearray(raw[4 + 4 * ndim :]), dtype=torch.uint8).reshape(shape)
