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


class Resolution(click.ParamType):
    """`"512"`, or width by height `"768x512"` -> (height, width) in pixels."""

    name = "pixels|WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", str(value))
        if match is None or "0" in match.groups():
            self.fail(f"'{value}' is no resolution: write 512, or 768x512", param, ctx)
        return int(match[2] or match[1]), int(match[1])


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


class OneLineGroup(click.Group):
    """Sub-commands; that there is none of a name is said in one line."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            error.ctx = None
            raise


TEXT_OPTIONS = (
    click.option("--prompt", multiple=True, help="A text; again for the next seed's."),
    click.option("--prompt-file", "--prompt_file", help=".txt, one a line, or .csv (text)."),
    click.option("--negative-prompt", "--negative_prompt", help="What guidance leads away from."),
    click.option("--resolution", type=Resolution(), help="Of text-to-image models: 512, 768x512."),
    click.option("--model_config", help="Diffusers folder with what a single file lacks."),
    click.option("--cpu_offload", is_flag=True, help="Each part on the GPU while it works."),
    click.option("--vae_tiling", is_flag=True, help="Decode large images in tiles."),
    click.option("--vae_slicing", is_flag=True, help="Decode one image at a time."),
    click.option("--release_encoders", is_flag=True, help="Encode all texts, then free them."),
)


def text_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options of text-to-image models."""
    for option in reversed(TEXT_OPTIONS):
        command = option(command)
    return command


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
