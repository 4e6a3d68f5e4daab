"""The launcher, on tiny twins of the models of training/ppo/cfgs and of HPS."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from rewards import clip, fashion
from solvers.predictor import Predictor, find_predictor, load_predictor, save_predictor
from src.runs import Metrics, read_sealed
from tests import twins as pipelines
from tests.rewards.networks import OPEN_CLIP, open_clip_state
from training.ppo import launch
from training.ppo.config import Config, Data, RewardSettings, load_config

ROOT = Path(__file__).parents[3]
CFGS = ROOT / "training" / "ppo" / "cfgs"
SD3 = str(CFGS / "sd3_512.yaml")
FAMILIES = {"sd15": "sd", "sd3_512": "sd3", "sd3_1024": "sd3", "flux_dev": "flux"}
SIDE = 16
SMALL = {
    "model.resolution": str(SIDE),
    "ppo.rollout_batch_size": "4",
    "ppo.minibatch_size": "4",
    "ppo.rloo_k": "4",
    "ppo.eval_prompts": "2",
    "ppo.eval_interval": "2",
    "ppo.steps": "3",
    "logging.save_interval": "2",
    "logging.tensorboard": "false",
    "reward.judges": "[]",
}


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever weights this machine has, none are found; HPS is small."""
    for name in ("EPD_HPS", "EPD_SD3", "EPD_CLIP"):
        monkeypatch.delenv(name, raising=False)
    for name in ("EPD_WEIGHTS", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(clip, "config_named", lambda _name: OPEN_CLIP)


def write_twins(name: str, folder: Path, **recipe: Any) -> Path:
    """What a file needs: its model, the predictor for its size, and HPS."""
    family = "sdxl" if recipe else FAMILIES[name.removesuffix("_guided")]
    makers = {**pipelines.MAKERS, "sdxl": pipelines.sdxl}
    pipelines.saved(folder / "model", makers[family]())
    snapshot = load_config(CFGS / f"{name}.yaml").data.predictor_snapshot
    predictor = load_predictor(find_predictor(snapshot))
    own = dataclasses.replace(predictor.recipe, img_resolution=SIDE, **recipe)
    save_predictor(Predictor(predictor.table, own), folder / "start.pkl")
    torch.save({"state_dict": open_clip_state()}, folder / "hps.pt")
    return folder


def on_twins(name: str, folder: Path, *changes: str) -> list[str]:
    """The command line of a file on the twins in `folder`."""
    places = {
        "data.predictor_snapshot": str(folder / "start.pkl"),
        "model.model": str(folder / "model"),
        "reward.weights_path": str(folder / "hps.pt"),
        "run.output_root": str(folder / "runs"),
    }
    every = [f"{key}={value}" for key, value in (places | SMALL).items()]
    given = [part for change in (*every, *changes) for part in ("--override", change)]
    return ["--config", str(CFGS / f"{name}.yaml"), "--device", "cpu", *given]


def start(*arguments: str) -> Result:
    return CliRunner().invoke(launch.main, list(arguments))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twins of sd3_512.yaml."""
    return write_twins("sd3_512", tmp_path_factory.mktemp("twins"))


def refused(result: Result) -> str:
    assert result.exit_code != 0
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


@pytest.mark.parametrize("name", ["sd15", "sd3_1024", "sd3_512_guided", "flux_dev_guided"])
def test_a_published_file_runs_on_twins_from_its_own_yaml(name: str, tmp_path: Path) -> None:
    done = start(*on_twins(name, write_twins(name, tmp_path)))
    assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "runs").iterdir()
    lines = Metrics(folder / "logs" / "metrics.jsonl").read()
    assert [line["step"] for line in lines if "reward/hps" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval/hps_gain" in line] == [0, 2]
    begun = load_predictor(tmp_path / "start.pkl")
    ended = load_predictor(folder / "export" / "network-snapshot-export-step000003.pkl")
    assert ended.recipe.training["ppo"]["step"] == 3
    guided = name.endswith("_guided")
    assert bool((ended.table.r - begun.table.r).abs().max() > 0) is not guided
    assert (ended.recipe.schedule_type, ended.nfe) == (begun.recipe.schedule_type, begun.nfe)
    assert (ended.table.guidance is not None) is guided


def test_a_pipeline_without_a_backend_of_its_own_is_trained_by_override(tmp_path: Path) -> None:
    name, grid = "StableDiffusionXLPipeline", torch.logspace(1.1, -1.4, 11).double().tolist()
    about = {"backend": name, "schedule_type": "custom", "sigmas": tuple(grid)}
    changes = (f"model.backend={name}", "model.schedule_type=custom", "ppo.steps=2")
    changes += ("model.backend_options.dtype=float32",)
    done = start(*on_twins("sd15", write_twins("sd15", tmp_path, **about), *changes))
    assert done.exit_code == 0, done.output
    assert "2 steps in" in done.output


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.stepz=1", "did you mean ppo.steps?"),
        ("model.num_steps=9", "model.num_steps 9 is not that of"),
        ("data.predictor_snapshot=sd3-512-bst", "sd3-512-best"),
        ("data.prompt_csv=nowhere.csv", "nowhere.csv: No such file"),
        ("data.heldout_prompts=null ppo.eval_prompts=2000", "leaves none of src/prompts"),
        ("data.heldout_prompts=src/prompts/train.txt", "held-out prompts are not trained on"),
        ("data.heldout_prompts={folder}/one.txt", "one.txt has 1 prompt: 2 or more"),
        ("reward.type=hsp reward.weights_path=null", "no reward 'hsp': did you mean hps?"),
        ("reward.judges=[clap]", "no reward 'clap': did you mean clip?"),
        ("reward.weights_path=no.pt", "hps: no such file or folder: no.pt"),
        ("reward.type=my:own", "does nothing for my:own"),
        ("reward.type=fashion-judge", "does nothing for fashion-judge: leave it out"),
        ("reward.type=my:own reward.weights_path=null", "'my:own' cannot be imported"),
        ("reward.judges=[multi:my:own=1]", "'my:own' cannot be imported"),
        ("reward.weights_path=null", "missing weights: hps: HPS v2.1"),
        ("reward.weights_path={folder}/cut.pt", "cut.pt"),
        (f"model.model={load_config(SD3).model.model}", "bash launch.sh weights sd3"),
        ("model.backend_options.model_config=/no/where", "no model at '/no/where'"),
        (
            "ppo.pull_coef=1 ppo.features=rewards.fashion:nothing",
            "'rewards.fashion:nothing' cannot be imported",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(
    override: str, said: str, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(launch, "make_task", loaded)
    (twins / "one.txt").write_text("a fox\na fox\n")
    (twins / "cut.pt").write_bytes((twins / "hps.pt").read_bytes()[:999])
    changes = override.replace("{folder}", str(twins)).split(" ")
    assert said in refused(start(*on_twins("sd3_512", twins, *changes)))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("os:getcwd", "ppo.features fails on float32 [2, 3,"),
        ("torch:mean", "must return [2, F], not []"),
    ],
)
def test_features_that_are_none_are_refused_before_there_is_a_folder(
    function: str, said: str, twins: Path, tmp_path: Path
) -> None:
    changes = f"run.output_root={tmp_path / 'runs'}", f"ppo.features={function}"
    changes += ("ppo.pull_coef=0.1",)
    assert said in refused(start(*on_twins("sd3_512", twins, *changes)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("key", "function", "said"),
    [
        ("type", "operator:add", "operator:add fails on float32 [2, 3, 16, 16]: TypeError"),
        ("judges", "[operator:add]", "operator:add fails on float32 [2, 3, 16, 16]: TypeError"),
        ("judges", "[tests.eval.drawings:shapeless]", "must return a tensor [2], not []"),
    ],
)
def test_rewards_and_judges_that_fail_are_refused_before_there_is_a_folder(
    key: str, function: str, said: str, twins: Path, tmp_path: Path
) -> None:
    changes = [f"run.output_root={tmp_path / 'runs'}", f"reward.{key}={function}"]
    changes += ["reward.weights_path=null"] * (key == "type")
    assert said in refused(start(*on_twins("sd3_512", twins, *changes)))
    assert not (tmp_path / "runs").exists()


def test_a_reward_of_texts_is_refused_for_a_model_of_classes(tmp_path: Path) -> None:
    config = ("--config", "training/ppo/cfgs/fashion_mnist_guided.yaml")
    changes = ("reward.judges=[efficientnet-minilm]", f"run.output_root={tmp_path / 'runs'}")
    changes = [part for change in changes for part in ("--override", change)]
    assert "efficientnet-minilm judges images by their prompts" in refused(
        start(*config, *changes)
    )
    assert not (tmp_path / "runs").exists()


def test_a_model_of_another_family_and_a_run_that_is_not_there_are_refused(
    twins: Path, tmp_path: Path
) -> None:
    write_twins("sd15", tmp_path)
    said = refused(start(*on_twins("sd3_512", twins, f"model.model={tmp_path / 'model'}")))
    assert "model.backend sd3 is not that of" in said
    assert "which is ldm" in said
    for arguments, words in (
        ([], "--config is missing"),
        (["--config", "nowhere.yaml"], "no such file: nowhere.yaml"),
        (["--resume", "nowhere"], "no run and no checkpoint at nowhere"),
        (["--config", SD3, "--resume", "latest", "--run-name", "none"], "no run 'none' with"),
        (["--resume", "latest", "--run-name", "none"], "no run 'none' with"),
    ):
        assert words in refused(start(*arguments))


def test_a_dry_run_prints_settings_that_read_back_and_what_is_missing(tmp_path: Path) -> None:
    own = ("--override", "reward.judges=['my:own']")
    done = start(
        "--config", SD3, "--dry-run", "--run-name", "12", "--override", "ppo.steps=7", *own
    )
    assert done.exit_code == 0, done.output
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    config = load_config(tmp_path / "resolved.yaml")
    assert (config.run.run_name, config.ppo.steps) == ("12", 7)
    said = [line.split(":")[2].strip() for line in done.stderr.splitlines()]
    assert said == ["hps", "own' cannot be imported", "sd3"]


def test_prompts_are_held_out_of_the_one_file_that_there_is(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(20)))
    changes = ["data.heldout_prompts=null", f"data.prompt_csv={tmp_path / 'p.txt'}"]
    config = load_config(SD3, [*changes, "ppo.eval_prompts=5"])
    trained, kept = launch.prompts_of(config)
    assert (len(trained), len(kept)) == (15, 5)
    assert not set(trained) & set(kept)
    assert launch.prompts_of(config) == (trained, kept)


def test_one_path_of_weights_is_the_rewards_own() -> None:
    """Of an aesthetic score, which CLIP's come before, its head."""
    for name, own in (("aesthetic", "aesthetic"), ("hps", "hps"), ("clip", "clip")):
        reward = RewardSettings(type=name, weights_path="here.pt")
        config = Config(Data("start.pkl"), reward)
        assert launch.weight_paths(config) == {own: "here.pt"}


def run_of(folder: Path, name: str) -> Path:
    (run,) = folder.glob(f"*-{name}")
    return run


NEAR_FINE = ("ppo.pull_coef=0.1", "ppo.features=rewards.fashion:features")


def test_a_run_that_was_cut_goes_on_as_if_it_never_was_but_not_with_other_images(
    twins: Path, tmp_path: Path
) -> None:
    root, latest = f"run.output_root={tmp_path}", ("--run-name", "cut", "--resume", "latest")
    given = on_twins("sd3_512", twins, root, *NEAR_FINE)
    cut = start(*given, "--max-steps", "2", "--run-name", "cut")
    for change, words in (
        ("model.guidance_rate=5", "model.guidance_rate 5.0 is not that of"),
        ("ppo.learning_rate=0.1", "was made with ppo.learning_rate 7e-05, not 0.1"),
        ("model.backend_options.negative_prompt=blur", "negative_prompt None, not blur"),
    ):
        again = start("--resume", str(run_of(tmp_path, "cut")), "--override", change)
        assert words in refused(again)
    for change in (("--run-name", "other"), ("--override", f"run.output_root={tmp_path}/other")):
        checkpoint = run_of(tmp_path, "cut") / "checkpoints" / "checkpoint-00000002.pt"
        for path in (run_of(tmp_path, "cut"), checkpoint):
            said = refused(start("--resume", str(path), *change))
            assert "own folder: leave out --run-name and run.output_root" in said
    assert start("--resume", str(run_of(tmp_path, "cut")), "--max-steps", "2").exit_code == 0
    done = [cut, start(*given, "--run-name", "whole"), start(*given, *latest)]
    assert [each.exit_code for each in done] == [0, 0, 0], done[-1].output
    both = [run_of(tmp_path, name) for name in ("cut", "whole")]
    ends = [run / "export" / "network-snapshot-export-step000003.pkl" for run in both]
    one, other = (load_predictor(path).table for path in ends)
    assert one.r.equal(other.r)
    assert one.weight.equal(other.weight)
    steps = Metrics(both[0] / "logs" / "metrics.jsonl").read()
    assert [line["step"] for line in steps if "reward" in line] == [1, 2, 3]
    config = load_config(both[0] / "configs" / "resolved_config.yaml")
    assert launch.features_of(config) is fashion.features
    assert all(line["reward/pull"] > 0 for line in steps if "reward" in line)
    assert read_sealed(both[0] / "checkpoints" / "checkpoint-00000003.pt")["step"] == 3


def brightness(images: Tensor, _prompts: Sequence[str]) -> Tensor:
    """A reward that needs no weights: the mean of the pixels, [B]."""
    return images.mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("degree", ["1", "2"])
def test_two_ranks_write_one_folder_and_the_export_of_one(
    twins: Path, tmp_path: Path, degree: str
) -> None:
    reward = "reward.type=tests.training.ppo.test_launch:brightness"
    changes = (reward, "reward.weights_path=null", f"run.output_root={tmp_path}")
    changes += ("model.backend_options.dtype=float32",)  # half an answer travels, in half
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "training.ppo.launch", *on_twins("sd3_512", twins, *changes)]
    command += ["--run-name", "two", "--points_degree", degree]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    assert start(*on_twins("sd3_512", twins, *changes), "--run-name", "one").exit_code == 0
    ends = [run_of(tmp_path, name) / "export" for name in ("one", "two")]
    alone, shared = (load_predictor(p / "network-snapshot-export-step000003.pkl") for p in ends)
    assert torch.allclose(alone.table.r, shared.table.r, atol=1e-6)
