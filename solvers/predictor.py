"""Predictors: a learned table and the recipe to sample with it, and their files.

One format in two dresses, `.pkl` (read by `torch.load(weights_only=True)`) and `.json`, both
with float64 tables, so that converting back and forth changes no bit:

    {"format": "epd-predictor", "format_version": 1,
     "table": {"r": [N, K], "weight": ..., "time_scale": ..., "dir_scale": ..., "known": [N, H]},
     "recipe": {...}}

A table with `guidance` [N] or [N, K] makes it version 2.

The kind of table is the recipe's `solver`; `known` is there only where H is above 0.
`load_predictor` reads published files too. On the command line:

    python -m solvers.predictor show cifar10-5nfe
    python -m solvers.predictor convert published.pkl ours.json
"""

import argparse
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep, Table
from solvers.integrate import MAX_SLOPES
from solvers.process import VE, Process
from solvers.published import decode, from_published, require
from solvers.recipe import (
    FORMAT_VERSION,
    Recipe,
    check_recipe,
    for_flow,
    one_of,
    recipe_from_plain,
    recipe_to_plain,
)
from solvers.sampler import SOLVERS, Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels, custom
from src.pickles import read_pickle

__all__ = [
    "Predictor",
    "Recipe",
    "decode",
    "find_predictor",
    "load_predictor",
    "save_predictor",
    "validate",
]

FORMAT = "epd-predictor"
TABLES = {"epd": Directions, "epd-multistep": MultistepTable}
"""The class of table by the recipe's solver; its fields are the names in the file."""
OF_KNOWN = ("a", "b", "known")
"""Of these names are [N, H]; all others are [N, K]."""
WEIGHT_TOLERANCE = 1e-4
MAX_JSON = 64 << 20
IN_RUN = (
    "predictor.pkl",
    "export/network-snapshot-export-best.pkl",
    "network-snapshot-*.pkl",
    "export/network-snapshot-*.pkl",
)
"""Where a run of stage 1 or 2, ours or the published code's, keeps its best or last predictor."""
EXPS = Path(__file__).resolve().parent.parent / "exps"


@dataclass(frozen=True)
class Predictor:
    """A table of num_steps - 1 rows and the settings that it was learned for."""

    table: Table
    recipe: Recipe

    @property
    def nfe(self) -> int:
        """Network calls one after another for an image.

        2 an interval, parallel multistep 1; 1 less with AFS.
        """
        if self.recipe.solver == "epd-multistep":
            return self.recipe.num_steps - 1 - self.recipe.afs
        calls = 1 + SOLVERS[self.recipe.base].calls
        return calls * (self.recipe.num_steps - 1) - self.recipe.afs

    @property
    def evaluations(self) -> int:
        """Rows through the network for an image: every one of the K points counts."""
        if self.recipe.solver == "epd-multistep":
            return self.recipe.num_points * (self.recipe.num_steps - 1 - self.recipe.afs)
        rows = 1 + self.recipe.num_points * SOLVERS[self.recipe.base].calls
        return rows * (self.recipe.num_steps - 1) - self.recipe.afs

    def solver(self, process: Process = VE) -> EPD | ParallelMultistep:
        """The solver that takes these steps; bases of one order do not look at `max_order`."""
        recipe = self.recipe
        if isinstance(self.table, MultistepTable):
            return ParallelMultistep(self.table, process, recipe.afs)
        ordered = len(SOLVERS[recipe.base].orders) > 1
        options = SolverOptions(
            order=recipe.max_order if ordered else None,
            process=process,
            predict_x0=recipe.predict_x0,
            lower_order_final=recipe.lower_order_final,
        )
        return EPD(self.table, make_solver(recipe.base, options))

    def sampler(self, levels: NoiseLevels) -> Sampler:
        """The sampler that this predictor was learned for, on a network with these levels.

        Raises ValueError where the predictor is for the other process, or for a schedule that
        the network lacks.
        """
        recipe = self.recipe
        return Sampler(
            self.solver(levels.process),
            tuple(recipe_sigmas(recipe, levels).tolist()),
            levels.process,
            recipe.afs,
            recipe.guidance_rate,
        )


def recipe_sigmas(recipe: Recipe, levels: NoiseLevels) -> Tensor:
    """The recipe's grid [num_steps] on a network's levels; ValueError where it has none there."""
    if for_flow(recipe) != (levels.process.name == "flow"):
        model = f"a {levels.process.name} model"
        raise ValueError(
            f"a predictor for {recipe.backend} ({recipe.schedule_type}) is not for {model}"
        )
    if recipe.sigmas is not None:
        return custom(recipe.sigmas)
    shift = levels.shift if recipe.flowmatch_shift is None else recipe.flowmatch_shift
    mu = levels.mu if recipe.flowmatch_mu is None else recipe.flowmatch_mu
    return replace(levels, shift=shift, mu=mu).grid(
        recipe.schedule_type,
        recipe.num_steps,
        rho=recipe.schedule_rho,
        sigma_min=recipe.sigma_min,
        sigma_max=recipe.sigma_max,
    )


def validate(predictor: Predictor) -> Predictor:
    """The predictor itself, if its table and its recipe can be sampled with.

    Raises ValueError in one line with the value: a table of another kind than the recipe's
    solver, a shape that is not [num_steps - 1, num_points], NaN, r outside [0, 1], a time_scale
    that is not positive, or a recipe that cannot be served; and for EPD a negative weight, and
    weights that do not sum to 1 (within 1e-4).
    """
    recipe, table = predictor.recipe, predictor.table
    check_recipe(recipe)
    if not isinstance(table, TABLES[recipe.solver]):
        raise ValueError(f"{recipe.solver} cannot read a table of {type(table).__name__}")
    for name, values in named_tensors(table).items():
        check_shape(name, values, recipe)
        require(name, values, values.isfinite(), "must be a finite number")
    require("r", table.r, (table.r >= 0) & (table.r <= 1), "must lie in [0, 1]")
    require("time_scale", table.time_scale, table.time_scale > 0, "must be above 0")
    if table.guidance is not None:
        require("guidance", table.guidance, table.guidance >= 0, "must be 0 or more")
    if isinstance(table, Directions):
        check_shares(table)
    elif table.a.shape != table.b.shape:
        raise ValueError(f"a {list(table.a.shape)} and b {list(table.b.shape)} differ in shape")
    return predictor


def check_shape(name: str, values: Tensor, recipe: Recipe) -> None:
    """ValueError unless [num_steps - 1, num_points], or 1 to 5 known slopes for OF_KNOWN."""
    shape, found = [recipe.num_steps - 1, recipe.num_points], list(values.shape)
    if name in OF_KNOWN:
        if len(found) != 2 or found[0] != shape[0] or not 1 <= found[1] <= 1 + MAX_SLOPES:
            wanted = f"[{shape[0]}, 1 to {1 + MAX_SLOPES}]"
            raise ValueError(f"{name} has the shape {found}: it must be {wanted}")
    elif found != shape and not (name == "guidance" and found == shape[:1]):
        wanted = f"num_steps {recipe.num_steps} and num_points {recipe.num_points} need"
        raise ValueError(f"{name} has the shape {found}: {wanted} {shape}")


def check_shares(table: Directions) -> None:
    """ValueError unless the weights are >= 0 and sum to 1."""
    require("weight", table.weight, table.weight >= 0, "must not be negative")
    total = table.weight.double().sum(-1)
    whole = (total - 1).abs() <= WEIGHT_TOLERANCE
    require("sum of weight", total, whole, "must be 1, as weights are shares")


def named_tensors(table: Table) -> dict[str, Tensor]:
    """The tensors of a table by the names that files use."""
    names = (f.name for f in dataclasses.fields(table))
    named = dict(zip(names, table.tensors(), strict=False))  # EPD's `known` may not be there
    return named if table.guidance is None else named | {"guidance": table.guidance}


# --- files --------------------------------------------------------------------------------


def save_predictor(predictor: Predictor, path: str | Path) -> None:
    """Write a predictor to `path`, `.pkl` or `.json` by its name, whole or not at all.

    Raises ValueError where the predictor is not valid, or the name ends otherwise.
    """
    path = Path(path)
    content = to_content(validate(predictor))
    if path.suffix == ".json":
        rows = {name: values.tolist() for name, values in content["table"].items()}
        text = json.dumps({**content, "table": rows}, indent=1, allow_nan=False)
        short = re.sub(r"\[\n[^][{}\"]*\]", lambda m: " ".join(m[0].split()), text)
        write_whole(path, short.encode() + b"\n")
    elif path.suffix == ".pkl":
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(path, buffer.getvalue())
    else:
        raise ValueError(f"{path}: a predictor's file ends in .pkl or .json")


def to_content(predictor: Predictor) -> dict[str, Any]:
    """What a file holds, tables as float64 tensors on the CPU."""
    tensors = named_tensors(predictor.table)
    return {
        "format": FORMAT,
        "format_version": 1 if predictor.table.guidance is None else FORMAT_VERSION,
        "table": {name: t.detach().double().cpu().contiguous() for name, t in tensors.items()},
        # through text, so that equal recipes make equal bytes
        "recipe": json.loads(json.dumps(recipe_to_plain(predictor.recipe))),
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write beside and move into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def load_predictor(path: str | Path) -> Predictor:
    """The predictor of a file of ours (.pkl or .json) or of a published pickle, checked.

    Nothing that the file holds is executed (`src.pickles`).

    Raises ValueError in one line with the path: not there, not a predictor, broken, hostile, of a
    future version, or with a table or a recipe that `validate` refuses.
    """
    path = Path(path)
    content = read_json(path) if looks_like_json(path) else read_pickle(path)
    try:
        return validate(from_content(content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def looks_like_json(path: Path) -> bool:
    """Whether the file is text that starts with a brace."""
    if path.suffix == ".json":
        return True
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] == b"{"
    except OSError:
        return False


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError in one line for anything that is not JSON."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes is no predictor")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None


def from_content(content: Any) -> Predictor:
    """A predictor from the content of a file, ours or published."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a predictor")
    if "format" not in content:
        table, entries = from_published(content)
        return Predictor(table, recipe_from_plain(entries))
    version = content.get("format_version")
    if content["format"] != FORMAT or type(version) is not int:
        raise ValueError('it is neither a predictor of ours nor a published one with a "model"')
    if not 1 <= version <= FORMAT_VERSION:
        known = f"this code reads up to {FORMAT_VERSION}, so it needs an update"
        raise ValueError(f"format_version {version} is unknown: {known}")
    table, recipe = content.get("table"), content.get("recipe")
    if not isinstance(table, dict) or not isinstance(recipe, dict):
        raise ValueError("it has no table or no recipe")
    recipe = recipe_from_plain(recipe)
    return Predictor(table_of(recipe.solver, table), recipe)


def table_of(solver: str, tensors: Mapping[str, Any]) -> Table:
    """The table of that solver from tensors, or rows of numbers, by name."""
    one_of("solver", solver, tuple(TABLES))
    fields = dataclasses.fields(TABLES[solver])
    wanted = [f.name for f in fields if f.default is dataclasses.MISSING]
    missing, unknown = set(wanted) - set(tensors), set(tensors) - {f.name for f in fields}
    if missing or unknown:
        found = f"lacks {sorted(missing)}" if missing else f"has the unknown {sorted(unknown)}"
        raise ValueError(f"the table {found}: it has {', '.join(wanted)}")
    return TABLES[solver](**{name: numbers(name, values) for name, values in tensors.items()})


def numbers(name: str, values: Any) -> Tensor:
    """A tensor of floats, or rows of numbers, in float64."""
    if isinstance(values, Tensor) and values.is_floating_point():
        return values.double()
    if name == "guidance" and is_row(values):
        return torch.tensor(values, dtype=torch.float64)
    is_table = isinstance(values, list) and all(is_row(row) for row in values)
    if is_table and len({len(row) for row in values}) == 1:
        return torch.tensor(values, dtype=torch.float64)
    raise ValueError(f"{name} is not a table of numbers with rows of one length")


def is_row(row: object) -> bool:
    """Whether it is a list of numbers, of a size that a float holds."""
    return isinstance(row, list) and all(
        isinstance(v, float) or (type(v) is int and abs(v) < 1 << 53) for v in row
    )


def find_predictor(name: str, exps: Path = EXPS) -> Path:
    """The file of a predictor: a path, a run's folder or its number, or a name within exps/.

    `cifar10-5nfe` and `cifar10/cifar10-5nfe` find exps/cifar10/cifar10-5nfe.pkl, `2` the best or
    last predictor of the run exps/00002-...

    Raises ValueError where there is none, with the nearest names, or several have that name.
    """
    given = Path(name)
    if given.is_file():
        return given
    runs = sorted(exps.glob(f"{int(name):05d}-*/")) if re.fullmatch("[0-9]{1,9}", name) else []
    if len(runs) > 1:
        raise ValueError(f"run {name} may be {' or '.join(run.name for run in runs)}: say which")
    for pattern in IN_RUN:
        if files := sorted((runs[0] if runs else given).glob(pattern)):
            return files[-1]
    shipped = {p.relative_to(exps).with_suffix("").as_posix(): p for p in exps.rglob("*.pkl")}
    wanted = name.removesuffix(".pkl").removeprefix("exps/").rstrip("/")
    found = [k for k in shipped if k == wanted or k.removesuffix("/predictor") == wanted]
    found = found or [k for k in shipped if k.rpartition("/")[2] == wanted]
    if len(found) > 1:
        raise ValueError(f"{name!r} may be {' or '.join(sorted(found))}: say which")
    if not found:
        names = sorted({k.rpartition("/")[2] for k in shipped} | set(shipped))
        near = get_close_matches(wanted, names, 3, 0.4) or names[:3]
        hint = f"the nearest are {', '.join(near)}" if near else f"{exps} has none"
        raise ValueError(f"no file and no shipped predictor {name[:200]!r}: {hint}")
    return shipped[found[0]]


# --- command line -------------------------------------------------------------------------


def described(predictor: Predictor) -> str:
    """The recipe and the table as text for people."""
    settings = recipe_to_plain(predictor.recipe)
    lines = [f"{name:18} {json.dumps(v)}" for name, v in settings.items() if v not in (None, {})]
    lines.append(f"{'nfe':18} {predictor.nfe} sequential, {predictor.evaluations} evaluations")
    tensors = named_tensors(predictor.table)
    of_points = {n: t for n, t in tensors.items() if n not in OF_KNOWN and t.ndim == 2}
    rates = predictor.table.guidance
    if rates is not None and rates.ndim == 1:
        of_points["guidance"] = rates[:, None].expand(-1, predictor.recipe.num_points)
    lines.append(f"\n{'interval':>8} {'point':>6}" + "".join(f"{n:>13}" for n in of_points))
    for n in range(predictor.recipe.num_steps - 1):
        for k in range(predictor.recipe.num_points):
            row = "".join(f"{values[n, k].item():13.6f}" for values in of_points.values())
            lines.append(f"{n:8} {k:6}{row}")
    for name in sorted(tensors.keys() - of_points.keys()):
        rows = ("".join(f"{v:13.6f}" for v in row) for row in tensors[name].tolist())
        lines += [f"\n{name}, of the slopes known before each interval", *rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Show or convert a predictor; the exit status is 1 for a file that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m solvers.predictor", description="Show or convert predictors."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the settings and the table")
    show.add_argument("path", help="a file, or a name within exps/ such as cifar10-5nfe")
    convert = commands.add_parser("convert", help="write as .pkl or .json, by the ending")
    convert.add_argument("source", help="a file of ours or a published one, or a name")
    convert.add_argument("target", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            text = described(load_predictor(find_predictor(options.path)))
        else:
            save_predictor(load_predictor(find_predictor(options.source)), options.target)
            text = f"wrote {options.target}"
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
