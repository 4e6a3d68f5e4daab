"""Folders of runs, their numbers, sealed checkpoints, and signals."""

import hashlib
import io
import os
import signal
import zipfile
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


def test_runs_are_numbered_above_the_highest_and_stamped_ones_keep_their_order(
    tmp_path: Path,
) -> None:
    (tmp_path / "00041-old").mkdir()
    (tmp_path / "sd15").mkdir()
    names = [new_run(what, tmp_path).name for what in ("epd", "epd", "edm-32.v2")]
    assert names == ["00042-epd", "00043-epd", "00044-edm-32.v2"]
    folders = [new_run("twice", tmp_path, stamped=True) for _ in range(11)]
    assert len({*folders}) == 11
    for folder in folders:
        (folder / "configs").mkdir()
        (folder / "configs" / "c.yaml").write_text("")
    assert find_run("latest", tmp_path, settings="configs/c.yaml", name="twice") == folders[-1]
    assert new_run("after", tmp_path).name == "00045-after"
    for what in ("", "a/b", "../a", ".hidden", "a b"):
        with pytest.raises(ValueError, match="cannot name a run"):
            new_run(what, tmp_path)


def test_a_run_is_found_as_the_latest_of_its_kind_by_its_folder_and_by_a_checkpoint(
    tmp_path: Path,
) -> None:
    for name in ("00009-epd", "00010-epd", "00011-other", "00012-epd", "shipped"):
        (tmp_path / name).mkdir()
        if name != "00012-epd":
            (tmp_path / name / "config.yaml").write_text("")
    run = tmp_path / "00009-epd"
    quiet(run / "checkpoints").save(1, {})

    def name_of(resume: object = "latest", settings: str = "config.yaml", **more: str) -> str:
        return find_run(str(resume), tmp_path, settings=settings, **more).name

    assert name_of() == "00011-other"
    assert name_of(name="epd") == "00010-epd"
    assert name_of(checkpoints="checkpoints/*.pt") == "00009-epd"
    for path in (run, run / "checkpoints" / "checkpoint-00000001.pt"):
        assert name_of(path) == "00009-epd"
    with pytest.raises(ValueError, match="no run 'none' in"):
        name_of(name="none")
    with pytest.raises(ValueError, match="no run and no checkpoint at nowhere"):
        name_of("nowhere")
    with pytest.raises(ValueError, match="is no folder of a run"):
        name_of(run, "other.yaml")


def test_a_run_that_goes_on_drops_what_it_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    run = replace(quiet(tmp_path), keep=9)
    for step in (1, 2, 3):
        run.measure(step, {"loss": 1 / step})
        run.save(step, {"step": step})
    run.rewind(2)
    assert [line["step"] for line in run.metrics.read()] == [1, 2]
    assert run.newest()[1] == {"step": 2}
    run.measure(2, {"eval/loss": 1.0})
    run.rewind(2, "eval/loss")
    assert [line["step"] for line in run.metrics.read()] == [1, 2]
    other = replace(quiet(tmp_path / "other"), writes=False)  # all ranks but the first
    other.log("text")
    other.measure(1, {})
    other.save(1, {})
    other.rewind(0)
    other.write_settings(Metrics(tmp_path))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("start", "end", "put", "words"),
    [
        (-5, None, b"", "checksum"),
        (40, 80, b"0" * 40, "checksum"),
        (0, 0, b"PK", "no checkpoint of ours"),
        (0, None, b"", "no checkpoint of ours"),
    ],
)
def test_a_sealed_file_is_read_to_the_bit_and_a_changed_one_is_one_line(
    tmp_path: Path, start: int, end: int | None, put: bytes, words: str
) -> None:
    path = tmp_path / "c.pt"
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0)).double()
    write_sealed(path, {"theta": theta, "step": 3, "adam": {"state": {0: {}}}})
    content = read_sealed(path)
    assert torch.equal(content["theta"], theta)
    assert content["step"] == 3
    changed = bytearray(path.read_bytes())
    changed[start:end] = put
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"^[^\n]*c\.pt[^\n]*{words}[^\n]*$"):
        read_sealed(path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


def test_a_hostile_file_with_a_right_checksum_runs_nothing(tmp_path: Path) -> None:
    write_sealed(tmp_path / "c.pt", {"x": Hostile()})
    with pytest.raises(ValueError, match="holds what is not read"):
        read_sealed(tmp_path / "c.pt")
    for payload in (b"", b"\x80\x02.", b"PK\x03\x04", b"\x80\x02h\x07."):
        digest = hashlib.sha256(payload).hexdigest().encode()
        (tmp_path / "c.pt").write_bytes(b"epd-sealed-1 " + digest + b"\n" + payload)
        with pytest.raises(ValueError, match="holds what is not read"):
            read_sealed(tmp_path / "c.pt")
    deep, wide = b")" + b"\x85" * 10**6, b")q\x00" + b"0h\x00h\x00\x86q\x00" * 80
    for keys in (deep, wide):  # which crash torch.load, or never end
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}" + keys + b"Ns.")
        payload = buffer.getvalue()
        digest = hashlib.sha256(payload).hexdigest().encode()
        (tmp_path / "c.pt").write_bytes(b"epd-sealed-1 " + digest + b"\n" + payload)
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
    with pytest.raises(ValueError, match="no checkpoint: give a run that has one"):
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
