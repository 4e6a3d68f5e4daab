"""The text-to-image half of the demo, on a tiny random pipeline."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from eval import demo, demo_text
from eval.demo_text import Row, chosen_jobs, error, error_table, text_rows
from solvers.epd import Directions
from solvers.predictor import Predictor, save_predictor
from solvers.recipe import Recipe
from src.images import read_png
from tests import twins

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A twin of SD3, a predictor of 6 calls under exps/, and few calls to wait for."""
    half = torch.full((3, 2), 0.5, dtype=torch.float64)
    place = torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(3, 2)
    recipe = Recipe(
        num_steps=4, num_points=2, schedule_type="flowmatch", backend="sd3", guidance_rate=4.0
    )
    found = Predictor(Directions(place, half, 2 * half, 2 * half), recipe)
    (tmp_path / "exps" / "sd3").mkdir(parents=True)
    save_predictor(found, tmp_path / "exps" / "sd3" / "epd-k2-6nfe.pkl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_text, "EULER", (3,))
    monkeypatch.setattr(demo_text, "FINE_STEPS", 8)
    twins.saved(tmp_path / "sd3", twins.sd3())
    return Path("sd3")


def test_euler_and_epd_stand_beside_the_fine_solution(model: Path) -> None:
    rows, prompts = text_rows(str(model), Path("exps"), CPU)
    assert [(row.name, row.nfe) for row in rows] == [("euler", 3), ("epd K=2", 6), ("euler", 8)]
    assert prompts == [job.prompt for job in chosen_jobs()]
    assert all(len(row.images) == len(prompts) for row in rows)
    coarse, learned, fine = rows
    assert len({error(coarse, fine), error(learned, fine), error(coarse, learned), 0.0}) == 4


def test_the_picture_and_the_table_are_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TEXT_MODEL", str(model))
    monkeypatch.setattr(demo, "EXPS", Path("exps"))
    demo.text_part(Path("text.png"), CPU)
    picture, _ = read_png(Path("text.png"))
    assert min(picture.shape[1:]) > 100
    assert "RMSE to 8 calls" in capsys.readouterr().out


def test_the_error_is_over_all_numbers() -> None:
    zero = Row("a", 1, torch.zeros(2, 3), torch.zeros(0))
    other = Row("b", 9, torch.tensor([[1.0, 1, 1], [-1, -1, -1]]) * 2, torch.zeros(0))
    assert error(zero, other) == 2.0
    assert error_table([zero, other]).splitlines()[2].split() == ["a", "1", "2.000"]
