"""Trajectories of a teacher, and their cache."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from solvers.classic import Heun
from solvers.field import Field
from solvers.sampler import Sampler
from src.seeds import randn
from tests.solvers.gauss import integrate
from tests.training.students import SHAPE, model
from training.student import Trajectories
from training.teacher import Batches, Cache, Teacher, fingerprint, in_parts

GRID = tuple(model().levels.grid("time_uniform", 13).tolist())


def batch(*seeds: int, cache: Cache | None = None) -> Trajectories:
    def begin(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        return Field(model().denoise), randn(seeds, SHAPE, stream="train") * GRID[0]

    teacher = Teacher(Sampler(Heun(), GRID), GRID[4::4])
    return Batches(begin, teacher, in_parts(seeds, 8), {"teacher": "heun"}, cache)[0]


def test_a_cache_gives_the_teachers_states_asks_nothing_twice_and_mends_what_is_damaged(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    cache = Cache(tmp_path, say=said.append)
    first = batch(0, 1, 2, cache=cache)
    trajectory = integrate(Heun(), Field(model().denoise), first.x, GRID)
    assert len(first.targets) == 3
    assert all(map(torch.equal, first.targets, list(trajectory)[3::4]))
    assert first.field.tally.calls > 0
    (path,) = tmp_path.glob("*.pt")
    whole = path.read_bytes()
    flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
    foreign = b"\x80\x04cos\nsystem\n(S'exit 1'\ntR."
    for damage in (whole[: len(whole) // 2], flipped, b"", foreign):
        path.write_bytes(damage)
        mended = batch(0, 1, 2, cache=cache)
        assert "making it again" in said.pop()
        again = batch(0, 1, 2, cache=cache)
        assert all(map(torch.equal, mended.targets, first.targets))
        assert all(map(torch.equal, again.targets, first.targets))
        assert (again.field.tally.calls, said) == (0, [])


def test_the_oldest_go_when_the_cache_is_full_and_what_is_not_its_own_stays(
    tmp_path: Path,
) -> None:
    """A model that lies there, and what another rank is about to write."""
    others = {tmp_path / "model.pt", tmp_path / f".{'0' * 40}.0123.tmp.pt"}
    for other in others:
        other.write_bytes(b"0" * 1000)
    size = 1 << 20
    for seed in range(4):
        batch(seed, cache=Cache(tmp_path, int(2.5 * size)))
        newest = max(set(tmp_path.iterdir()) - others, key=lambda path: path.stat().st_mtime)
        os.utime(newest, (seed, seed))
        size = newest.stat().st_size
    assert len(set(tmp_path.iterdir()) - others) == 2
    for seed in (2, 3):
        assert batch(seed, cache=Cache(tmp_path)).field.tally.calls == 0
    batch(5, cache=Cache(tmp_path, 1))
    assert set(tmp_path.iterdir()) == others


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    prints = []
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        (tmp_path / "a").unlink(missing_ok=True)
        (tmp_path / name).write_text(text)
        prints += [fingerprint(tmp_path), fingerprint(tmp_path / name)]
    assert len(set(prints)) == 5  # a file alone has no name
    assert fingerprint(tmp_path) == prints[-2]
