"""Teacher trajectories: once per batch of seeds, kept in memory or in a cache on the disk.

Shapes: B samples, N intervals of the student, * one sample, x [B, *]. The state is float32 at
least, whatever the network's own dtype.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.field import Field
from solvers.sampler import Sampler
from src.runs import read_sealed, write_sealed
from training.student import Trajectories

ENTRY = re.compile(r"[0-9a-f]{40}\.pt")


@dataclass(frozen=True)
class Teacher:
    """A sampler on a fine grid, and the levels of that grid whose states are targets."""

    sampler: Sampler
    stops: tuple[float, ...]

    @torch.no_grad()
    def targets(self, slope: Field, x: Tensor) -> tuple[Tensor, ...]:
        """The states [B, *] at the stops, on the CPU, from x at the first level; no graph."""
        trajectory = self.sampler.states(slope, x)
        by_level = zip(self.sampler.sigmas[1:], trajectory, strict=True)
        kept = [state for level, state in by_level if level in self.stops]
        return torch.stack(kept).cpu().unbind()  # a GPU is waited for once


@dataclass(frozen=True)
class Cache:
    """Trajectories on the disk: one sealed file each, the oldest going when there are too many.

    What a trajectory depends on is its key and lies in the file as well. `say` hears of every
    file that is damaged, and made again. Raises ValueError where the folder cannot be used.
    """

    folder: Path
    max_bytes: int = 4 << 30
    say: Callable[[str], object] = lambda _text: None

    def __post_init__(self) -> None:
        probe = self.folder / ".writable.pt"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the teacher cache {self.folder} is a file: give a folder")
        write_sealed(probe, {})
        probe.unlink(missing_ok=True)

    def get(
        self, about: Mapping[str, Any], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The trajectory of this key, from the disk or made now; on the CPU."""
        key = json.dumps(about, sort_keys=True, allow_nan=False)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.pt"
        if path.exists():
            try:
                content = read_sealed(path)
                if content.get("key") == key and isinstance(content.get("states"), list):
                    with contextlib.suppress(FileNotFoundError):  # it may just have been dropped
                        os.utime(path)
                    return tuple(content["states"])
                self.say(f"{path} is of another run: making it again")
            except ValueError as error:
                self.say(f"{error}: making it again")
        targets = make()
        write_sealed(path, {"key": key, "states": list(targets)})
        self.evict()
        return targets

    def evict(self) -> None:
        """Drop what was not used for longest until the rest fits."""
        entries = []
        for path in self.folder.glob("*.pt"):
            if not ENTRY.fullmatch(path.name):  # half written by another rank, or not ours
                continue
            with contextlib.suppress(FileNotFoundError):  # another rank's work
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        size = sum(entry[1] for entry in entries)
        for _, bytes_, path in sorted(entries):
            if size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


@dataclass(frozen=True)
class Batches(Sequence[Trajectories]):
    """Batches by their seeds, with where the teacher takes them.

    Targets are made when first asked for, then kept in the CPU's memory; with a cache they are
    read from the disk each time instead, and take no memory. `levels` are those of the
    teacher's stops that are wanted, if not all.
    """

    start: Callable[[Sequence[int]], tuple[Field, Tensor]]  # seeds -> field, x [B, *]
    teacher: Teacher
    parts: tuple[tuple[int, ...], ...]
    about: Mapping[str, Any] = field(default_factory=dict)  # what a target depends on but seeds
    cache: Cache | None = None
    levels: tuple[float, ...] | None = None
    kept: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.one(part) for part in self.parts[index]]
        return self.one(self.parts[index])

    def __iter__(self) -> Iterator[Trajectories]:
        return map(self.one, self.parts)

    def one(self, seeds: tuple[int, ...]) -> Trajectories:
        """The batch of some seeds, its targets on the device of x."""
        slope, x = self.start(seeds)
        if self.cache:
            about = {**self.about, "seeds": list(seeds)}
            targets = self.cache.get(about, lambda: self.teacher.targets(slope, x))
        else:
            if seeds not in self.kept:
                self.kept[seeds] = self.teacher.targets(slope, x)
            targets = self.kept[seeds]
        if self.levels is not None:
            at = dict(zip(self.teacher.stops, targets, strict=True))
            targets = tuple(at[level] for level in self.levels)
        return Trajectories(slope, x, torch.stack(targets).to(x.device).unbind(), seeds)


def in_parts(seeds: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Seeds in runs of at most `size`."""
    return tuple(tuple(seeds[i : i + size]) for i in range(0, len(seeds), size))


def fingerprint(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names."""
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        total.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
        total.update(digest.digest())
    return total.hexdigest()
