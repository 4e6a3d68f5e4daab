import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from solvers.predictor import load_predictor
from src.runs import Metrics
from tests.training.ppo.quadrature import short_run
from training.ppo import export_epd_predictor
from training.ppo.export import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    short_run(folder)
    return folder


def export(checkpoint: Path, output: Path) -> Result:
    return CliRunner().invoke(main, ["--checkpoint", str(checkpoint), "--output", str(output)])


@pytest.mark.parametrize("ending", ["pkl", "json"])
def test_a_folder_gives_the_predictor_of_its_newest_checkpoint(
    ending: str, run: Path, tmp_path: Path
) -> None:
    done = export(run, tmp_path / "deep" / f"ours.{ending}")
    assert done.exit_code == 0, done.output
    ours = load_predictor(tmp_path / "deep" / f"ours.{ending}")
    theirs = load_predictor(max((run / "export").glob("*-step*.pkl")))
    assert torch.equal(ours.table.r, theirs.table.r)
    assert ours.recipe == theirs.recipe


def test_the_published_spelling_writes_into_the_runs_own_folder(run: Path) -> None:
    arguments = [str(run), "--checkpoint", "checkpoints/checkpoint-00000001.pt"]
    done = CliRunner().invoke(export_epd_predictor.main, arguments)
    assert done.exit_code == 0, done.output
    path = run / "export" / "network-snapshot-export-step000001.pkl"
    assert done.output.startswith(f"{path}: step 1 of")


@pytest.mark.parametrize(
    ("checkpoint", "output", "said"),
    [
        ("nowhere.pt", "a.pkl", "no such file: nowhere.pt"),
        ("pyproject.toml", "a.pkl", "pyproject.toml is no checkpoint of ours"),
        ("src", "a.pkl", "src has no checkpoint"),
        ("nowhere.pt", "a.txt", "a.txt: a predictor's file ends in .pkl or .json"),
    ],
)
def test_what_cannot_be_exported_is_one_line(checkpoint: str, output: str, said: str) -> None:
    done = export(Path(checkpoint), Path(output))
    assert done.exit_code == 1
    assert said in done.output
    assert done.output.count("\n") == 1


def test_the_page_explains_every_number_that_is_logged(run: Path) -> None:
    page = (Path(__file__).parents[3] / "training" / "ppo" / "README.md").read_text()
    logged = {name for line in Metrics(run / "logs" / "metrics.jsonl").read() for name in line}
    plain = {re.sub(r"^(reward|eval)/(near|mean)", r"\1/NAME", name) for name in logged - {"step"}}
    assert {"eval/NAME_gain_low", "reward/NAME_std", "seconds/decode", "entropy"} <= plain
    assert [name for name in sorted(plain) if f"`{name}`" not in page] == []
