"""Files whole or not at all, JSON of one line's errors, the nearest name."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.files import (
    append_jsonl,
    check_writable,
    nearest,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
    write_text,
)


def stop_half_way(path: Path) -> None:
    path.write_text("half")
    raise InterruptedError


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "x" / "a.png") as temp:
        assert (temp.parent, temp.suffix) == (tmp_path / "x", ".png")
        temp.write_text("old")
        assert not (tmp_path / "x" / "a.png").exists()
    with pytest.raises(InterruptedError), write_atomically(tmp_path / "x" / "a.png") as temp:
        stop_half_way(temp)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a.png"]
    assert (tmp_path / "x" / "a.png").read_text() == "old"
    (tmp_path / "folder.txt").mkdir()
    for place, words in (("x/a.png/b.txt", "cannot make the folder"), ("folder.txt", "write")):
        with pytest.raises(ValueError, match=words):
            write_text(tmp_path / place, "")
    for place in ("/proc/a.txt", str(tmp_path / ("a" * 300))):
        with pytest.raises(ValueError, match=r"^cannot write /[^\n]*$"):
            write_text(place, "")
    for place in ("/proc/new/a.txt", "/proc/a.txt", tmp_path / "x/a.png/new/b.txt"):
        with pytest.raises(ValueError, match=r"^cannot write /[^\n]*$"):
            check_writable(Path(place))
    check_writable(tmp_path / "new/deep/b.txt")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "b.txt"):
        (tmp_path / "none").read_text()


def test_a_link_stays_one_and_a_pipe_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "there.txt")
    (tmp_path / "there.txt").write_text("old")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "there.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_text(tmp_path / "pipe", "through")
        assert read.result(10) == "through"
    assert (tmp_path / "pipe").is_fifo()


def test_json_holds_numbers_alone_and_broken_json_is_one_line_with_its_file(
    tmp_path: Path,
) -> None:
    for value in (float("nan"), {"a": float("inf")}, {"a": object()}):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            write_json(tmp_path / "a.json", value)
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None]}
    for content in (b"", b"{", b"[NaN]", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]*a\.json[^\n]*$"):
            read_json(tmp_path / "a.json")
    for path, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "cannot read")):
        with pytest.raises(ValueError, match=words):
            read_json(path)


def test_a_half_written_line_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    append_jsonl(log, {"step": 1})
    with log.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_jsonl(log) == [{"step": 1}]
    append_jsonl(log, {"step": 2})
    assert read_jsonl(log) == [{"step": 1}, {"step": 2}]
    with log.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(ValueError, match="line 3"):
        read_jsonl(log)


def test_the_nearest_name_is_named_whatever_the_case() -> None:
    pairs = {"": "ipndm", "hueen": "heun", "IPNDM4": "ipndm", "dpm++": "dpmpp", "Euler": "euler"}
    assert {name: nearest(name, ["euler", "heun", "ipndm", "dpmpp"]) for name in pairs} == pairs
