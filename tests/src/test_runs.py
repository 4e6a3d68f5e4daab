from pathlib import Path

import pytest

from src.runs import Metrics, new_run


def test_runs_are_numbered_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "shipped").mkdir()
    names = [new_run(what, tmp_path / "exps").name for what in ("epd", "epd", "edm-32.v2")]
    assert names == ["00001-epd", "00002-epd", "00003-edm-32.v2"]


def test_the_next_number_is_above_the_highest_even_after_a_gap(tmp_path: Path) -> None:
    (tmp_path / "00041-old").mkdir()
    (tmp_path / "sd15").mkdir()
    assert new_run("epd", tmp_path).name == "00042-epd"


@pytest.mark.parametrize("what", ["", "a/b", "../a", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match="cannot name a run"):
        new_run(what, tmp_path)


def test_metrics_come_back_and_nan_is_refused(tmp_path: Path) -> None:
    log = Metrics(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.write(1, {"loss": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        log.write(2, {"loss": float("nan")})
    assert log.read() == [{"step": 1, "loss": 0.5}]
