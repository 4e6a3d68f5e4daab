"""The sub-commands of launch.sh for stage 2, with a Python that only tells what it was asked."""

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import sample
from tests.training.ppo.small import CFGS

LAUNCH = Path(__file__).parents[3] / "launch.sh"
ANSWERS = """#!/bin/sh
case "$*" in
  *"pip "* | *version_info*) ;;
  *sha256*) echo hash ;;
  *) echo "$*" ;;
esac
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    (folder / "requirements.sha256").write_text("hash")
    (folder / "bin" / "python").write_text(ANSWERS)
    (folder / "bin" / "python").chmod(0o755)
    return folder


def asked(venv: Path, *arguments: str, **more: str) -> str:
    """The arguments that Python was given."""
    done = subprocess.run(
        ["/usr/bin/env", "bash", str(LAUNCH), *arguments],
        env={**os.environ, "EPD_WEIGHTS": str(venv), "EPD_VENV": str(venv), **more},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("train-sd15", "sd15"),
        ("train-sd3-512", "sd3_512"),
        ("train-sd3-1024", "sd3_1024"),
        ("train-flux", "flux_dev"),
    ],
)
def test_training_takes_its_file_and_hands_options_on(command: str, name: str, venv: Path) -> None:
    told = asked(venv, command, "--max-steps", "3")
    wanted = f"-m training.ppo.launch --config training/ppo/cfgs/{name}.yaml --max-steps 3"
    assert told == wanted
    assert (CFGS / f"{name}.yaml").is_file()


def test_several_ranks_go_through_torchrun(venv: Path) -> None:
    told = asked(venv, "train-sd15", EPD_RANKS="2")
    assert told.startswith("-m torch.distributed.run --master_port=12345 --nproc_per_node=2 -m")


@pytest.mark.parametrize("name", ["sd15", "sd3-512", "sd3-1024", "flux"])
def test_sampling_options_are_those_of_sample_py(name: str, venv: Path) -> None:
    told = asked(venv, f"sample-{name}", "--predictor", "ours.pkl").split()
    assert told[:3] == ["sample.py", "--predictor", f"{name}-best"]
    assert told[-2:] == ["--predictor", "ours.pkl"]
    done = CliRunner().invoke(sample.main, [*told[1:], "--dry-run"])
    assert "no file and no shipped predictor 'ours.pkl'" in done.output


def test_a_model_is_taken_from_where_weights_put_it(venv: Path) -> None:
    hub = "--model stabilityai/stable-diffusion-3-medium-diffusers "
    assert hub in asked(venv, "sample-sd3-512")
    (venv / "stable-diffusion-3-medium-diffusers").mkdir()
    place = f"--model {venv}/stable-diffusion-3-medium-diffusers "
    assert place in asked(venv, "sample-sd3-512")
    assert "--model /mine " in asked(venv, "sample-sd3-512", EPD_SD3="/mine")


def test_scoring_takes_the_sampled_folder_or_those_given(venv: Path) -> None:
    assert asked(venv, "score-flux").startswith("-m eval.score samples/flux --reward hps")
    assert asked(venv, "score-flux", "a", "b").startswith("-m eval.score a b --reward hps")


def test_the_demo_hands_its_options_on(venv: Path) -> None:
    assert asked(venv, "rl-demo", "--seed", "3") == "-m eval.rl_demo --seed 3"
