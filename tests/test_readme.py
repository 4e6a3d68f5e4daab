"""The README's commands and links are what the code takes."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import sample
from tests import twins
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
SAMPLES = [c.partition("sample.py ")[2] for c in COMMANDS if "sample.py " in c]


def test_there_are_commands_to_look_at() -> None:
    assert len(SAMPLES) >= 4
    assert "bash launch.sh demo" in COMMANDS
    assert "bash launch.sh test" in COMMANDS


@pytest.mark.parametrize("options", SAMPLES)
def test_sample_takes_the_options(options: str, tmp_path: Path) -> None:
    """Weights that a reader is to bring are stood in for by a tiny network of their size."""
    words = shlex.split(options)
    if "--model" in words:
        at = words.index("--model") + 1
        size = 64 if "64" in words[at] else 32
        classes = 1000 if "imagenet" in words[at] else 0
        by_text = "--prompt" in words
        words[at] = str(
            twins.saved(tmp_path, twins.sd())
            if by_text
            else tiny_model(tmp_path, label_dim=classes, img_resolution=size)
        )
    result = CliRunner().invoke(sample.main, [*words, "--dry-run", "--device", "cpu"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash launch.sh ")])
def test_launch_knows_the_sub_command(command: str) -> None:
    listed = re.findall(r"^([a-z-]+)  ", (ROOT / "launch.sh").read_text(), re.MULTILINE)
    assert command.split()[2] in listed


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target.partition("#")[0]).exists()
