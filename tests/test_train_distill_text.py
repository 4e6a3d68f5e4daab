"""train_distill.py on text-to-image models, whose tables sample.py takes."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import sample
import train_distill
from solvers.predictor import load_predictor
from tests import twins

ADAM = ("--method", "gradient", "--total_kimg", "0.004", "--batch", "2", "--validation", "2")
FEW = (*ADAM, "--fine_steps", "5", "--num_steps", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twins.saved(tmp_path_factory.mktemp("sd3") / "tiny", twins.sd3())


def distilled(model: Path, folder: Path, *options: str) -> Result:
    common = ["--model", str(model), "--device", "cpu", "--outdir", str(folder)]
    return CliRunner().invoke(train_distill.main, [*common, *FEW, *options])


def test_a_preset_repeats_itself_on_prompts_at_a_size(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text\na fox\na crow\n")
    prompts = ["--prompts", str(tmp_path / "p.csv"), "--negative_prompt", "grey"]
    options = ["--preset", "sd3-512-best", "--resolution", "24", *prompts]
    result = distilled(model, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    recipe = load_predictor(tmp_path / "out" / "predictor.pkl").recipe
    assert (recipe.backend, recipe.process, recipe.img_resolution) == ("sd3", "flow", 24)
    assert (recipe.guidance_rate, recipe.schedule_type) == (4.5, "flowmatch")
    picture = ["--predictor", str(tmp_path / "out" / "predictor.pkl"), "--prompt", "a fox"]
    place = ["--model", str(model), "--outdir", str(tmp_path / "images"), "--device", "cpu"]
    made = CliRunner().invoke(sample.main, [*picture, *place, "--resolution", "24"])
    assert made.exit_code == 0, made.output


def test_a_network_told_its_guidance_is_distilled_with_it(tmp_path: Path) -> None:
    flux = twins.saved(tmp_path / "flux", twins.flux())
    options = ["--guidance_rate", "3.5", "--resolution", "16"]
    result = distilled(flux, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    recipe = load_predictor(tmp_path / "out" / "predictor.pkl").recipe
    assert (recipe.backend, recipe.guidance_rate) == ("flux", 3.5)
