"""sample.py, from its options to the files that it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from sample import main
from solvers.epd import Directions
from solvers.predictor import Predictor, save_predictor
from solvers.recipe import Recipe
from src.images import read_png, save_png
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
Sample = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sample(model: Path, tmp_path: Path) -> Sample:
    """Run sample.py on the tiny model into tmp_path/out."""

    def run(*options: str) -> Result:
        common = ["--model", str(model), "--device", "cpu", "--outdir", str(tmp_path / "out")]
        return CliRunner().invoke(main, [*common, *options])

    return run


def images(folder: Path) -> dict[str, torch.Tensor]:
    return {p.name: read_png(p)[0] for p in sorted(folder.glob("**/[0-9]*.png"))}


def refused(result: Result) -> str:
    """The error, which must be one line."""
    assert result.exit_code != 0
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_one_image_a_seed_with_its_recipe(sample: Sample, tmp_path: Path) -> None:
    result = sample("--solver", "ipndm", "--num_steps", "5", "--seeds", "3-5,1002", "--class", "2")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert sorted(images(out)) == ["000003.png", "000004.png", "000005.png", "001002.png"]
    recipe = json.loads(read_png(out / "000004.png")[1]["recipe"])
    assert (recipe["solver"], recipe["nfe"], recipe["seed"], recipe["class"]) == ("ipndm", 4, 4, 2)
    index = json.loads((out / "samples.json").read_text())
    assert [entry["seed"] for entry in index["images"]] == [3, 4, 5, 1002]


def test_what_is_there_is_kept_and_the_rest_made(sample: Sample, tmp_path: Path) -> None:
    sample("--num_steps", "3", "--seeds", "0-5")
    before = images(tmp_path / "out")
    (tmp_path / "out" / "000002.png").unlink()
    stamp = (tmp_path / "out" / "000001.png").stat().st_mtime_ns
    result = sample("--num_steps", "3", "--seeds", "0-5")
    assert "1 of them new" in result.output
    assert (tmp_path / "out" / "000001.png").stat().st_mtime_ns == stamp
    after = images(tmp_path / "out")
    assert all((after[name] - before[name]).abs().max() <= 1 / 255 for name in before)


def test_pictures_of_a_table_that_has_changed_are_not_kept(sample: Sample, tmp_path: Path) -> None:
    path, ends = tmp_path / "ours.pkl", (0.002, 80.0)
    given = ("--predictor", str(path), "--seeds", "0")
    for places, done in ((0.5, True), (0.5, True), (0.6, False)):
        r = torch.full((2, 1), places).double()
        table = Directions(r, r / r, r / r, r / r)
        recipe = Recipe(3, 1, "polynomial", sigma_min=ends[0], sigma_max=ends[1], afs=False)
        save_predictor(Predictor(table, recipe), path)
        result = sample(*given)
        assert (result.exit_code == 0) is done, result.output
    assert "says table" in result.output or "another recipe" in result.output


def test_another_recipe_does_not_mix_into_a_folder(sample: Sample, tmp_path: Path) -> None:
    sample("--num_steps", "3", "--seeds", "0")
    index = tmp_path / "out" / "samples.json"
    before = index.read_text()
    for broken in ('{"images": []}', '{"recipe": 3}', "[]"):
        index.write_text(broken)
        assert "another --outdir" in refused(sample("--num_steps", "3", "--seeds", "0"))
    index.write_text(before)
    assert "another --outdir" in refused(sample("--num_steps", "4", "--seeds", "0"))
    assert "another --outdir" in refused(
        sample("--num_steps", "3", "--seeds", "1", "--class", "1")
    )


def test_pictures_say_what_they_are_and_the_index_follows(sample: Sample, tmp_path: Path) -> None:
    """A run killed before its index was written leaves pictures and an old index, or none."""
    out = tmp_path / "out"
    sample("--num_steps", "2", "--seeds", "0-5", "--class", "1")
    whole = (out / "samples.json").read_text()
    index = json.loads(whole)
    index["images"] = index["images"][:2]
    (out / "samples.json").write_text(json.dumps(index))
    result = sample("--num_steps", "2", "--seeds", "0", "--class", "1")
    assert "0 of them new" in result.output
    assert (out / "samples.json").read_text() == whole
    (out / "samples.json").unlink()
    sample("--num_steps", "2", "--seeds", "5", "--class", "1")
    assert (out / "samples.json").read_text() == whole


def test_a_picture_of_something_else_is_not_taken(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "out" / "000000.png"
    save_png(path, torch.zeros(1, 16, 16))
    assert "choose another --outdir" in refused(sample("--num_steps", "2", "--seeds", "0"))
    save_png(path, torch.zeros(1, 16, 16), {"recipe": {"seed": 0, "class": 2}})
    assert "choose another --outdir" in refused(sample("--num_steps", "2", "--seeds", "0"))


def test_a_writer_that_fails_is_one_line(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        if path.name == "000002.png":
            raise OSError(28, "No space left on device", str(path))
        save_png(path, torch.zeros(1, 2, 2))

    monkeypatch.setattr("src.samples.save_png", full)
    result = sample("--num_steps", "2", "--seeds", "0-5", "--batch", "2")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("000002.png: No space left on device")


def test_grid_and_trajectory(sample: Sample, tmp_path: Path) -> None:
    sample("--num_steps", "4", "--seeds", "0-3", "--grid", "--trajectory")
    assert read_png(tmp_path / "out" / "grid.png")[0].shape == (1, 34, 34)
    strip = tmp_path / "out" / "trajectory" / "000001.png"
    assert read_png(strip)[0].shape == (1, 16, 48)
    strip.unlink()  # and where a picture is there without its steps, both are made
    sample("--num_steps", "4", "--seeds", "0-3", "--grid", "--trajectory")
    assert strip.exists()


def test_the_published_spellings_are_understood(sample: Sample, tmp_path: Path) -> None:
    written = "--grid=True --subdirs True --return_inters False --max_batch_size 2 --afs False"
    result = sample(*written.split(), "--num_steps", "3", "--seeds", "0-3", "--use_fp16", "True")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "000000" / "000003.png").exists()
    assert (tmp_path / "out" / "grid.png").exists()
    assert not (tmp_path / "out" / "000000" / "trajectory").exists()
    config = ["--backend-config", '{"torch_dtype": "bfloat16"}', "--backend", "edm"]
    result = sample("--dry-run", *config, "--num_steps", "3", "--outdir", str(tmp_path / "dry"))
    assert json.loads(result.output)["dtype"] == "bfloat16"
    assert not (tmp_path / "dry").exists()
    result = CliRunner().invoke(main, ["--predictor", "tiny-sd3/epd-k2-6nfe", "--dry-run"])
    assert json.loads(result.output)["model"] == "tiny-sd3"


@pytest.mark.parametrize(
    ("model", "options", "folder"),
    [
        ("m-3.5-medium", ["--solver", "ipndm-3"], "m-3.5-medium/ipndm-3_nfe17"),
        ("m.pkl", ["--num_steps", "3"], "m/euler_nfe2"),
    ],
)
def test_the_usual_folder_keeps_the_dots_of_names(
    tmp_path: Path, model: str, options: list[str], folder: str
) -> None:
    place = str(tiny_model(tmp_path / model))
    result = CliRunner().invoke(main, ["--model", place, "--dry-run", *options])
    assert json.loads(result.output)["outdir"] == f"samples/{folder}"


@pytest.mark.parametrize("name", ["cifar10-5nfe", "lsun-bedroom-5nfe", "sd15-best"])
def test_a_predictor_never_samples_another_model_in_silence(name: str) -> None:
    error = refused(CliRunner().invoke(main, ["--predictor", name, "--dry-run"]))
    assert "--model" in error


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--solver", "heun"], ["heun", "epd"]),
        (["--solver", "euler"], ["euler", "epd"]),
        (["--no-afs"], ["afs False", "True"]),
        (["--guidance_rate", "2"], ["2", "1"]),
    ],
)
def test_an_option_against_the_predictor_names_both(
    sample: Sample, options: list[str], names: list[str]
) -> None:
    error = refused(sample("--predictor", "cifar10-5nfe", *options))
    assert all(name in error for name in names)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--seeds", "5-1"], "1-5"),
        (["--class", "3"], "0 to 2"),
        (["--solver", "hoin"], "heun"),
        (["--solver", "ipndm-7"], "not 7"),
        (["--num_steps", "1"], "2"),
        (["--predictor", "cifar10-5nf"], "cifar10-5nfe"),
        (["--predictor", "cifar10-5nfe"], "32"),
        (["--model", "no/such"], "no/such"),
        (["--model", "weights/mistyped"], "no model at 'weights/mistyped': give a folder"),
        (["--schedule_type", "flowmatch"], "flowmatch"),
        (["--s_churn", "9"], "edm"),
        (["--s_noise", "3", "--solver", "heun"], "for --solver edm alone"),
        (["--backend", "ldm"], "--backend ldm: the model is of edm"),
        (["--guidance_rate", "2", "--guidance", "1,4"], "2.0 contradicts --guidance, which has"),
        (["--model_config", "no/such"], "model_config is for single files: leave it out for /"),
        (["--backend-config", '{"size": 3}'], "--backend-config takes resolution"),
        (["--prompt", "bad\udcff"], "not UTF-8"),
        (["--predictor", ""], "--predictor is empty"),
        (["--prompt-file="], "--prompt-file is empty"),
    ],
)
def test_bad_input_is_one_line(sample: Sample, options: list[str], names: str) -> None:
    assert names in refused(sample(*options))


def test_churn_depends_on_the_seed_alone(sample: Sample, tmp_path: Path) -> None:
    churn = ["--solver", "edm", "--s_churn", "20", "--num_steps", "6"]
    sample(*churn, "--seeds", "0-6", "--batch", "7")
    sample(*churn, "--seeds", "2-4", "--batch", "2", "--outdir", str(tmp_path / "few"))
    many, few = images(tmp_path / "out"), images(tmp_path / "few")
    assert all((few[name] - many[name]).abs().max() <= 1 / 255 for name in few)
    plain = sample("--solver", "heun", "--num_steps", "6", "--outdir", str(tmp_path / "plain"))
    assert plain.exit_code == 0
    assert (images(tmp_path / "plain")["000003.png"] - few["000003.png"]).abs().max() > 5 / 255


def test_two_ranks_make_the_images_of_one(sample: Sample, model: Path, tmp_path: Path) -> None:
    options = ["--num_steps", "4", "--seeds", "0-11", "--batch", "4"]
    sample(*options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options += ["--model", str(model), "--outdir", str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run(
        [*command, str(ROOT / "sample.py"), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = images(tmp_path / "out"), images(tmp_path / "two")
    assert len(two) == 12
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "two" / "samples.json").read_text())["images"][11]["seed"] == 11


def test_a_seed_that_diverges_is_named(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(x)).reshape(-1, 1, 1, 1) == 1, torch.nan, x)

    monkeypatch.setattr("backends.edm.pixels", decode)
    result = sample("--num_steps", "2", "--seeds", "7,8,9")
    assert "seed 8 became NaN" in result.output.splitlines()[-1]


def test_subdirs_hold_a_thousand_seeds_each(sample: Sample, tmp_path: Path) -> None:
    sample("--num_steps", "2", "--seeds", "999,1000", "--subdirs")
    assert (tmp_path / "out" / "000000" / "000999.png").exists()
    assert (tmp_path / "out" / "001000" / "001000.png").exists()
    error = refused(sample("--num_steps", "2", "--seeds", "999"))
    assert "/out/00" in error
    assert "is there already: add --subdirs, or choose another --outdir" in error
    flat = ("--num_steps", "2", "--seeds", "0", "--outdir", str(tmp_path / "flat"))
    sample(*flat)
    error = refused(sample(*flat, "--subdirs"))
    assert "flat/000000.png is there already: leave --subdirs out, or choose another" in error
    assert not (tmp_path / "flat" / "000000").exists()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype_gives_nearly_the_same_picture(
    sample: Sample, tmp_path: Path, dtype: str
) -> None:
    sample("--num_steps", "4", "--seeds", "0-3")
    reference = images(tmp_path / "out")
    sample("--num_steps", "4", "--seeds", "0-3", "--dtype", dtype, "--outdir", str(tmp_path / "d"))
    other = images(tmp_path / "d")
    worst = max((other[n] - reference[n]).abs().max().item() for n in reference)
    assert worst <= (1 / 255 if dtype == "float64" else 0.3)
