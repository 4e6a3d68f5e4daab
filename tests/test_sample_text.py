"""sample.py and sample_sd3.py on a text-to-image model, from options to files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import sample
import sample_sd3
from solvers.predictor import find_predictor, load_predictor, save_predictor
from src.images import read_png
from tests import twins

Run = Callable[..., Result]
EULER = ("--solver", "euler", "--num_steps", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twins.saved(tmp_path_factory.mktemp("sd3") / "tiny", twins.sd3())


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """Run sample.py on the twin into tmp_path/out."""

    def invoke(*options: str, out: str = "out") -> Result:
        common = ["--model", str(model), "--device", "cpu", "--outdir", str(tmp_path / out)]
        return CliRunner().invoke(sample.main, [*common, *options])

    return invoke


def subjects(folder: Path) -> list[tuple[int, str]]:
    index = json.loads((folder / "samples.json").read_text())
    return [(entry["seed"], entry["prompt"]) for entry in index["images"]]


def refused(result: Result) -> str:
    assert result.exit_code != 0
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    return lines[0]


def test_the_ith_prompt_is_for_the_ith_seed(run: Run, tmp_path: Path) -> None:
    options = ("--seeds", "0-3", "--batch", "3", "--negative-prompt", "blur")
    result = run(*EULER, *options, "--prompt", "a", "--prompt", "b")
    assert result.exit_code == 0, result.output
    assert "on a CPU the network runs in float32" in result.output
    assert "the negative prompt has no effect at guidance_rate 1" in result.output
    assert subjects(tmp_path / "out") == [(0, "a"), (1, "b"), (2, "a"), (3, "b")]
    image, text = read_png(tmp_path / "out" / "000001.png")
    assert image.shape == (3, 16, 16)
    recipe = json.loads(text["recipe"])
    assert (recipe["prompt"], recipe["seed"], recipe["resolution"]) == ("b", 1, "16x16")


def test_an_image_hangs_on_its_seed_and_prompt_alone(run: Run, tmp_path: Path) -> None:
    """To a step of the bytes: kernels differ between batch sizes."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    options = (*EULER, "--guidance_rate", "4", "--seeds", "0-1")
    run(*options, "--prompt-file", str(tmp_path / "p.txt"), "--release_encoders", out="together")
    run(*options[:-1], "1", "--prompt", "b", "--batch", "1", out="alone")
    together, alone = (read_png(tmp_path / out / "000001.png")[0] for out in ("together", "alone"))
    assert torch.allclose(together, alone, atol=1.01 / 255)


def test_guidance_by_step_and_a_negative_prompt_are_another_picture_and_equal_rates_the_same(
    run: Run, tmp_path: Path
) -> None:
    options = (*EULER, "--seeds", "0", "--prompt", "a")
    run(*options, "--guidance_rate", "5", out="constant")
    steps = int(EULER[EULER.index("--num_steps") + 1]) - 1
    run(*options, "--guidance", ",".join(["5"] * steps), out="same")
    run(*options, "--guidance", ",".join(["5", *["1"] * (steps - 1)]), out="other")
    run(*options, "--guidance_rate", "5", "--negative-prompt", "blur", out="negative")
    constant, same, other, negative = (
        read_png(tmp_path / out / "000000.png")[0]
        for out in ("constant", "same", "other", "negative")
    )
    assert not torch.equal(constant, negative)
    assert torch.equal(constant, same)
    assert not torch.equal(constant, other)
    assert "write one rate" in refused(run(*options, "--guidance", "1,2,3,4,5,6,7,8,9", out="x"))


def test_a_prompt_of_a_file_is_known_by_its_number(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    file = ("--prompt-file", str(tmp_path / "p.txt"))
    run(*EULER, *file, "--seeds", "1-4", out="seed")
    assert subjects(tmp_path / "seed") == [(1, "b"), (2, "c"), (3, "a"), (4, "b")]
    run(*EULER, *file, "--seeds", "1,7", "--prompts_by", "order", out="order")
    assert subjects(tmp_path / "order") == [(1, "a"), (7, "b")]


def test_another_range_of_seeds_does_not_give_a_picture_another_prompt(
    run: Run, tmp_path: Path
) -> None:
    prompts = ("--prompt", "apple", "--prompt", "dog")
    run(*EULER, *prompts, "--seeds", "0-3")
    before = subjects(tmp_path / "out")
    error = run(*EULER, *prompts, "--seeds", "1-4").output
    assert "000001.png says prompt 'dog', this would be 'apple'" in error
    assert subjects(tmp_path / "out") == before
    tiled = run(*EULER, *prompts, "--seeds", "0-3", "--vae_tiling").output
    assert "another recipe" in tiled


def test_what_is_cut_of_a_long_prompt_is_said_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The twin's tokenizer reads 75 bytes between its two marks."""
    long = "a" * 70 + "andabee"
    run(*EULER, "--seeds", "0-3", "--batch", "2", "--prompt", long, "--prompt", "a" * 75)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "CLIP does not read 'ee'" in line


def test_sd3_has_its_presets(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    options = ["--model", str(model), "--prompt-file", str(tmp_path / "p.txt"), "--seeds", "1-2"]
    for size, words in (([], "goes up to 256"), (["--resolution", "64"], "is for 512 pixels")):
        with pytest.raises(SystemExit):
            sample_sd3.main([*options, *size])
        assert words in capsys.readouterr().err
    shipped = load_predictor(find_predictor("tiny-sd3/epd-k2-6nfe"))
    ours = replace(shipped, recipe=replace(shipped.recipe, img_resolution=16))
    save_predictor(ours, tmp_path / "ours.pkl")
    place = ["--outdir", str(tmp_path / "out"), "--predictor", str(tmp_path / "ours.pkl")]
    with pytest.raises(SystemExit) as done:
        sample_sd3.main([*options, *place])
    assert done.value.code == 0
    assert subjects(tmp_path / "out") == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a", "--class", "3"), "--prompt and --class are given"),
        (("--prompt", "a", "--prompt", "b", "--seeds", "0"), "2 prompts need as many seeds"),
        (("--class", "3"), "takes a text for every image"),
        (("--resolution", "17"), "17 is no multiple of 4"),
        (("--resolution", "big"), "no resolution: write 512"),
        (("--release_encoders",), "needs --prompt"),
        (("--model_config", "no/such"), "model_config is for single files: leave it out for /"),
        (("--prompt-file", "nowhere.txt"), r"nowhere.txt: No such file"),
        (("--afs",), "afs is for VE models"),
        (("--predictor", "sd15-best"), "the model is of sd3"),
        (("--predictor", "sd3-512-best"), "the model goes up to 256"),
    ],
)
def test_what_does_not_fit_is_one_line(options: tuple[str, ...], words: str, run: Run) -> None:
    assert words in refused(run(*options))


@pytest.mark.parametrize("option", ["--channels_last", "--compile"])
def test_a_way_to_be_faster_is_the_same_picture(
    option: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by dynamo, but without a C++ compiler."""
    asked: list[str] = []
    compiled, moved = torch.compile, torch.nn.Module.to

    def compiling(network: Any) -> Any:
        asked.append("--compile")
        return compiled(network, backend="eager")

    def moving(network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        asked.extend(["--channels_last"] if "memory_format" in kwargs else [])
        return moved(network, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(torch.nn.Module, "to", moving)
    given = (*EULER, "--seeds", "0-1", "--guidance_rate", "4", "--prompt", "a red fox")
    assert run(*given, out="plain").exit_code == 0
    assert not asked
    assert run(*given, option, out="fast").exit_code == 0
    assert set(asked) == {option}
    for name in ("000000.png", "000001.png"):
        one, other = (read_png(tmp_path / out / name)[0] for out in ("plain", "fast"))
        assert (one - other).abs().max() <= 1.01 / 255
