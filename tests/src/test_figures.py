"""Figures, and the command that lays folders of sample.py side by side."""

from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image

from src.figures import main, png, table_figure
from src.samples import Samples


def folder(path: Path, shift: float, count: int = 3) -> Path:
    about = {"model": "m", "predictor": None, "solver": path.name, "nfe": 5}
    images = torch.linspace(0, 0.5, count).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4) + shift
    samples = Samples(path, about)
    samples.write([(seed, seed) for seed in range(count)], images, [])
    samples.write_index()
    return path


def test_folders_are_laid_side_by_side_and_measured(tmp_path: Path) -> None:
    folders = [str(folder(tmp_path / name, s)) for name, s in (("euler", 0.1), ("fine", 0.0))]
    result = CliRunner().invoke(main, [*folders, "--output", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    euler, fine = result.output.splitlines()[1:3]
    assert euler.split() == ["euler", "5", "0.199"]  # 2 * 25.4 / 255, by the rule of bytes
    assert fine.split() == ["fine", "5", "0.000"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 50


def test_folders_of_other_seeds_are_refused(tmp_path: Path) -> None:
    folders = [str(folder(tmp_path / "a", 0, 2)), str(folder(tmp_path / "b", 0, 3))]
    result = CliRunner().invoke(main, [*folders, "--output", str(tmp_path / "a.png")])
    assert "differ in seeds" in result.output


def test_a_table_is_drawn() -> None:
    figure = table_figure([[0.2, 0.8], [0.5, 0.5]], [[1.2, -0.2], [0.5, 0.5]], [80, 1, 0.002])
    assert png(figure).startswith(b"\x89PNG")
