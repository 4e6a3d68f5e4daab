from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from src.options import Device, DType, Number, SeedList, one_line_errors


@click.command()
@click.option("--seeds", type=SeedList(), default="0-3", show_default=True)
@click.option("--device", type=Device(), default="auto", show_default=True)
@click.option("--dtype", type=DType(), default="float32", show_default=True)
@click.option("--rho", type=Number(min=1, max=20), default=7.0, show_default=True)
@click.option("--path", type=Path)
@one_line_errors
def command(
    seeds: list[int], device: torch.device, dtype: torch.dtype, rho: float, path: Path | None
) -> None:
    if path:
        path.read_text()
    if rho == 13:
        raise ValueError("13 is\nunlucky")
    click.echo(f"{seeds} {device} {dtype} {rho}")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_defaults_are_converted_too() -> None:
    assert run("--device", "cpu").output == "[0, 1, 2, 3] cpu torch.float32 7.0\n"


def test_auto_is_a_gpu_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert expected in run().output


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--seeds", "5-1", "write '1-5'"),
        ("--device", "gpu", "write auto"),
        ("--device", "cuda:", "write auto"),
        ("--device", "cuda:999", "is not here"),
        ("--dtype", "float23", "did you mean float32"),
        ("--rho", "nan", "not a finite number"),
        ("--rho", "0.5", "not in the range"),
        ("--rho", "x", "not a valid float"),
    ],
)
def test_a_bad_value_is_named_with_its_mend(option: str, value: str, says: str) -> None:
    result = run(option, value)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_value_error_and_a_missing_file_are_one_line() -> None:
    assert run("--rho", "13").output == "Error: 13 is unlucky\n"
    result = run("--path", "/nowhere/at/all")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "/nowhere/at/all" in result.output


def test_help_shows_what_can_be_written() -> None:
    text = run("--help").output
    assert "auto|cpu|cuda[:n]" in text.lower()
    assert "float32|float64|bfloat16|float16" in text.lower()
    assert "default: 0-3" in text
