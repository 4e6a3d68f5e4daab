"""launch.sh without its work: it installs nothing, and Python tells what it is asked."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

import sample

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch.sh"


def launch(
    *arguments: str,
    cwd: Path = ROOT,
    script: Path = LAUNCH,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/bin/env", "bash", str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(*arguments: str, **environment: str) -> str:
    """The error, which must be one line."""
    result = launch(*arguments, environment=environment)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("launch.sh: ")
    return result.stderr


def environment_that_answers(folder: Path, pip: str) -> Path:
    """An environment whose pip install is the shell code `pip`; all else is told, and succeeds."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    python = folder / "bin" / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'  *"pip install"*) {pip} ;;\n'
        '  *"pip "* | *version_info*) ;;\n  *sha256*) echo hash ;;\n  *) echo "$*" ;;\nesac\n'
    )
    python.chmod(0o755)
    return folder


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment in which everything is installed."""
    folder = environment_that_answers(tmp_path / "an environment", "exit 1")
    (folder / "requirements.sha256").write_text("hash")
    return folder


def asked(venv: Path, *arguments: str, **more: str) -> str:
    """The arguments that Python was given."""
    here = {"EPD_WEIGHTS": str(venv), "EPD_VENV": str(venv)}
    result = launch(*arguments, environment={**here, **more})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_lists_its_sub_commands_from_any_folder(tmp_path: Path) -> None:
    result = launch(cwd=tmp_path)
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")]
    listed = {words[0] for words in lines}
    assert {"setup", "demo", "test", "bench", "doctor", "weights", "check"} <= listed
    branches = LAUNCH.read_text().split("case $command in")[1]
    assert all(f" {name}" in branches for name in listed if name != "options")


def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path) -> None:
    assert "did you mean 'test'?" in refused("tset")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\n')
    fake.chmod(0o755)
    error = refused("setup", EPD_VENV=str(tmp_path / "v"), EPD_PYTHON=str(fake))
    assert "apt install python3-venv" in error
    error = refused("setup", EPD_VENV=str(tmp_path / "v"), EPD_PYTHON="/no/python")
    assert "no Python 3.10 or newer" in error
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert "no virtual environment" in refused("setup", EPD_VENV=str(tmp_path / "home"))
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_packages_are_installed_once_and_again_only_when_interrupted(tmp_path: Path) -> None:
    venv = environment_that_answers(tmp_path / "v", f"echo x >> {tmp_path}/installs")
    for _ in range(2):
        assert launch("setup", environment={"EPD_VENV": str(venv)}).returncode == 0
    assert (tmp_path / "installs").read_text() == "x\n"
    (venv / "requirements.sha256").unlink()
    launch("setup", environment={"EPD_VENV": str(venv)})
    assert (tmp_path / "installs").read_text() == "x\nx\n"


@pytest.mark.parametrize(
    ("pip", "says"),
    [
        ("echo 'NewConnectionError: Temporary failure in name resolution'; exit 1", "no network"),
        ("echo 'ERROR: No matching distribution found for a==1'; exit 1", "found for a==1"),
        ("exit 1", "pip could not install"),
    ],
)
def test_an_install_that_fails_is_one_line_and_leaves_no_stamp(
    tmp_path: Path, pip: str, says: str
) -> None:
    venv = environment_that_answers(tmp_path / "v", pip)
    result = launch("test", environment={"EPD_VENV": str(venv)})
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]
    assert len(result.stderr.splitlines()) == 2  # what it began, and why it stopped
    assert not (venv / "requirements.sha256").exists()


def test_a_folder_with_spaces_and_cdpath_lead_nowhere_else(tmp_path: Path) -> None:
    """`bash repo/launch.sh` works in its own folder though CDPATH has another `my repo`."""
    for place in ("here", "elsewhere"):
        (tmp_path / place / "my repo").mkdir(parents=True)
    shutil.copy(LAUNCH, tmp_path / "here" / "my repo")
    (tmp_path / "here" / "my repo" / "requirements.txt").write_text("")
    environment_that_answers(tmp_path / "here" / "my repo" / ".venv", "true")
    result = launch(
        *("doctor", "a b"),
        cwd=tmp_path / "here",
        script=Path("my repo/launch.sh"),
        environment={"CDPATH": str(tmp_path / "elsewhere"), "EPD_VENV": ".venv"},
    )
    assert result.stdout == "-m rewards.weights a b\n"


@pytest.mark.parametrize(
    ("command", "name"),
    [("train-sd15", "sd15"), ("train-sd3-1024", "sd3_1024"), ("train-flux", "flux_dev")],
)
def test_training_takes_its_file_and_hands_options_on(command: str, name: str, venv: Path) -> None:
    training = f"-m training.ppo.launch --config training/ppo/cfgs/{name}.yaml --max-steps 3"
    assert asked(venv, command, "--max-steps", "3") == training
    several = asked(venv, command, "--max-steps", "3", EPD_RANKS="2")
    assert several == f"-m src.ranks --master_port=12345 --nproc_per_node=2 {training}"
    assert (ROOT / "training" / "ppo" / "cfgs" / f"{name}.yaml").is_file()


def test_sampling_and_scoring_hand_on_options_and_take_models_from_where_weights_put_them(
    venv: Path,
) -> None:
    for name in ("sd15", "sd3-1024", "flux"):
        words = asked(venv, f"sample-{name}", "--predictor", "ours.pkl").split()
        assert words[:3] == ["sample.py", "--predictor", f"{name}-best"]
        assert words[-2:] == ["--predictor", "ours.pkl"]
        done = CliRunner().invoke(sample.main, [*words[1:], "--dry-run"])
        assert "no file and no shipped predictor 'ours.pkl'" in done.output
    hub = "--model stabilityai/stable-diffusion-3-medium-diffusers "
    assert hub in asked(venv, "sample-sd3-512")
    (venv / "stable-diffusion-3-medium-diffusers").mkdir()
    place = f"--model {venv}/stable-diffusion-3-medium-diffusers "
    assert place in asked(venv, "sample-sd3-512")
    assert "--model /mine " in asked(venv, "sample-sd3-512", EPD_SD3="/mine")
    assert asked(venv, "score-flux").startswith("-m eval.score samples/flux --reward hps")
    assert asked(venv, "score-flux", "a", "b").startswith("-m eval.score a b --reward hps")


def test_the_demo_of_stage_2_shows_the_run_that_it_made(tmp_path: Path) -> None:
    """Not the newest of its folder; and no run that has no best, or was none."""
    shutil.copy(LAUNCH, tmp_path)
    (tmp_path / "src" / "prompts").mkdir(parents=True)
    for name in ("requirements.txt", "src/prompts/composed.txt"):
        (tmp_path / name).write_text("")
    venv = environment_that_answers(tmp_path / "v", "true")
    python = venv / "bin" / "python"
    answers = '*predictor_snapshot*) echo "start of $3" ;;\n *ppo.launch*) echo x; echo "$SAID" ;;'
    python.write_text(python.read_text().replace('  *) echo "$*"', f'  {answers}\n  *) echo "$*"'))
    best = "export/network-snapshot-export-best.pkl"
    run, other = tmp_path / "my place" / "1-scenes", tmp_path / "samples/rl-demo/runs/2-scenes"
    for folder in (run, other):
        (folder / best).parent.mkdir(parents=True)
        (folder / best).write_text("")
        (folder / "learning.png").write_text(folder.name)

    def demo(said: str) -> subprocess.CompletedProcess[str]:
        here = {"EPD_VENV": str(venv), "SAID": said}
        return launch("rl-demo", script=tmp_path / "launch.sh", environment=here)

    result = demo(f"8 steps in {run}; best: {run / best}")
    assert result.returncode == 0, result.stderr
    used = [line.split(" --")[1] for line in result.stdout.splitlines() if "sample.py" in line]
    start = f"predictor start of {run}/configs/resolved_config.yaml"
    assert used == [start, start, *[f"predictor {run / best}"] * 2]
    assert (tmp_path / "samples" / "rl-demo" / "learning.png").read_text() == run.name
    result = demo(f"8 steps in {run}; best: not evaluated")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"no best to show, as {run} evaluated nothing" in result.stderr
    result = demo("  seed: 0")  # of --dry_run, say
    assert (result.returncode, "sample.py" in result.stdout) == (0, False)


def test_the_demos_commands_are_those_that_people_type(venv: Path, tmp_path: Path) -> None:
    """In a copy, as the demo empties its folder."""
    shutil.copy(LAUNCH, tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "samples" / "demo" / "fashion" / "1").mkdir(parents=True)
    here = {"EPD_VENV": str(venv)}
    result = launch("demo", "--device", "cpu", script=tmp_path / "launch.sh", environment=here)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("sample.py")]
    assert len(lines) == 8
    for line in lines:
        words = line.replace("red apple", "red_apple").replace("dog face", "dog_face").split()
        done = CliRunner().invoke(sample.main, [*words[1:], "--dry-run"])
        assert done.exit_code == 0, done.output
