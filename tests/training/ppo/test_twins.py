"""The published files run end to end on tiny twins of their families."""

from pathlib import Path

import pytest

from solvers.predictor import load_predictor
from src.runs import Metrics
from tests.training.ppo.small import small_hps, start, told, write_twins


@pytest.mark.parametrize("name", ["sd15", "sd3_1024", "sd3_512_guided", "flux_dev_guided"])
def test_a_published_file_runs_on_twins_from_its_own_yaml(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_hps(monkeypatch)
    write_twins(name, tmp_path)
    done = start(*told(name, tmp_path))
    assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "runs").iterdir()
    lines = Metrics(folder / "logs" / "metrics.jsonl").read()
    assert [line["step"] for line in lines if "reward/hps" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval/hps_gain" in line] == [0, 2]
    begun = load_predictor(tmp_path / "start.pkl")
    ended = load_predictor(folder / "export" / "network-snapshot-export-step000003.pkl")
    assert ended.recipe.training["ppo"]["step"] == 3
    guided = name.endswith("_guided")
    assert bool((ended.table.r - begun.table.r).abs().max() > 0) is not guided
    assert (ended.recipe.schedule_type, ended.nfe) == (begun.recipe.schedule_type, begun.nfe)
    assert (ended.table.guidance is not None) is guided
