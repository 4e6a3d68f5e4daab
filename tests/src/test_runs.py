"""Folders of runs, their numbers, sealed checkpoints, and signals."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.runs import (
    Metrics,
    Run,
    Stop,
    Stopped,
    checkpoints,
    find_run,
    new_run,
    read_sealed,
    write_sealed,
)


def quiet(folder: Path) -> Run:
    return Run(folder, lambda _text: None)


def test_the_next_number_is_above_the_highest_even_after_a_gap(tmp_path: Path) -> None:
    (tmp_path / "00041-old").mkdir()
    (tmp_path / "sd15").mkdir()
    names = [new_run(what, tmp_path).name for what in ("epd", "epd", "edm-32.v2")]
    assert names == ["00042-epd", "00043-epd", "00044-edm-32.v2"]


@pytest.mark.parametrize("what", ["", "a/b", "../a", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match="cannot name a run"):
        new_run(what, tmp_path)


def test_the_latest_run_is_the_newest_of_its_name_and_kind(tmp_path: Path) -> None:
    names = ["00009-epd", "00010-epd", "00011-other", "00012-epd", "shipped"]
    for name in names:
        (tmp_path / name).mkdir()
        if name != "00012-epd":
            (tmp_path / name / "config.yaml").write_text("")
    quiet(tmp_path / "00009-epd").save(1, {})

    def latest(**more: str) -> str:
        return find_run("latest", tmp_path, settings="config.yaml", **more).name

    assert latest() == "00011-other"
    assert latest(name="epd") == "00010-epd"
    assert latest(checkpoints="*.pt") == "00009-epd"
    with pytest.raises(ValueError, match="no run 'none' in"):
        latest(name="none")


def test_runs_of_one_second_have_a_folder_each_in_their_order(tmp_path: Path) -> None:
    folders = [new_run("twice", tmp_path, stamped=True) for _ in range(11)]
    assert len({*folders}) == 11
    for folder in folders:
        (folder / "configs").mkdir()
        (folder / "configs" / "c.yaml").write_text("")
    assert find_run("latest", tmp_path, settings="configs/c.yaml", name="twice") == folders[-1]


def test_a_run_is_found_by_its_checkpoint_and_by_its_folder(tmp_path: Path) -> None:
    run = new_run("epd", tmp_path)
    (run / "config.yaml").write_text("")
    quiet(run / "checkpoints").save(1, {})
    for path in (run, run / "checkpoints" / "checkpoint-00000001.pt"):
        assert find_run(str(path), tmp_path, settings="config.yaml").resolve() == run.resolve()
    with pytest.raises(ValueError, match="no run and no checkpoint at nowhere"):
        find_run("nowhere", tmp_path, settings="config.yaml")
    with pytest.raises(ValueError, match="is no folder of a run"):
        find_run(str(run), tmp_path, settings="other.yaml")


def test_a_run_that_goes_on_drops_what_it_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    run = replace(quiet(tmp_path), keep=9)
    for step in (1, 2, 3):
        run.measure(step, {"loss": 1 / step})
        run.save(step, {"step": step})
    run.rewind(2)
    assert [line["step"] for line in run.metrics.read()] == [1, 2]
    assert run.newest()[1] == {"step": 2}


def test_ranks_but_the_first_write_nothing(tmp_path: Path) -> None:
    run = replace(quiet(tmp_path), writes=False)
    run.log("text")
    run.measure(1, {})
    run.save(1, {})
    run.write_settings(Metrics(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0)).double()
    write_sealed(tmp_path / "c.pt", {"theta": theta, "step": 3, "adam": {"state": {0: {}}}})
    content = read_sealed(tmp_path / "c.pt")
    assert torch.equal(content["theta"], theta)
    assert content["step"] == 3


@pytest.mark.parametrize(
    ("start", "end", "put", "words"),
    [
        (-5, None, b"", "checksum"),
        (40, 80, b"0" * 40, "checksum"),
        (0, 0, b"PK", "no checkpoint of ours"),
        (0, None, b"", "no checkpoint of ours"),
    ],
)
def test_a_changed_file_is_one_line_with_its_name(
    tmp_path: Path, start: int, end: int | None, put: bytes, words: str
) -> None:
    path = tmp_path / "c.pt"
    write_sealed(path, {"step": 1})
    content = bytearray(path.read_bytes())
    content[start:end] = put
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*c\.pt[^\n]*{words}[^\n]*$"):
        read_sealed(path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


def test_a_hostile_file_with_a_right_checksum_runs_nothing(tmp_path: Path) -> None:
    write_sealed(tmp_path / "c.pt", {"x": Hostile()})
    with pytest.raises(ValueError, match="holds what is not read"):
        read_sealed(tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"no such file: no/such\.pt"):
        read_sealed("no/such.pt")


def test_a_broken_newest_falls_back_and_the_log_names_it(tmp_path: Path) -> None:
    heard: list[str] = []
    run = Run(tmp_path, heard.append)
    for step in (0, 1, 2):
        run.save(step, {"step": step})
    assert len(checkpoints(tmp_path)) == 2
    newest = tmp_path / "checkpoint-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    path, content = run.newest()
    assert (path.name, content["step"]) == ("checkpoint-00000001.pt", 1)
    assert len(heard) == 1
    assert "checkpoint-00000002.pt is damaged" in heard[0]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint that is whole"):
        run.newest()
    with pytest.raises(ValueError, match="no checkpoint: start without --resume"):
        quiet(tmp_path / "empty").newest()


def test_a_signal_is_heard_at_the_next_poll_but_not_while_held() -> None:
    stop = Stop()
    with stop.listening():
        stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        stop.held = True
        stop.poll()
        stop.held = False
        with pytest.raises(Stopped):
            stop.poll()
