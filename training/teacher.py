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

from torch import Tensor

from solvers.field import Field
from solvers.integrate import Solver
from training.checkpoint import read_sealed, write_sealed
from training.distill import Batch, teacher_states

CHUNK = 1 << 20
ENTRY = re.compile(r"[0-9a-f]{40}\.pt")


@dataclass(frozen=True)
class Teacher:
    """A solver on a fine grid, and the levels of that grid whose states are targets."""

    solver: Solver
    sigmas: tuple[float, ...]
    stops: tuple[float, ...]

    def targets(self, slope: Field, x: Tensor) -> tuple[Tensor, ...]:
        """The states [B, *] at the stops, from x at the first level; no graph."""
        states = teacher_states(self.solver, slope, x, self.sigmas)
        by_level = zip(self.sigmas[1:], states, strict=True)
        return tuple(state for level, state in by_level if level in self.stops)


@dataclass(frozen=True)
class Cache:
    """Trajectories on the disk: one sealed file each, the oldest going when there are too many.

    What a trajectory depends on is its key and lies in the file as well. `say` hears of every
    file that is damaged, and made again.
    """

    folder: Path
    max_bytes: int = 4 << 30
    say: Callable[[str], object] = lambda _text: None

    def check(self) -> None:
        """ValueError, before any work, where the folder cannot be used."""
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
        states = self.read(path, key)
        if states is None:
            states = tuple(state.cpu() for state in make())
            write_sealed(path, {"key": key, "states": list(states)})
            self.evict()
        return states

    def read(self, path: Path, key: str) -> tuple[Tensor, ...] | None:
        """What a file holds; None where it is not there or not whole."""
        if not path.exists():
            return None
        try:
            content = read_sealed(path)
        except ValueError as error:
            self.say(f"{error}: making it again")
            return None
        if content.get("key") != key or not isinstance(content.get("states"), list):
            self.say(f"{path} is of another run: making it again")
            return None
        with contextlib.suppress(FileNotFoundError):  # it may just have been dropped
            os.utime(path)
        return tuple(content["states"])

    def evict(self) -> None:
        """Drop what was not used for longest until the rest fits."""
        found = []
        for path in self.folder.glob("*.pt"):
            if not ENTRY.fullmatch(path.name):  # half written by another rank, or not ours
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # another rank's work
                continue
            found.append((stat.st_mtime_ns, stat.st_size, path))
        size = sum(entry[1] for entry in found)
        for _, bytes_, path in sorted(found):
            if size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


@dataclass(frozen=True)
class Source:
    """Batches by their seeds: noise, condition, and where the teacher takes them."""

    start: Callable[[Sequence[int]], tuple[Field, Tensor]]  # seeds -> field, x [B, *]
    teacher: Teacher
    about: Mapping[str, Any] = field(default_factory=dict)  # all that a trajectory depends on
    cache: Cache | None = None

    def batch(self, seeds: Sequence[int]) -> Batch:
        """One batch, its targets on the device of x."""
        slope, x = self.start(seeds)
        if self.cache is None:
            return Batch(slope, x, self.teacher.targets(slope, x))
        key = {**self.about, "seeds": list(seeds)}
        states = self.cache.get(key, lambda: self.teacher.targets(slope, x))
        return Batch(slope, x, tuple(state.to(x.device) for state in states))


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """Batches that are made when first asked for, then kept in the CPU's memory.

    With a cache they are read from the disk each time instead, and take no memory. `levels`
    are those of the teacher's stops that are wanted, if not all.
    """

    source: Source
    parts: tuple[tuple[int, ...], ...]
    levels: tuple[float, ...] | None = None
    kept: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.one(i) for i in range(*index.indices(len(self)))]
        return self.one(range(len(self))[index])

    def __iter__(self) -> Iterator[Batch]:
        return (self.one(i) for i in range(len(self)))

    def one(self, i: int) -> Batch:
        """Batch i."""
        if self.source.cache is not None:
            batch = self.source.batch(self.parts[i])
            return Batch(batch.field, batch.x, self.wanted(batch.targets))
        slope, x = self.source.start(self.parts[i])
        if i not in self.kept:
            self.kept[i] = tuple(t.cpu() for t in self.source.teacher.targets(slope, x))
        return Batch(slope, x, tuple(target.to(x.device) for target in self.wanted(self.kept[i])))

    def wanted(self, targets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The targets at the wanted levels."""
        if self.levels is None:
            return targets
        at = dict(zip(self.source.teacher.stops, targets, strict=True))
        return tuple(at[level] for level in self.levels)

    def at(self, levels: tuple[float, ...]) -> "Batches":
        """The same batches, sharing what is kept, with targets at these levels."""
        return Batches(self.source, self.parts, levels, self.kept)


def in_parts(seeds: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Seeds in runs of at most `size`."""
    return tuple(tuple(seeds[i : i + size]) for i in range(0, len(seeds), size))


def fingerprint(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names."""
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        total.update(file.relative_to(path).as_posix().encode() + b"\0")
        total.update(file_hash(file))
    return total.hexdigest()


def file_hash(path: Path) -> bytes:
    """The SHA-256 of a file's content, read a megabyte at a time."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            total.update(part)
    return total.digest()
