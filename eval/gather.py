"""Features of pictures: over ranks, in small parts that are kept, without what cannot be read.

Shapes: N pictures, D features.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.features import Space
from eval.frechet import BROKEN, Moments, merged, moments
from eval.pictures import Pictures, read_batches
from src import ranks
from src.files import from_json, to_json, write_atomically

PART = 256
"""Pictures of a part: the unit that ranks share and that is kept, whatever the batch."""


@dataclass(frozen=True)
class Gathered:
    """What is known of pictures."""

    moments: Moments
    features: Tensor  # [N, D] float32, in the order of the pictures; [0, D] if not asked for
    bad: dict[str, str]  # why, by the name of what could not be read


@dataclass(frozen=True)
class How:
    """How pictures are read."""

    batch: int = 64
    skip_bad: bool = False
    cache: Path | None = None  # where the features of finished parts are kept
    keep: bool = False  # also hand out the features


Part = tuple[Tensor, dict[str, str]]
"""Features [n, D] of a part, and what could not be read."""


def gather(pictures: Pictures, space: Space, how: How) -> Gathered:
    """The statistics of all pictures, on every rank, and their features if `how` asks for them.

    Raises ValueError, on every rank, for pictures that cannot be read or have features that are
    not finite (unless `how` skips them), and where fewer than 2 are left.
    """
    mine: dict[int, Tensor] = {}
    bad: dict[str, str] = {}
    seen: Moments | None = None
    failed = ""
    try:
        for start, (features, left_out) in parts(pictures, space, how):
            bad |= left_out
            if len(features):
                new = moments(features)
                seen = new if seen is None else merged(seen, new)
                mine |= {start: features} if how.keep else {}
    except ValueError as error:
        failed = str(error)
    raise_together(failed)
    return together(pictures, seen, mine, bad)


def raise_together(failed: str) -> None:
    """ValueError on every rank, if any failed: no rank waits for one that has gone."""
    reasons = [reason for reason in ranks.gather_objects(failed) if reason]
    if reasons:
        raise ValueError(reasons[0])


def on_first(work: Callable[[], None]) -> None:
    """Do the work on the first rank; what is wrong there is a ValueError on all."""
    failed = ""
    if ranks.is_first():
        try:
            work()
        except (ValueError, OSError) as error:
            failed = str(error)
    raise_together(failed)


def together(
    pictures: Pictures, seen: Moments | None, mine: dict[int, Tensor], bad: dict[str, str]
) -> Gathered:
    """What all ranks know."""
    found = ranks.gather_objects((seen, mine, bad))
    known = [part for part, _, _ in found if part]
    left_out = {name: why for _, _, reasons in found for name, why in reasons.items()}
    if sum(part.count for part in known) < 2:
        unread = f" ({len(left_out)} could not be read)" if left_out else ""
        raise ValueError(f"{pictures.place} has fewer than 2 images to measure{unread}")
    by_start = {start: t for _, features, _ in found for start, t in features.items()}
    total = reduce(merged, known)
    ordered = [by_start[start] for start in sorted(by_start)]
    empty = torch.empty(0, len(total.mean))
    return Gathered(total, torch.cat(ordered) if ordered else empty, left_out)


def parts(pictures: Pictures, space: Space, how: How) -> Iterator[tuple[int, Part]]:
    """The parts of this rank, each with the place of its first picture."""
    starts = ranks.share(range(0, len(pictures.items), PART))
    with tqdm(total=len(starts) * PART, unit="image", disable=None) as bar:
        for start in starts:
            which = range(start, min(start + PART, len(pictures.items)))
            yield start, part(pictures, which, space, how)
            bar.update(PART)


def part(pictures: Pictures, which: Sequence[int], space: Space, how: How) -> Part:
    """The features of a part: kept ones, or new ones, which are kept."""
    file = how.cache / f"{key(pictures, which, space)}.npz" if how.cache else None
    kept = read_part(file) if file else None
    if kept and (how.skip_bad or not kept[1]):
        return kept
    new = extract(pictures, which, space, how)
    if file:
        write_part(file, new)
    return new


def extract(pictures: Pictures, which: Sequence[int], space: Space, how: How) -> Part:
    """The features of the pictures `which` can be read, in their order."""
    bad: dict[str, str] = {}
    found: dict[int, Tensor] = {}
    skipped = bad if how.skip_bad else None
    for alike in read_batches(pictures, which, batch=how.batch, bad=skipped):
        features = checked(space.extract(alike.images / 255), len(alike.which), space)
        for i, row in zip(alike.which, features, strict=True):
            if row.isfinite().all():
                found[i] = row
            elif how.skip_bad:
                bad[pictures.items[i].name] = "its features are not finite"
            else:
                name = pictures.place / pictures.items[i].name
                raise ValueError(f"the features of {name} are not finite (NaN or infinity)")
    rows = [found[i] for i in sorted(found)]
    return (torch.stack(rows) if rows else torch.empty(0, 0)), bad


def checked(features: Tensor, count: int, space: Space) -> Tensor:
    """Features [N, D] in float32 on the CPU; ValueError for another shape."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{space.name} must return features [{count}, D], not {got}")
    return features.detach().float().cpu()


def key(pictures: Pictures, which: Sequence[int], space: Space) -> str:
    """A name that changes with the files, the features and the network."""
    files = [(pictures.items[i].name, pictures.stamp(pictures.items[i])) for i in which]
    told = to_json([str(pictures.place.resolve()), files, space.about, space.weights])
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def write_part(path: Path, new: Part) -> None:
    """Keep a part, whole or not at all."""
    with write_atomically(path) as temp, temp.open("wb") as file:
        np.savez(file, features=new[0].numpy(), bad=np.array(to_json(new[1])))


def read_part(path: Path) -> Part | None:
    """A part that was kept; None where there is none, or a broken one."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return torch.from_numpy(file["features"]), from_json(str(file["bad"]), str(path))
    except BROKEN:
        return None
