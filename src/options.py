"""click types, the options that commands share, and errors of one line."""

import math
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import torch
from click.core import ParameterSource

from src.files import from_json, nearest
from src.ranks import await_launcher
from src.seeds import parse_seeds

P = ParamSpec("P")
R = TypeVar("R")
ROOT = Path(__file__).resolve().parent.parent
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")
}
FULL = ("can't allocate memory", "not enough memory", "Unable to allocate")
"""What NumPy and torch's allocator for the CPU say, in errors of no class of their own."""

GONE = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says where another rank has ended."""

SMALLER = "lower --batch, or in stage 2 max_batch_size, decode_batch or reward.batch_size"


class Parsed(click.ParamType):
    """A type of options by the function that reads their text; its ValueError is the message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_device(text: str) -> torch.device:
    """auto (a GPU where there is one), cpu, cuda or cuda:N -> torch.device; else ValueError."""
    count = torch.cuda.device_count() if text != "cpu" else 0
    if text == "auto":
        return torch.device("cuda" if count else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", text)
    if match is None:
        raise ValueError(f"'{text}' is no device: write auto, cpu, cuda or cuda:1")
    if text != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(f"'{text}' is not here (GPUs: {count}): use auto or cpu")
    return torch.device(text)


def parse_dtype(text: str) -> torch.dtype | None:
    """float32, float64, bfloat16 or float16 -> torch.dtype; auto -> None, the model's usual.

    ValueError for another name.
    """
    if text != "auto" and text not in DTYPES:
        raise ValueError(f"no dtype '{text}': did you mean {nearest(text, DTYPES)}?")
    return DTYPES.get(text)


def parse_resolution(text: str) -> tuple[int, int]:
    """`"512"`, or width by height `"768x512"` -> (height, width) in pixels; else ValueError."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if match is None or "0" in match.groups():
        raise ValueError(f"'{text}' is no resolution: write 512, or 768x512")
    return int(match[2] or match[1]), int(match[1])


def parse_named_path(text: str) -> tuple[str, str]:
    """`NAME=PATH` -> (name, path); ValueError for anything else."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"'{text}' should be such as clip=weights/clip")
    return name, path


SeedList = partial(Parsed, "seeds", parse_seeds)
Names = partial(Parsed, "names", lambda text: [n.strip() for n in text.split(",") if n.strip()])
Device = partial(Parsed, "auto|cpu|cuda[:n]", parse_device)
DType = partial(Parsed, "|".join(("auto", *DTYPES)), parse_dtype)
Resolution = partial(Parsed, "pixels|WxH", parse_resolution)
NamedPath = partial(Parsed, "name=path", parse_named_path)


class Number(click.FloatRange):
    """A range of floats, as click.FloatRange, that takes neither NaN nor infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        return number


class BoolFlag(click.Option):
    """A flag that may also be given a value: `--afs`, `--afs=True`, `--afs False`, `--no-afs`.

    Use as `click.option("--afs/--no-afs", cls=BoolFlag)`; it is off where no default is given.
    For commands without arguments, as a word after the flag is taken for its value.
    """

    def __init__(self, *args: Any, **attrs: Any) -> None:
        names = [name.partition("/") for name in args[0]]
        attrs = {"default": False, **attrs, "type": click.BOOL, "flag_value": True}
        super().__init__([on for on, _, _ in names], **attrs, is_flag=False, metavar="[BOOL]")
        self.secondary_opts = [off for _, _, off in names if off]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        if self.secondary_opts:
            off: dict[str, Any] = {"action": "store_const", "const": False}
            parser.add_option(obj=self, opts=self.secondary_opts, dest=self.name, **off)


@contextmanager
def one_line(ctx: click.Context) -> Iterator[None]:
    """Turn any error within into one line of click's; with --debug it is raised as it is."""
    try:
        yield
    except (click.Abort, click.exceptions.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if ctx.meta.get("debug"):
            raise
        await_launcher()
        if isinstance(error, click.UsageError):
            error.ctx = None  # else click tells the usage above it
        if isinstance(error, click.ClickException):
            raise
        raise click.ClickException(in_one_line(error)) from error


def in_one_line(error: Exception) -> str:
    """What the user is told of an error.

    A ValueError of our own says all; of others' errors the kind is named, and the file that was
    being worked on, if they do not name it themselves.
    """
    said = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: {SMALLER}"
    if isinstance(error, MemoryError) or any(words in said for words in FULL):
        return f"the memory is full: {SMALLER}, or take a smaller model ({said[:200]})"
    if isinstance(error, RuntimeError) and any(words in said for words in GONE):
        return "another rank has ended; what is written stays, and the run goes on from there"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ValueError) and frames and is_ours(frames[-1].f_code.co_filename):
        return said
    ours = [frame for frame in reversed(frames) if is_ours(frame.f_code.co_filename)]
    texts = [str(v) for f in ours for v in f.f_locals.values() if isinstance(v, str | Path)]
    places = (t for t in texts if os.sep in t and len(t) < 500 and "\0" not in t)
    file = next((place for place in places if Path(place).exists()), "")
    place = f", at {file}" if file not in said else ""
    return f"{type(error).__name__}: {said[:500]}{place} (--debug shows where)"


def is_ours(file: str) -> bool:
    """Whether a source file is of this repository, and of no package installed within it."""
    return Path(file).resolve().is_relative_to(ROOT) and "site-packages" not in file


MAY_BE_EMPTY = (
    "__metrics",
    "__prompt",
    "__negative_prompt",
    "__solvers",
    "__override",
    "__vary",
    "__weights",
)
"""Options whose empty value means something, or is told of in other words."""


class OneLineCommand(click.Command):
    """A command whose errors are one line each, of usage and of its work; it has `--debug`.

    Its options are understood with `-` and with `_`: --dry-run, --dry_run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings["token_normalize_func"] = lambda name: name.replace("-", "_")
        debug = click.Option(["--debug"], is_flag=True, is_eager=True, expose_value=False)
        debug.help = "On an error, show where it was raised."
        debug.callback = lambda ctx, _, value: ctx.meta.update(debug=value)
        self.params.append(debug)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with one_line(ctx):
            for word in args:
                if not word.isascii() and word != word.encode(errors="ignore").decode():
                    raise click.UsageError(f"{word!a} is not UTF-8 text")
            for word, after in pairwise([*args, "-"]):
                name, is_one, value = word.partition("=")
                empty = not value if is_one else not after
                if name.startswith("--") and empty and name.replace("-", "_") not in MAY_BE_EMPTY:
                    raise click.UsageError(f"{name} is empty: give it a value, or leave it out")
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line(ctx):
            return super().invoke(ctx)


class OneLineGroup(click.Group):
    """Sub-commands; that there is none of a name is said in one line."""

    command_class = OneLineCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with one_line(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        with one_line(ctx):
            return super().resolve_command(ctx, args)


def check_decided(ctx: click.Context, decided: Mapping[str, Any], by: str) -> None:
    """ValueError for an option that is given and says otherwise than what decides it."""
    for name, value in decided.items():
        given = ctx.get_parameter_source(name) != ParameterSource.DEFAULT
        if given and ctx.params[name] != value:
            said = f"--{name} {ctx.params[name]} contradicts {by}, which has {value}"
            raise ValueError(f"{said}: leave the option out")


CONFIG = {
    "resolution": "size",
    "model_name_or_path": "model",
    "model_id": "model",
    "torch_dtype": "dtype",
    "enable_model_cpu_offload": "cpu_offload",
}
"""The entries of the published code's --backend-config, and the options that they are here."""


def set_defaults(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Let --backend-config and --use_fp16 say what other options are unless they are given."""
    defaults = dict(ctx.default_map or {})
    if param.name == "use_fp16" and value:
        defaults["dtype"] = "float16"
    elif value:
        config = from_json(value, "--backend-config")
        if not isinstance(config, dict) or not config.keys() <= CONFIG.keys():
            raise click.UsageError(f"--backend-config takes {', '.join(CONFIG)}, not {value}")
        defaults |= {CONFIG[name]: str(entry) for name, entry in config.items()}
    ctx.default_map = defaults


ASIDE: dict[str, Any] = {"is_eager": True, "expose_value": False, "callback": set_defaults}
"""Of an option that sets the defaults of others, and is no argument of the command."""
MODEL_OPTIONS = (
    click.option("--model", "--model_path", help="Folder, file, hub or shipped name."),
    click.option("--backend", help="What the model must be: edm, ldm, sd3, flux, ..."),
    click.option("--backend-config", help='JSON such as {"resolution": 512}.', **ASIDE),
    click.option("--negative-prompt", help="What guidance leads away from."),
    click.option("--resolution", "size", type=Resolution(), help="By text: 512, 768x512."),
    click.option("--model_config", "config", help="Diffusers folder of what a file lacks."),
    click.option("--cpu_offload", cls=BoolFlag, help="Each part on the GPU while it works."),
    click.option("--vae_tiling", cls=BoolFlag, help="Decode large images in tiles."),
    click.option("--vae_slicing", cls=BoolFlag, help="Decode one image at a time."),
    click.option("--release_encoders", cls=BoolFlag, help="Encode all texts, then free them."),
    click.option("--channels_last", cls=BoolFlag, help="Weights in the order that GPUs prefer."),
    click.option("--compile", cls=BoolFlag, help="Compile the network: slow to start, then fast."),
    click.option("--dtype", type=DType(), default="auto", help="Of the network; x stays float32."),
    click.option("--use_fp16", cls=BoolFlag, help="The same as --dtype float16.", **ASIDE),
    click.option("--device", type=Device(), default="auto"),
)


def model_options(command: Callable[P, R]) -> Callable[P, R]:
    """How a model is opened, and where it works."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command
