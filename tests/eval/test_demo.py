"""The demo on a tiny random network with cheap features."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from backends.generate import Job
from eval import demo
from eval.demo import draw_grid, main, one_of_each, predictors
from src.images import read_png
from tests.eval.small import cheap_features, exact, reference
from tests.eval.test_candidates import save
from tests.tiny import tiny_model


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No feature network, two solvers, no shipped predictors, no text."""
    monkeypatch.setattr(demo, "load_features", lambda _: cheap_features)
    monkeypatch.setattr(demo, "load_reference", lambda _: reference())
    monkeypatch.setattr(demo, "EXPS", tmp_path / "exps")
    monkeypatch.setattr(demo, "SOLVERS", ("euler", "heun"))
    monkeypatch.setattr(demo, "text_part", lambda _path, _device: None)


def run(tmp_path: Path) -> str:
    model = tiny_model(tmp_path / "model")
    options = ["--model", str(model), "--images", "20", "--batch", "20", "--device", "cpu"]
    done = CliRunner().invoke(main, [*options, "--outdir", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("cheap")
def test_without_predictors_the_demo_leaves_their_place(tmp_path: Path) -> None:
    output = run(tmp_path)
    assert "No learned predictor is in exps/fashion-mnist-32 yet" in output
    row = next(line for line in output.splitlines() if line.startswith("epd K=2"))
    assert row.split()[2:] == ["-"] * 8 + ["-/-/-/-"]
    for name in ("grid.png", "results.png", "results.csv", "results.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100
        assert str(tmp_path / "out" / name) in output


@pytest.mark.usefixtures("cheap")
def test_predictors_that_are_shipped_are_measured_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "exps/fashion-mnist-32"
    folder.mkdir(parents=True)
    for steps in (3, 4):
        save(folder, f"epd-{steps}", steps=steps)
    output = run(tmp_path)
    assert "No learned predictor" not in output
    scores = json.loads((tmp_path / "out/results.json").read_text())["scores"]
    assert [(s["name"], s["nfe"]) for s in scores[-2:]] == [("epd K=2", 3), ("epd K=2", 5)]
    assert {s["nfe"] for s in scores if s["name"] == "heun"} == {3, 5, 7, 9}
    assert all(s["afs"] == (s["name"] != "euler") for s in scores)


def test_the_demo_shows_the_predictors_of_two_points_where_there_are_some(tmp_path: Path) -> None:
    save(tmp_path, "one", k=1)
    assert [c.points for c in predictors(exact(), tmp_path)] == [1]
    save(tmp_path, "two", k=2)
    assert [c.points for c in predictors(exact(), tmp_path)] == [2]
    assert predictors(exact(), tmp_path / "none") == []


def test_the_grid_has_the_first_image_of_every_class() -> None:
    jobs = [Job(seed, label) for seed, label in enumerate([2, 0, 2, 1, 0])]
    assert one_of_each(jobs) == [Job(1, 0), Job(3, 1), Job(0, 2)]


def test_the_grid_shows_every_image(tmp_path: Path) -> None:
    """White images on black cells would be lost; black ones on the white page are counted."""
    rows = [("first", torch.zeros(4, 1, 8, 8)), ("second", torch.ones(4, 1, 8, 8))]
    draw_grid(tmp_path / "g.png", rows, ["a", "b", "c", "d"])
    picture, _ = read_png(tmp_path / "g.png")
    dark = (picture.mean(0) < 0.5).float().mean().item()
    assert 0.15 < dark < 0.4  # one of two rows, less the margins
