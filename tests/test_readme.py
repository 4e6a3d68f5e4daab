"""The README's commands, links and Python are what the code takes.

What needs no weights of others is run as it is written, in a folder of links to the repository.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import sample
from tests import twins
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line.split("  #")[0].strip() for line in LINES]
FOREIGN = ("--model ", "sample_sd3.py", "sd3_512", "--resume", "exps/2026", "hps", ".zip", ".npz")
"""What shows that a command needs files that do not ship."""
NOT_HERE = ("bash launch.sh test", "bash launch.sh weights pickscore")
SLOW = ("train_distill.py", "eval.compare", "launch.sh demo", "launch.sh rl-demo")
FEWER = {r"--seeds 0-\d+": "--seeds 0-1", r"--repeats \d+": "--repeats 1"}
"""What is asked for less of here, as it takes minutes and shows nothing more."""
OURS = [c for c in COMMANDS if not any(mark in c for mark in FOREIGN) and c not in NOT_HERE]


def marked(command: str) -> Any:
    slow = any(mark in command for mark in SLOW)
    return pytest.param(command, marks=pytest.mark.slow if slow else ())


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which everything of the repository is, and what is written stays."""
    for path in ROOT.iterdir():
        if path.name not in ("exps", "samples", "runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "exps").mkdir()
    for path in (ROOT / "exps").iterdir():
        (tmp_path / "exps" / path.name).symlink_to(path)
    return tmp_path


def test_there_are_commands_to_run() -> None:
    assert {"bash launch.sh demo", "bash launch.sh test"} <= set(COMMANDS)
    assert sum("sample.py " in command for command in OURS) >= 4
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("command", [marked(c) for c in OURS])
def test_a_command_runs_as_it_is_written_but_for_fewer_pictures(command: str, clone: Path) -> None:
    for long, short in FEWER.items():
        command = re.sub(long, short, command)
    done = subprocess.run(
        ["/usr/bin/env", "bash", "-c", command],
        cwd=clone,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "EPD_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python sample.py --mod")]
)
def test_sample_takes_the_options(command: str, tmp_path: Path) -> None:
    """Weights that a reader is to bring are stood in for by a tiny network of their size."""
    words = shlex.split(command)[2:]
    model = (
        twins.saved(tmp_path, twins.sd())
        if "--prompt" in words
        else tiny_model(tmp_path, label_dim=0, img_resolution=32)
    )
    words[words.index("--model") + 1] = str(model)
    result = CliRunner().invoke(sample.main, [*words, "--dry-run", "--device", "cpu"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("code", [c for name, c in BLOCKS if name == "python"])
def test_the_python_imports_what_there_is(code: str) -> None:
    exec("\n".join(line for line in code.splitlines() if line.startswith("from ")), {})


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target.partition("#")[0]).exists()
