"""launch.sh without its work: nothing here installs anything."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch.sh"


def launch(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/bin/env", "bash", str(LAUNCH), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",)])
def test_it_lists_its_sub_commands_from_any_folder(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = launch(*arguments, cwd=tmp_path)
    assert result.returncode == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert {"setup", "demo", "test", "bench", "doctor", "weights", "check"} <= set(listed)


def test_every_listed_sub_command_is_known(tmp_path: Path) -> None:
    branches = LAUNCH.read_text().split("case $command in")[1]
    for line in launch(cwd=tmp_path).stdout.splitlines():
        if line.startswith("  "):
            assert f"  {line.split()[0]}" in branches


@pytest.mark.parametrize(
    ("typed", "meant"), [("tset", "test"), ("dmeo", "demo"), ("Setup", "setup")]
)
def test_an_unknown_sub_command_names_the_nearest(tmp_path: Path, typed: str, meant: str) -> None:
    result = launch(typed, cwd=tmp_path)
    assert result.returncode == 1
    assert f"did you mean '{meant}'?" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_machine_without_python_is_told_so_in_one_line(tmp_path: Path) -> None:
    result = launch("setup", cwd=tmp_path, EPD_VENV=str(tmp_path / "v"), EPD_PYTHON="/no/python")
    assert result.returncode == 1
    assert result.stderr.startswith("launch.sh: no Python 3.10 or newer")
    assert result.stderr.count("\n") == 1


def test_a_python_without_venv_is_told_so_in_one_line(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\n')
    fake.chmod(0o755)
    result = launch("setup", cwd=tmp_path, EPD_VENV=str(tmp_path / "v"), EPD_PYTHON=str(fake))
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    result = launch("setup", cwd=tmp_path, EPD_VENV=str(tmp_path / "home"))
    assert result.returncode == 1
    assert "no virtual environment" in result.stderr
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["letter.txt"]


def environment_that_answers(folder: Path, pip: str) -> Path:
    """An environment whose pip install is the shell code `pip`; the other calls succeed."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    python = folder / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"pip install"*) {pip};; *sha256*) echo hash;; esac\n'
    )
    python.chmod(0o755)
    return folder


def test_packages_are_installed_once_and_again_only_when_interrupted(tmp_path: Path) -> None:
    venv = environment_that_answers(tmp_path / "v", f"echo x >> {tmp_path}/installs")
    for _ in range(2):
        assert launch("setup", cwd=tmp_path, EPD_VENV=str(venv)).returncode == 0
    assert (tmp_path / "installs").read_text() == "x\n"
    (venv / "requirements.sha256").unlink()
    launch("setup", cwd=tmp_path, EPD_VENV=str(venv))
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
    result = launch("test", cwd=tmp_path, EPD_VENV=str(venv))
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]
    assert len(result.stderr.splitlines()) == 2  # what it began, and why it stopped
    assert not (venv / "requirements.sha256").exists()
