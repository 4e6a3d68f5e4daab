from pathlib import Path

from click.testing import CliRunner

from exps.bench_rollout import main
from src.files import read_json


def test_a_rollout_is_timed_against_sampling_and_scoring(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    config = ["--config", "exps/mixture-3x4x4/groupings.yaml", "--device", "cpu"]
    done = CliRunner().invoke(main, [*config, "--turns", "3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = read_json(out)
    assert len(found["seconds"]) == 3
    ratios = sorted(a / b for a, b in found["seconds"])
    assert found["ratio"] == ratios[1]
    assert f"{found['ratio']:.3f} of sampling" in done.output
