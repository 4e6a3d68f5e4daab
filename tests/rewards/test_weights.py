"""The table of weights, where they are looked for, and the doctor that looks at all."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from rewards import doctor
from rewards.intact import RECORD, fault, sha256
from rewards.registry import ADAPTERS
from rewards.weights import REWARDS, WEIGHTS, find, place, require, variable


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine are seen."""
    for name in WEIGHTS:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rewards.weights.packaged", lambda _: None)


def saved(path: Path, name: str = "a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.arange(1000.0)}, path)
    return path


def test_every_reward_has_its_weights_in_the_table() -> None:
    assert {w for adapter in ADAPTERS.values() for w in adapter.weights} == set(REWARDS)


def test_every_line_says_where_to_get_it() -> None:
    for name, weight in WEIGHTS.items():
        assert bool(weight.by_hand) != bool(weight.repo or weight.package), name
        assert bool(weight.package) == bool(weight.inside), name
        assert bool(weight.repo) == bool(weight.files), name
        assert "://" not in f"{weight.repo}{weight.by_hand}{weight.what}", name
        assert len(weight.sha256) in (0, 64), name


def test_what_a_command_was_told_goes_before_the_environment_and_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find("hps") is None
    default = saved(place("hps"))
    assert find("hps") == default
    by_variable = saved(tmp_path / "v" / "HPS_v2.1_compressed.pt")
    monkeypatch.setenv("EPD_HPS", str(by_variable.parent))
    assert find("hps") == by_variable
    told = saved(tmp_path / "t.pt")
    assert find("hps", {"hps": told}) == told


def test_a_path_that_is_told_and_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hps: no such file or folder: .*none"):
        find("hps", {"hps": tmp_path / "none"})


def test_all_that_is_missing_is_told_at_once_with_how_to_get_it() -> None:
    with pytest.raises(
        ValueError, match=r"^missing weights: hps: .*launch\.sh weights hps.*; mps:"
    ):
        require(["hps", "mps"])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no weights 'hsp': did you mean hps"):
        require([], {"hsp": "x"})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
    ],
)
def test_what_is_no_file_of_weights_is_wrong(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert told in fault(path)
    with pytest.raises(ValueError, match=told):
        require(["hps"], {"hps": path})


def test_files_that_are_cut_short_are_wrong(tmp_path: Path) -> None:
    tensors, torches = tmp_path / "a.safetensors", saved(tmp_path / "a.pth")
    save_file({"a": torch.arange(1000.0)}, tensors)
    for path in (tensors, torches):
        assert fault(path) == ""
        path.write_bytes(path.read_bytes()[:-50])
        assert "cut short" in fault(path)


def test_a_folder_needs_a_config_and_weights_or_a_vocabulary(tmp_path: Path) -> None:
    assert "no weights" in fault(tmp_path)
    saved(tmp_path / "pytorch_model.bin")
    assert "no config.json" in fault(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert fault(tmp_path) == ""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("a\n")
    assert fault(tmp_path / "words") == ""


def test_the_doctor_tells_what_is_found_missing_and_wrong() -> None:
    saved(place("hps"))
    place("imagereward").parent.mkdir()
    place("imagereward").write_bytes(b"<html>")
    result = CliRunner().invoke(doctor.main)
    told = {line.split()[0]: line.split()[1] for line in result.output.splitlines() if " " in line}
    assert (told["hps"], told["imagereward"], told["clip"]) == ("found", "wrong", "missing")
    assert {told[name] for name in WEIGHTS} == {"found", "missing", "wrong"}
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == f"Error: 1 of {len(WEIGHTS)} are wrong: see above"


def test_the_doctor_is_content_where_nothing_is_wrong() -> None:
    assert CliRunner().invoke(doctor.main).exit_code == 0


def test_a_file_that_changed_since_it_was_fetched_is_wrong() -> None:
    path = saved(place("hps"))
    record = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)}}
    (path.parent / RECORD).write_text(json.dumps(record))
    assert doctor.state("hps", thoroughly=True)[0] == "found"
    saved(path, name="b")
    assert doctor.state("hps")[0] == "found"
    assert "SHA-256" in doctor.state("hps", thoroughly=True)[1]
    record[path.name]["size"] = 7
    (path.parent / RECORD).write_text(json.dumps(record))
    assert doctor.state("hps") == (
        "wrong",
        f"{path}: it has {path.stat().st_size} bytes, but 7 were fetched",
    )


def test_a_file_with_another_hash_than_the_tables_is_wrong_when_read() -> None:
    path = place("sd15")
    path.parent.mkdir()
    save_file({"a": torch.zeros(3)}, path)
    assert doctor.state("sd15")[0] == "found"
    assert "not that of the published file" in doctor.state("sd15", thoroughly=True)[1]
