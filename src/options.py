"""click types, and errors of one line."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click
import torch

from src.files import nearest
from src.seeds import parse_seeds

P = ParamSpec("P")
R = TypeVar("R")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class SeedList(click.ParamType):
    """`"0-63,100"` -> the list of its seeds."""

    name = "seeds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        try:
            return parse_seeds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Device(click.ParamType):
    """auto (a GPU where there is one), cpu, cuda or cuda:N -> torch.device."""

    name = "auto|cpu|cuda[:n]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> torch.device:
        if isinstance(value, torch.device):
            return value
        count = torch.cuda.device_count() if value != "cpu" else 0
        if value == "auto":
            return torch.device("cuda" if count else "cpu")
        match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", str(value))
        if match is None:
            self.fail(f"'{value}' is no device: write auto, cpu, cuda or cuda:1", param, ctx)
        if value != "cpu" and int(match[1] or 0) >= count:
            self.fail(f"'{value}' is not here (GPUs: {count}): use auto or cpu", param, ctx)
        return torch.device(value)


class DType(click.ParamType):
    """float32, float64, bfloat16 or float16 -> torch.dtype."""

    name = "|".join(DTYPES)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> torch.dtype:
        if isinstance(value, torch.dtype):
            return value
        if value not in DTYPES:
            self.fail(f"no dtype '{value}': did you mean {nearest(value, DTYPES)}?", param, ctx)
        return DTYPES[value]


class Number(click.FloatRange):
    """A range of floats, as click.FloatRange, that takes neither NaN nor infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        return number


class OneLineCommand(click.Command):
    """A command whose usage errors, too, are one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = None
            raise


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a user can mend into an error of one line: bad values, files, full memory.

    Goes below the click decorators, next to the function.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise click.ClickException("the GPU's memory is full: lower --batch") from error
        except (ValueError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error

    return wrapped
