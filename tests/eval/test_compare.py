"""The comparison from its options to its files, on a tiny random network."""

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from eval import compare as module
from eval.candidates import from_here
from eval.compare import main
from eval.comparison import compare, rivals_for, runs_of
from eval.frechet import moments, save_reference
from src.seeds import parse_seeds
from tests.eval.small import cheap_features, study
from tests.eval.test_candidates import save
from tests.tiny import tiny_model

FEW = ("--solvers", "euler,heun", "--nfe", "2,3", "--fine", "4", "--seeds", "0-3", "--batch", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def run(model: Path, outdir: Path, *options: str) -> Result:
    common = ["--model", str(model), "--device", "cpu", "--outdir", str(outdir)]
    return CliRunner().invoke(main, [*common, *options])


def test_the_command_leaves_csv_json_and_a_plot(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "..", "never")  # not asked for, and so not measured
    path = save(tmp_path, "mine", k=3)
    done = run(model, tmp_path / "out", *FEW, "--predictor", str(tmp_path / "*.pkl"))
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out/results.json").read_text())
    found = [(s["name"], s["nfe"], s["source"]) for s in content["scores"]]
    assert found == [
        *(("euler", 2, None), ("euler", 3, None), ("heun", 2, None), ("heun", 3, None)),
        ("epd K=3", 3, from_here(path)),
    ]
    assert content["about"]["seeds"] == "0-3"
    assert {"commit", "cpu", "threads", "torch", "fine", "meaning"} <= content["about"].keys()
    with (tmp_path / "out/results.csv").open(encoding="utf-8", newline="") as file:
        assert [float(r["rmse"]) for r in csv.DictReader(file)] == [
            s["rmse"] for s in content["scores"]
        ]
    assert (tmp_path / "out/results.png").stat().st_size > 5000
    assert "epd K=3" in done.output
    assert "learned / hand-made" in done.output
    assert "learned / hand-made" in done.output
    assert "4 images. Fine solution: heun in 4 steps on polynomial-7 (8 calls)" in done.output


def test_predictors_may_stand_as_a_shell_expands_them(model: Path, tmp_path: Path) -> None:
    paths = [str(save(tmp_path, name)) for name in ("a", "b")]
    done = run(model, tmp_path / "o", *FEW, "--solvers", "", "--predictor", *paths)
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "o/results.json").read_text())["scores"]
    assert [s["name"] for s in scores] == ["epd K=2 (a)", "epd K=2 (b)"]


def test_a_reference_adds_the_frechet_distance(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_features", lambda _: cheap_features)
    drawn = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    save_reference(tmp_path / "r.npz", moments(cheap_features(drawn)), {})
    done = run(model, tmp_path / "o", *FEW, "--reference", str(tmp_path / "r.npz"))
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "o/results.json").read_text())
    assert all(s["frechet"] > 0 for s in content["scores"])
    assert content["fine"]["frechet"] > 0


def test_each_solver_takes_its_best_schedule() -> None:
    given = study(images=6)
    rivals = rivals_for(["euler", "dpmpp-2"], [4], ["best"], given)
    assert len(rivals) == 12
    chosen = compare(given, (), rivals, choose_on=6).scores
    all_of_them = compare(given, rivals).scores
    assert [s.name for s in chosen] == ["euler", "dpmpp-2"]
    for score in chosen:
        assert score.rmse == min(s.rmse for s in all_of_them if s.name == score.name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--schedules", "polynominal"), "unknown schedule"),
        (("--solvers", "eulr"), "did you mean euler"),
        (("--nfe", "3,x"), "'x' is no number from 1 on"),
        (("--solvers", "", "--nfe", "3"), "nothing to compare"),
        (("--predictor", "none/*.pkl"), "no predictor is named"),
        (("--predictor", "cifar10-3nfe"), "32 pixels"),
        (("--reference", "none.npz"), "no reference statistics at none.npz"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_one_line(
    model: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = run(model, tmp_path, *FEW, *options)
    assert done.exit_code == 1
    assert said in done.output.strip().splitlines()[-1]


@given(st.sets(st.integers(0, 60), min_size=1).map(sorted))
def test_seeds_are_written_as_they_are_read(seeds: list[int]) -> None:
    assert parse_seeds(runs_of(seeds)) == seeds
