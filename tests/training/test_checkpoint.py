"""Sealed files and checkpoints: whole, or a line that says why not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.checkpoint import (
    MARK,
    checkpoints,
    latest_checkpoint,
    read_sealed,
    save_checkpoint,
    sealed,
    write_sealed,
)


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0)).double()
    write_sealed(tmp_path / "c.pt", {"theta": theta, "step": 3, "adam": {"state": {0: {}}}})
    found = read_sealed(tmp_path / "c.pt")
    assert torch.equal(found["theta"], theta)
    assert found["step"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-5], "checksum"),
        (lambda c: c[:40] + b"0" * 40 + c[80:], "checksum"),
        (lambda c: b"PK" + c, "no checkpoint of ours"),
        (lambda _c: b"", "no checkpoint of ours"),
    ],
)
def test_a_changed_file_is_one_line_with_its_name(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(change(sealed({"step": 1})))
    with pytest.raises(ValueError, match=message) as caught:
        read_sealed(path)
    assert "c.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


def test_a_hostile_file_with_a_right_checksum_runs_nothing(tmp_path: Path) -> None:
    payload = sealed({"x": Hostile()})
    assert payload.startswith(MARK)
    (tmp_path / "c.pt").write_bytes(payload)
    with pytest.raises(ValueError, match="holds what is not read"):
        read_sealed(tmp_path / "c.pt")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"no such file: no/such\.pt"):
        read_sealed("no/such.pt")


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"step": step})
    assert [p.name for p in checkpoints(tmp_path)] == [
        "checkpoint-00000010.pt",
        "checkpoint-00000002.pt",
    ]


def test_a_broken_newest_falls_back_and_says_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})
    newest = save_checkpoint(tmp_path, 2, {"step": 2})
    newest.write_bytes(newest.read_bytes()[:-1])
    said: list[str] = []
    path, content = latest_checkpoint(tmp_path, said.append)
    assert content["step"] == 1
    assert path.name == "checkpoint-00000001.pt"
    assert len(said) == 1
    assert "checkpoint-00000002.pt" in said[0]


def test_none_that_is_whole_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint: start without --resume"):
        latest_checkpoint(tmp_path, lambda _text: None)
    (tmp_path / "checkpoint-00000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint that is whole"):
        latest_checkpoint(tmp_path, lambda _text: None)
