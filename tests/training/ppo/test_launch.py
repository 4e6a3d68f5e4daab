import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result

from backends.base import Prompt
from solvers.predictor import load_predictor
from src.runs import Metrics, read_sealed
from tests.training.ppo.small import CFGS, config_of, small_hps, start, told, write_twins
from training.ppo import launch
from training.ppo.config import Config, load_config
from training.ppo.launch import prompts_of

ROOT = Path(__file__).parents[3]
SD3 = str(CFGS / "sd3_512.yaml")
WEIGHTS = ("EPD_WEIGHTS", "EPD_HPS", "EPD_SD3", "EPD_CLIP")


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever weights this machine has, none are found; HPS is small."""
    for name in WEIGHTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    small_hps(monkeypatch)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the twins of sd3_512.yaml, with a run of two of its three steps."""
    folder = tmp_path_factory.mktemp("twins")
    write_twins("sd3_512", folder)
    with pytest.MonkeyPatch.context() as patch:
        small_hps(patch)
        done = start(*told("sd3_512", folder), "--max-steps", "2", "--run-name", "cut")
    assert done.exit_code == 0, done.output
    return folder


def refused(result: Result) -> str:
    assert result.exit_code != 0
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def nothing_loads(patch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("something was loaded")

    patch.setattr(launch, "make_task", loaded)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("ppo.stepz=1",), "did you mean ppo.steps?"),
        (("model.num_steps=9",), "model.num_steps 9 is not that of exps/sd3-512"),
        (("data.predictor_snapshot=sd3-512-bst",), "sd3-512-best"),
        (("data.prompt_csv=nowhere.csv",), "nowhere.csv: No such file"),
        (("data.heldout_prompts=null", "ppo.eval_prompts=2000"), "leaves none of src/prompts"),
        (("data.heldout_prompts=src/prompts/train.txt",), "held-out prompts are not trained on"),
        (("reward.type=hsp",), "no reward 'hsp': did you mean hps?"),
        (("reward.judges=[clap]",), "no reward 'clap': did you mean clip?"),
        (("reward.weights_path=no.pt",), "hps: no such file or folder: no.pt"),
        (("reward.type=my:own", "reward.weights_path=a"), "does nothing for my:own"),
        ((), "missing weights: hps: HPS v2.1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(
    overrides: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_loads(monkeypatch)
    given = [part for change in overrides for part in ("--override", change)]
    assert said in refused(start("--config", SD3, "--device", "cpu", *given))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"model.model={config_of('sd3_512').model.model}", "bash launch.sh weights sd3"),
        ("reward.weights_path={folder}/cut.pt", "cut.pt"),
        ("model.backend_options.model_config=/no/where", "no model at '/no/where'"),
    ],
)
def test_what_is_not_here_or_not_whole_is_told_before_anything_is_loaded(
    override: str, words: str, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_loads(monkeypatch)
    (twins / "cut.pt").write_bytes((twins / "hps.pt").read_bytes()[:999])
    override = override.replace("{folder}", str(twins))
    assert words in refused(start(*told("sd3_512", twins, override)))


def test_a_model_of_another_family_is_refused(twins: Path, tmp_path: Path) -> None:
    write_twins("sd15", tmp_path)
    said = refused(start(*told("sd3_512", twins, f"model.model={tmp_path / 'model'}")))
    assert "model.backend sd3 is not that of" in said
    assert "which is ldm" in said


def test_a_dry_run_prints_settings_that_read_back_and_what_is_missing(tmp_path: Path) -> None:
    done = start("--config", SD3, "--dry-run", "--run-name", "12", "--override", "ppo.steps=7")
    assert done.exit_code == 0, done.output
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    config = load_config(tmp_path / "resolved.yaml")
    assert (config.run.run_name, config.ppo.steps) == ("12", 7)
    assert [line.split(":")[2].strip() for line in done.stderr.splitlines()] == ["hps", "sd3"]


def held_out(config: Config, folder: Path, prompts: int) -> tuple[tuple[Prompt, ...], ...]:
    (folder / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(prompts)))
    return prompts_of(config)


def test_prompts_are_held_out_of_the_one_file_that_there_is(tmp_path: Path) -> None:
    changes = ["data.heldout_prompts=null", f"data.prompt_csv={tmp_path / 'p.txt'}"]
    config = load_config(SD3, [*changes, "ppo.eval_prompts=5"])
    trained, kept = held_out(config, tmp_path, 20)
    assert (len(trained), len(kept)) == (15, 5)
    assert not set(trained) & set(kept)
    assert prompts_of(config) == (trained, kept)


def run_of(folder: Path, name: str) -> Path:
    (found,) = (folder / "runs").glob(f"*-{name}")
    return found


def test_a_run_that_was_cut_goes_on_as_if_it_never_was(twins: Path) -> None:
    whole = start(*told("sd3_512", twins), "--run-name", "whole")
    root = f"run.output_root={twins / 'runs'}"
    latest = start(*told("sd3_512", twins, root), "--run-name", "cut", "--resume", "latest")
    assert (whole.exit_code, latest.exit_code) == (0, 0), latest.output
    both = [run_of(twins, name) / "export" for name in ("cut", "whole")]
    one, other = (load_predictor(p / "network-snapshot-export-step000003.pkl") for p in both)
    assert one.table.r.equal(other.table.r)
    assert one.table.weight.equal(other.table.weight)
    steps = Metrics(both[0].parent / "logs" / "metrics.jsonl").read()
    assert [line["step"] for line in steps if "reward" in line] == [1, 2, 3]
    assert read_sealed(both[0].parent / "checkpoints" / "checkpoint-00000003.pt")["step"] == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.guidance_rate=5", "model.guidance_rate 5.0 is not that of"),
        ("ppo.learning_rate=0.1", "was made with ppo.learning_rate 7e-05, not 0.1"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(twins: Path, override: str, words: str) -> None:
    run = str(run_of(twins, "cut"))
    assert words in refused(start("--resume", run, "--override", override))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--config is missing"),
        (("--resume", "nowhere"), "no run and no checkpoint at nowhere"),
        (("--resume", "src"), "is no folder of a run"),
        (("--config", SD3, "--resume", "latest", "--run-name", "none"), "no run 'none' with"),
    ],
)
def test_a_run_that_is_not_there_is_not_resumed(arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(start(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("degree", ["1", "2"])
def test_two_ranks_write_one_folder_and_the_export_of_one(
    twins: Path, tmp_path: Path, degree: str
) -> None:
    reward = "reward.type=tests.training.ppo.small:brightness"
    changes = (reward, "reward.weights_path=null", f"run.output_root={tmp_path}")
    changes += ("model.backend_options.dtype=float32",)  # half an answer travels, in half
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    given = ["-m", "training.ppo.launch", *told("sd3_512", twins, *changes), "--run-name", "two"]
    given += ["--points_degree", degree]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, *given], cwd=ROOT, env=environment, check=True)
    assert start(*told("sd3_512", twins, *changes), "--run-name", "one").exit_code == 0
    (one,), (two,) = (list(tmp_path.glob(f"*-{name}")) for name in ("one", "two"))
    file = "export/network-snapshot-export-step000003.pkl"
    alone, shared = (load_predictor(folder / file).table.r for folder in (one, two))
    assert torch.allclose(alone, shared, atol=1e-6)
