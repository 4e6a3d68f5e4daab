"""What images are compared with, and the numbers of the comparison.

Shapes: N images, D features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.features import Space
from eval.frechet import BROKEN, Reference, load_reference
from eval.gather import Gathered, How, gather
from eval.kid import kernel_distance, precision_recall
from eval.pictures import find_pictures
from src.files import to_json, write_atomically

METRICS = ("fid", "kid", "pr")


@dataclass(frozen=True)
class Known:
    """What images are compared with."""

    gaussian: Reference
    features: Tensor | None  # [N, D]


def save_statistics(path: Path, found: Gathered, about: dict[str, Any]) -> None:
    """Write `mu` [D] and `sigma` [D, D] in float64 as EDM does, and what they are of.

    With the `features` themselves, in float32, where they were kept.
    """
    mu, sigma = found.moments.mean.numpy(), found.moments.covariance.numpy()
    count, told = np.int64(found.moments.count), np.array(to_json(about))
    with write_atomically(path) as temp, temp.open("wb") as file:
        if len(found.features):
            features = found.features.numpy()
            np.savez(file, mu=mu, sigma=sigma, count=count, about=told, features=features)
        else:
            np.savez(file, mu=mu, sigma=sigma, count=count, about=told)


def load_known(path: Path, space: Space, with_features: bool) -> Known:
    """The statistics in an .npz, and the features if they are wanted.

    Raises ValueError for a broken file, one of other features, and one without the features.
    """
    if path.suffix != ".npz":
        raise ValueError(f"--ref {path} is no .npz, folder or zip: make one by eval.fid ref")
    gaussian = load_reference(path)
    told = gaussian.about.get("features", space.about)
    if told != space.about:
        raise ValueError(f"{path} holds other features ({told}) than --features {space.name}")
    if not with_features:
        return Known(gaussian, None)
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            features = torch.from_numpy(file["features"]) if "features" in file else None
    except BROKEN as error:
        raise ValueError(f"{path} holds no reference statistics ({error})") from error
    if features is None:
        fix = "give a folder or zip as --ref, or make it by eval.fid ref --keep_features"
        raise ValueError(f"{path} holds no features, which kid and pr need: {fix}")
    return Known(gaussian, features)


def known_of(place: Path, space: Space, how: How) -> Known:
    """What images are compared with: an .npz, or the images of a folder or zip."""
    if not place.is_dir() and place.suffix not in (".zip", ".json"):
        return load_known(place, space, how.keep)
    found = gather(find_pictures(place), space, how)
    gaussian = Reference(found.moments.count, found.moments.mean, found.moments.covariance, {})
    return Known(gaussian, found.features if how.keep else None)


def compared(
    found: Gathered, known: Known, metrics: tuple[str, ...], device: torch.device
) -> dict[str, Any]:
    """The numbers by their names; ValueError for features of other sizes and too few images."""
    size, other = len(found.moments.mean), len(known.gaussian.mean)
    if size != other:
        raise ValueError(f"the images have {size} features, the reference {other}")
    numbers: dict[str, Any] = {}
    if "fid" in metrics:
        numbers["fid"] = known.gaussian.distance(found.moments)
    if known.features is None:
        return numbers
    mine, theirs = found.features.to(device), known.features.to(device)
    if "kid" in metrics:
        kid = kernel_distance(mine, theirs)
        numbers |= {"kid": kid.value, "kid_95": [kid.low, kid.high]}
    if "pr" in metrics:
        numbers["precision"], numbers["recall"] = precision_recall(mine, theirs)
    return numbers
