"""What options take, and how their errors look, from a command's arguments to its output."""

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from src.options import BoolFlag, Device, DType, Number, OneLineCommand, SeedList, in_one_line


@click.command(cls=OneLineCommand)
@click.option("--seeds", type=SeedList(), default="0-3", show_default=True)
@click.option("--device", type=Device(), default="auto", show_default=True)
@click.option("--dtype", type=DType(), default="float32", show_default=True)
@click.option("--rho", type=Number(min=1, max=20), default=7.0, show_default=True)
@click.option("--afs/--no-afs", cls=BoolFlag)
@click.option("--grid", cls=BoolFlag)
@click.option("--path", type=Path)
@click.option("--fail", is_flag=True)
def command(path: Path | None, fail: bool, **options: Any) -> None:
    if path and path.suffix == ".safetensors":
        load_file(path)
    elif path:
        path.read_text()
    if fail:
        raise ValueError("13 is\nunlucky")
    click.echo(" ".join(f"{name}={options[name]}" for name in sorted(options)))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def refused(*arguments: str) -> str:
    """The error, which must be one line."""
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    return result.output


@pytest.mark.parametrize(
    ("arguments", "afs", "grid"),
    [
        (["--afs"], True, False),
        (["--afs=True", "--grid", "true"], True, True),
        (["--afs", "False", "--grid=0"], False, False),
        (["--afs", "--no-afs"], False, False),
        (["--no-afs", "--afs", "1"], True, False),
    ],
)
def test_a_flag_takes_a_value_or_none(arguments: list[str], afs: bool, grid: bool) -> None:
    output = run(*arguments).output
    assert output.startswith(f"afs={afs} ")
    assert f"grid={grid} " in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "5-1"], "write '1-5'"),
        (["--device", "gpu"], "write auto"),
        (["--device", "cuda:999"], "is not here"),
        (["--dtype", "float23"], "did you mean float32"),
        (["--rho", "nan"], "not a finite number"),
        (["--afs", "perhaps"], "'perhaps' is not a valid boolean"),
        (["--path", "bad\udcff"], r"'bad\udcff' is not UTF-8 text"),
        (["--nothing"], "No such option"),
        (["--fail"], "13 is unlucky"),
        (["--path", "/nowhere/at/all"], "/nowhere/at/all: No such file"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


def test_defaults_hang_on_the_machine_and_an_error_of_a_library_names_its_kind_and_file(
    tmp_path: Path,
) -> None:
    assert f"device={'cuda' if torch.cuda.is_available() else 'cpu'} " in run().output
    assert "dtype=None" in run("--dtype", "auto").output
    path = tmp_path / "half.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    line = refused("--path", str(path))
    assert line.startswith("Error: SafetensorError: ")
    assert str(path) in line
    assert "--debug" in line
    assert str(run("--fail", "--debug").exception) == "13 is\nunlucky"
    gone = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:30418")
    assert in_one_line(gone).startswith("another rank has ended")
    assert "rank" not in in_one_line(ConnectionResetError(104, "Connection reset by peer"))
