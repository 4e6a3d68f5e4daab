"""The command that lays folders of sample.py side by side, and a table's drawing."""

from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image

from src.figures import main, png, table_figure
from src.samples import Samples


def folder(path: Path, shift: float, count: int = 3) -> str:
    about = {"model": "m", "predictor": None, "solver": path.name, "nfe": 5}
    images = torch.linspace(0, 0.5, count).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4) + shift
    samples = Samples(path, about)
    samples.write([(seed, seed) for seed in range(count)], images, [])
    samples.write_index()
    return str(path)


def test_folders_are_laid_side_by_side_and_measured(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "a.png")]
    folders = [folder(tmp_path / name, s) for name, s in (("euler", 0.1), ("fine", 0.0))]
    done = CliRunner().invoke(main, [*folders, *output])
    assert done.exit_code == 0, done.output
    euler, fine = done.output.splitlines()[1:3]
    assert euler.split() == ["euler", "5", "0.199"]  # 2 * 25.4 / 255, by the rule of bytes
    assert fine.split() == ["fine", "5", "0.000"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 50
    done = CliRunner().invoke(main, [folders[0], folder(tmp_path / "b", 0, 2), *output])
    assert "differ in seeds" in done.output


def test_a_table_is_drawn() -> None:
    figure = table_figure([[0.2, 0.8], [0.5, 0.5]], [[1.2, -0.2], [0.5, 0.5]], [80, 1, 0.002])
    assert png(figure).startswith(b"\x89PNG")
