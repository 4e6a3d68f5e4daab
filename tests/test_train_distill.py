"""train_distill.py, from its options to the folder that it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import sample
from backends.load import load_backend
from solvers.predictor import load_predictor, save_predictor
from solvers.schedules import polynomial
from src.runs import Metrics, checkpoints, read_sealed, write_sealed
from tests import twins
from train_distill import main

ROOT = Path(__file__).resolve().parent.parent
ADAM = ["--method", "gradient", "--batch", "8", "--tick", "0.032", "--validation", "8"]
ADAM += ["--fine_steps", "9", "--total_kimg", "0.128"]
FIT = ["--total_kimg", "0.016", "--batch", "8", "--M", "3", "--rounds", "2", "--robust=False"]
FIT += ["--validation", "8"]
OPTIONS = {"adam": ADAM, "fit": FIT}
EACH = pytest.mark.parametrize("method", OPTIONS)
Distill = Callable[..., Result]


def distilled(model: Path, folder: Path, *options: str) -> Result:
    """Run train_distill.py."""
    place = [] if "--resume" in options else ["--outdir", str(folder)]
    common = ["--model", str(model), "--device", "cpu"]
    return CliRunner().invoke(main, [*common, *place, *options])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture."""
    means = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).tolist()
    about = {"backend": "analytic", "process": "ve", "shape": [1, 3, 3], "means": means}
    about |= {"std": [0.25] * 4, "weight": [0.25] * 4}
    folder = tmp_path_factory.mktemp("gmm")
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs that were never stopped, by method."""
    folders = {name: tmp_path_factory.mktemp("whole") / name for name in OPTIONS}
    for name, folder in folders.items():
        result = distilled(model, folder, *OPTIONS[name])
        assert result.exit_code == 0, result.output
    return folders


@pytest.fixture
def distill(model: Path, tmp_path: Path) -> Distill:
    """Run train_distill.py on the small mixture into tmp_path/out."""

    def run(*options: str, outdir: str = "out") -> Result:
        return distilled(model, tmp_path / outdir, *options)

    return run


def table(folder: Path) -> tuple[Tensor, ...]:
    return load_predictor(folder / "predictor.pkl").table.tensors()


def untimed(folder: Path) -> list[dict[str, float]]:
    records = Metrics(folder / "metrics.jsonl").read()
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(one: Path, two: Path) -> bool:
    """Whether two runs learned the same to the bit, and say so."""
    equal = all(torch.equal(a, b) for a, b in zip(table(one), table(two), strict=True))
    return equal and untimed(one) == untimed(two)


def refused(result: Result) -> str:
    """The error, which must be one line, but for progress where the machine is slow."""
    assert result.exit_code not in (0, None)
    lines = [line for line in result.output.strip().splitlines() if " in 0" not in line]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_a_run_leaves_its_folder(whole: dict[str, Path]) -> None:
    folder = whole["adam"]
    assert {p.name for p in folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "log.txt", "table.png", "loss.png", "predictor.pkl"),
        *(f"predictor-{i:05d}.pkl" for i in range(1, 5)),
        *("checkpoint-00000003.pt", "checkpoint-00000004.pt"),
    }
    first, *_, last = untimed(folder)
    assert last["trajectories"] == 128
    assert last["rmse_fine"] < first["rmse_fine"] * 1.01
    recipe = load_predictor(folder / "predictor.pkl").recipe
    assert (recipe.teacher, recipe.M, recipe.backend, recipe.afs) == ("heun", 3, "analytic", True)
    assert recipe.training["method"] == "gradient"


def test_without_outdir_the_folder_is_numbered(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["--model", str(model), *FIT, "--rounds", "0"])
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "exps").iterdir()
    assert folder.name == f"00001-{model.name}-4-epd-k2"
    again = CliRunner().invoke(main, ["--model", str(model), "--resume", "latest"])
    assert again.exit_code == 0, again.output
    named = CliRunner().invoke(main, ["--dataset_name", "cifar10", "--resume", "latest"])
    assert "--name cifar10: the run has" in named.output  # not where a model of it might be


def test_either_method_starts_from_another_predictor(distill: Distill, tmp_path: Path) -> None:
    distill(*FIT, "--num_points", "1")
    init = ["--init", str(tmp_path / "out" / "predictor.pkl")]
    fit = ["--total_kimg", "0.016", "--batch", "8", "--rounds", "2", "--validation", "8"]
    assert distill(*fit, *init, outdir="wide").exit_code == 0
    assert "out of reach" in refused(distill(*ADAM, *init, outdir="refused"))
    assert distill(*ADAM, outdir="first").exit_code == 0
    published = ["--init", str(tmp_path / "first" / "predictor.pkl")]
    assert distill(*ADAM, *published, outdir="adam").exit_code == 0
    start = untimed(tmp_path / "out")[-1]["rmse_judged"]
    assert untimed(tmp_path / "wide")[0]["rmse_judged"] == pytest.approx(start, rel=1e-4)
    assert untimed(tmp_path / "wide")[-1]["rmse_judged"] < start
    assert table(tmp_path / "adam")[0].shape == (3, 2)
    assert "num_steps 5" in refused(distill(*fit, *init, "--num_steps", "5", outdir="other"))
    begun = load_predictor(init[1])
    begun.table.r[:2, 0] = torch.tensor([0.0, 1.0])  # where positions do not move by gradients
    save_predictor(begun, tmp_path / "edge.pkl")
    edge = ["--init", str(tmp_path / "edge.pkl"), "--num_points", "1", "--rounds", "0"]
    assert distill(*fit, *edge, outdir="edge").exit_code == 0
    assert table(tmp_path / "edge")[0].allclose(begun.table.r, rtol=0, atol=1e-12)


@EACH
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo itself
def test_a_compiled_network_gives_the_same_table(
    method: str, whole: dict[str, Path], distill: Distill, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Compiled by dynamo, but without a C++ compiler."""
    asked, compiled = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f: asked.append(f) or compiled(f, backend="eager")
    )
    result = distill(*OPTIONS[method], "--compile")
    assert result.exit_code == 0, result.output
    assert len(asked) == 1
    for ours, plain in zip(table(tmp_path / "out"), table(whole[method]), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@EACH
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    distill: Distill, whole: dict[str, Path], tmp_path: Path, method: str, damaged: bool
) -> None:
    """The newest checkpoint gone, as if the last tick had never ended, or cut."""
    out = shutil.copytree(whole[method], tmp_path / "out")
    newest = checkpoints(out)[0]
    content = newest.read_bytes()
    newest.unlink()
    if damaged:
        newest.write_bytes(content[:-100])
    result = distill("--resume", str(out))
    assert result.exit_code == 0, result.output
    assert ("damaged" in result.output) is damaged
    assert same(out, whole[method])


def test_a_run_of_the_former_version_goes_on(
    distill: Distill, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Its settings named try_schedules, its candidates their schedule."""
    out = shutil.copytree(whole["fit"], tmp_path / "out")
    newest, before = checkpoints(out)[:2]
    newest.unlink()
    content = read_sealed(before)
    candidates = content["state"]["candidates"]
    candidates[:] = [[what, "time_uniform", *rest] for what, *rest in candidates]
    write_sealed(before, content)
    with (out / "config.yaml").open("a", encoding="utf-8") as config:
        config.write("try_schedules: false\n")
    result = distill("--resume", str(out))
    assert result.exit_code == 0, result.output
    pairs = zip(table(out), table(whole["fit"]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_resume_refuses_other_settings_and_other_folders(
    distill: Distill, whole: dict[str, Path], tmp_path: Path
) -> None:
    out = str(shutil.copytree(whole["fit"], tmp_path / "out"))
    assert "--num_steps 7" in refused(distill("--resume", out, "--num_steps", "7"))
    assert "no run" in refused(distill("--resume", str(tmp_path / "none")))
    assert "another --outdir" in refused(distill(*FIT))
    config = tmp_path / "out" / "config.yaml"
    text = config.read_text()
    for wrong, says in (
        ("num_stepz: 3", "did you mean num_steps?"),
        ("try_schedules: true", "try_schedules is gone"),
        ("a: [1", "not YAML"),
        (text.replace("num_steps: 4", "num_steps: abc"), "num_steps abc"),
        (text.replace("points: 2", "points: 3"), "was made with points 2"),
        (text.replace("label: null", "label: 1"), "was made with label None"),
        (text.replace("seed: 0", "seed: {a: 1}"), "seed {'a': 1} is out of range"),
        (text.replace("dtype: float32", "dtype: f9"), "dtype f9 is out of range"),
        ("3", "not YAML"),
        (text.replace("batch: 8", "batch: -8"), "batch -8"),
    ):
        config.write_text(wrong)
        assert says in refused(distill("--resume", out)), wrong
    config.write_text(text)
    assert "leave it out" in refused(distill("--resume", out, "--outdir", f"{out}-other"))


def test_a_cache_is_used_and_mended(
    distill: Distill, whole: dict[str, Path], tmp_path: Path
) -> None:
    cache = ["--teacher-cache", str(tmp_path / "cache")]
    distill(*ADAM, *cache, outdir="first")
    files = sorted((tmp_path / "cache").glob("*.pt"))
    files[0].write_bytes(b"broken")
    result = distill(*ADAM, *cache)
    assert result.output.count("making it again") == 1
    assert same(tmp_path / "out", whole["adam"])
    assert sorted((tmp_path / "cache").glob("*.pt")) == files
    (tmp_path / "file").write_text("")
    assert "give a folder" in refused(distill(*ADAM, "--teacher-cache", str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--preset", "cifar10-5nf"], "cifar10-5nfe"),
        (["--preset", "cifar10-5nfe", "--backend", "ldm", "--features", "f.pt"], "backend ldm"),
        (["--schedule_type", "discrete"], "discrete"),
        (["--batch", "8", "--batch_gpu", "3"], "3"),
        (["--guidance_rate", "2"], "needs prompts or classes"),
        (["--class", "9"], "0 to 3"),
        (["--prompts", "no.txt"], "no.txt"),
        (["--class", "1", "--prompts", "no.txt"], "not both"),
        (["--method", "gradient", "--last_distance", "inception"], "--features"),
        (["--method", "gradient", "--distance", "features", "--features", "no.pt"], "no.pt"),
        (["--distance", "l2+0.1*features"], "--features"),
        (["--distance", "distribution", "--features", "no_module:f"], "no_module"),
        (["--distance", "reward"], "--reward"),
        (["--features", "efficientnet-lite0=big", "--distance", "energy"], "8 to 4096 pixels"),
        (["--samples", "8", "--total_kimg", "1"], "not both"),
        (["--init", "cifar10-5nfe", "--sigma_max", "20"], "cifar10-5nfe has its own noise levels"),
        (
            ["--reward", "clip", "--distance", "l2+0.1*reward"],
            "clip judges images by their prompts",
        ),
        (["--reward", "clip"], "clip does nothing: leave it out"),
        (["--distance", "reward", "--reward", "clipp"], "clip"),
        (["--distance", "lpips"], "unknown distance 'lpips'"),
        (["--guidance_type", "uncond", "--guidance_rate", "2"], "guidance_rate 1"),
        (["--guidance_type", "cfg"], "guidance_type cfg needs a guidance_rate"),
        (["--backend", "sd3"], "sd3"),
        (["--lr", "nan"], "nan"),
        (["--method", "gradient", "--distance", "lpips"], "unknown distance 'lpips'"),
        (["--last_distance", "huber"], "last_distance huber does nothing in a fit"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    distill: Distill, tmp_path: Path, options: list[str], names: str
) -> None:
    assert names in refused(distill(*options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("ways", [["--no-learn_grid"], [], ["--method", "gradient"]], ids=str)
def test_the_ends_that_are_asked_for_are_those_of_the_predictor(
    process: str, ways: list[str], model: Path, tmp_path: Path
) -> None:
    about = json.loads((model / "config.json").read_text()) | {"process": process}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    ends = ["--sigma_min", "0.05", "--sigma_max", {"ve": "40", "flow": "0.9"}[process]]
    short = ["--total_kimg", "0.016", "--batch", "8", "--M", "3", "--validation", "8"]
    short += ["--schedule_type", {"ve": "polynomial", "flow": "flowmatch"}[process]]
    result = distilled(folder, tmp_path / "out", *ends, *short, *ways, "--num_steps", "4")
    assert result.exit_code == 0, result.output
    sampler = load_predictor(tmp_path / "out" / "predictor.pkl").sampler(
        load_backend(str(folder)).levels
    )
    assert (sampler.sigmas[0], sampler.sigmas[-1]) == pytest.approx((float(ends[3]), 0.05))
    if process == "ve" and ways:
        wanted = polynomial(4, 0.05, 40).tolist()
        assert sampler.sigmas == pytest.approx(wanted)


def test_dry_run_resolves_a_preset_without_its_weights() -> None:
    for name, calls in (("cifar10-5nfe-ipndm", 5), ("sd3-1024-best", 20), ("sd15-best", 20)):
        result = CliRunner().invoke(main, ["--preset", name, "--dry-run", "--lr", "0.1"])
        assert result.exit_code == 0, result.output
        resolved = json.loads(result.stdout)
        assert (resolved["nfe"], resolved["lr"], resolved["method"]) == (calls, 0.1, "gradient")
    fitted = CliRunner().invoke(main, ["--preset", "cifar10-5nfe", "--dry-run", "--method", "fit"])
    assert json.loads(fitted.stdout)["scale_dir"] == 0.05
    error = refused(CliRunner().invoke(main, ["--preset", "cifar10-5nfe"]))
    assert "give --model" in error


def test_the_published_command_is_understood(model: Path) -> None:
    published = (
        "--batch=128 --total_kimg=10 --sampler_stu=ipndm --sampler_tea=dpm --num_steps=4 --M=3 "
        "--afs=True --scale_dir=0.05 --scale_time=0.05 --seed=0 --lr 0.2 --coslr "
        "--predict_x0 True --lower_order_final=False --schedule_type=time_uniform "
        "--schedule_rho=1 --guidance_type uncond --dry-run"
    )
    result = CliRunner().invoke(main, [f"--dataset_name={model}", *published.split()])
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)
    wanted = {"method": "gradient", "solver": "epd-ipndm", "teacher": "dpm2", "samples": 9984}
    wanted |= {"lower_order_final": False, "coslr": True, "model": str(model), "afs": True}
    assert settings.items() >= wanted.items()
    of_preset = ["--preset", "cifar10-5nfe", "--method", "fit", "--features", "x", "--dry-run"]
    shown = CliRunner().invoke(main, of_preset)
    assert json.loads(shown.stdout)["distance"] == "distribution"


def test_a_table_is_fitted_to_what_samples_look_like(
    distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def first(images):\n    return images.flatten(1)[:, :4]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    look = ["--distance", "l2+0.5*distribution", "--features", "mine:first"]
    result = distill(*FIT, *look)
    assert result.exit_code == 0, result.output
    *_, last = untimed(tmp_path / "out")
    assert last["objective"] <= 1.5
    recipe = load_predictor(tmp_path / "out" / "predictor.pkl").recipe
    assert recipe.training["fitted_on"] == ["mine:first"]
    assert distill(*FIT, "--distance", "inception", *look[2:], outdir="named").exit_code == 0
    recipe = load_predictor(tmp_path / "named" / "predictor.pkl").recipe
    assert recipe.training["fitted_on"] == ["mine:first"]  # no Inception looked


def on_prompts(model: Path, folder: Path, *options: str) -> tuple[object, ...]:
    """Distil a text-to-image model a little -> what its recipe says."""
    few = ["--method", "gradient", "--total_kimg", "0.004", "--batch", "2", "--validation", "2"]
    few += ["--fine_steps", "5", "--num_steps", "3"]
    result = distilled(model, folder, *few, *options)
    assert result.exit_code == 0, result.output
    recipe = load_predictor(folder / "predictor.pkl").recipe
    return recipe.backend, recipe.process, recipe.img_resolution, recipe.guidance_rate


def test_text_to_image_models_are_distilled_and_sampled(tmp_path: Path) -> None:
    sd3 = twins.saved(tmp_path / "sd3", twins.sd3())
    (tmp_path / "p.csv").write_text("text\na fox\na crow\n")
    options = ["--preset", "sd3-512-best", "--resolution", "24", "--negative_prompt", "grey"]
    options += ["--prompts", str(tmp_path / "p.csv")]
    assert on_prompts(sd3, tmp_path / "out", *options) == ("sd3", "flow", 24, 4.5)
    picture = ["--predictor", str(tmp_path / "out" / "predictor.pkl"), "--prompt", "a fox"]
    place = ["--model", str(sd3), "--outdir", str(tmp_path / "images"), "--device", "cpu"]
    drawn = CliRunner().invoke(sample.main, [*picture, *place, "--resolution", "24"])
    assert drawn.exit_code == 0, drawn.output
    flux = twins.saved(tmp_path / "flux", twins.flux())  # is told its guidance
    options = ["--guidance_rate", "3.5", "--resolution", "16"]
    assert on_prompts(flux, tmp_path / "told", *options) == ("flux", "flow", 16, 3.5)


def command(model: Path, folder: Path, *options: str) -> list[str]:
    script = [str(ROOT / "train_distill.py"), "--model", str(model), "--device", "cpu"]
    return [*script, "--outdir", str(folder), *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_costs_at_most_a_tick(
    distill: Distill, model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    options = [*ADAM[:-1], "1.6", "--tick", "0.16"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *command(model, out, *options)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 120
    while not checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    if number != signal.SIGKILL:
        assert "go on with --resume" in said
        assert "Traceback" not in said
    assert read_sealed(checkpoints(out)[0])["state"]["learner"]["seen"] > 0
    assert distill("--resume", str(out)).exit_code == 0
    distill(*options, outdir="whole")
    assert same(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("adam", []),
        pytest.param("fit", [], marks=pytest.mark.slow),
        pytest.param("fit", ["--points_degree", "2"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_the_table_of_one(
    whole: dict[str, Path], model: Path, tmp_path: Path, method: str, more: list[str]
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *launcher,
            "--nproc_per_node=2",
            *command(model, tmp_path / "two", *OPTIONS[method], *more),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pairs = zip(table(whole[method]), table(tmp_path / "two"), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-3
    assert len(untimed(tmp_path / "two")) == len(untimed(whole[method]))
