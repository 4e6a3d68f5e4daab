from pathlib import Path

import pytest

from src.files import (
    append_jsonl,
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


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(InterruptedError), write_atomically(tmp_path / "a.txt") as temp:
        stop_half_way(temp)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "x" / "a.png") as temp:
        assert temp.parent == tmp_path / "x"
        assert temp.suffix == ".png"
        temp.write_text("whole")
        assert not (tmp_path / "x" / "a.png").exists()
    assert (tmp_path / "x" / "a.png").read_text() == "whole"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the folder"):
        write_text(tmp_path / "file" / "a.txt", "")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        write_text(tmp_path / "a.txt", "")


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {"a": object()}])
def test_what_json_cannot_hold_is_refused_and_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write_json(tmp_path / "a.json", value)
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"é": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None]}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[NaN]", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000]
)
def test_broken_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot read"):
        read_json(tmp_path)


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "ipndm"),
        ("hueen", "heun"),
        ("IPNDM4", "ipndm"),
        ("dpm++", "dpmpp"),
        ("Euler", "euler"),
    ],
)
def test_the_nearest_name_is_found_whatever_the_case(name: str, expected: str) -> None:
    assert nearest(name, ["euler", "heun", "ipndm", "dpmpp"]) == expected
