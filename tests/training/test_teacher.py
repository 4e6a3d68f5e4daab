"""Trajectories of a teacher, and their cache."""

import os
from pathlib import Path

import pytest
import torch

from solvers.field import Field
from tests.solvers.mixture import integrate
from tests.training.students import EVERY, batch, batches, cached, model
from training.student import Trajectories
from training.teacher import fingerprint


def through(
    folder: Path, seeds: range, said: list[str] | None = None, most: int = 1 << 30
) -> Trajectories:
    """A batch by way of a cache."""
    return batches(seeds, len(seeds), cached(folder, said, most))[0]


def test_targets_are_the_states_at_the_students_levels() -> None:
    given = batch(0, 4)
    sampler = batches(range(4)).teacher.sampler
    states = list(integrate(sampler.solver, Field(model().denoise), given.x, sampler.sigmas))
    wanted = states[EVERY - 1 :: EVERY]
    assert len(given.targets) == 3
    assert all(torch.equal(a, b) for a, b in zip(given.targets, wanted, strict=True))


def test_a_cache_gives_the_same_trajectories_without_the_network(tmp_path: Path) -> None:
    first = through(tmp_path, range(4))
    again = through(tmp_path, range(4))
    assert all(torch.equal(a, b) for a, b in zip(first.targets, again.targets, strict=True))
    assert again.field.tally.calls == 0
    assert first.field.tally.calls > 0


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_entry_is_made_again_and_said_so(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    wanted = through(tmp_path, range(4), said)
    (path,) = tmp_path.glob("*.pt")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    half = bytes(content[: len(content) // 2])
    path.write_bytes({"cut": half, "bit": bytes(content), "empty": b""}[damage])
    mended = through(tmp_path, range(4), said)
    assert torch.equal(mended.targets[-1], wanted.targets[-1])
    assert len(said) == 1
    assert "making it again" in said[0]
    assert through(tmp_path, range(4), said).field.tally.calls == 0


def test_the_oldest_go_when_the_cache_is_full(tmp_path: Path) -> None:
    through(tmp_path, range(1))
    (entry,) = tmp_path.glob("*.pt")
    size = entry.stat().st_size
    for i, seed in enumerate(range(1, 4)):
        os.utime(entry, (i, i))
        through(tmp_path, range(seed, seed + 1), most=int(2.5 * size))
        entry = max(tmp_path.glob("*.pt"), key=lambda p: p.stat().st_mtime_ns)
    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert through(tmp_path, range(3, 4)).field.tally.calls == 0


def test_what_is_not_its_own_is_left_alone_by_a_full_cache(tmp_path: Path) -> None:
    """A model that lies there, and what another rank is about to write."""
    others = [tmp_path / "model.pt", tmp_path / f".{'0' * 40}.0123.tmp.pt"]
    for other in others:
        other.write_bytes(b"0" * 1000)
    through(tmp_path, range(1), most=1)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    one = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == one
    (tmp_path / "a").write_text("2")
    two = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({one, two, fingerprint(tmp_path)}) == 3
    assert fingerprint(tmp_path / "b") != two


def test_a_foreign_pickle_in_the_cache_is_not_opened(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = through(tmp_path, range(2))
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    assert torch.equal(through(tmp_path, range(2), said).targets[-1], wanted.targets[-1])
    assert "making it again" in said[0]
