"""What is written beside figures."""

import time
from pathlib import Path

import pytest
import torch

from eval import machine
from eval.machine import clock, commit, provenance
from src.files import to_json


def test_provenance_is_plain_and_says_what_matters() -> None:
    found = provenance(torch.device("cpu"))
    assert {"commit", "cpu", "cores", "threads", "device", "torch", "python"} == found.keys()
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    to_json(found)


def test_outside_of_git_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert commit() is None


def test_the_clock_runs() -> None:
    before = clock(torch.device("cpu"))
    time.sleep(0.01)
    assert clock(torch.device("cpu")) - before >= 0.009
