"""Predictors: a learned table and the recipe to sample with it, and their files.

One format in two dresses, `.pkl` (read by `torch.load(weights_only=True)`) and `.json`, both
with float64 tables, so that converting back and forth changes no bit:

    {"format": "epd-predictor", "format_version": 1, "recipe": {...},
     "table": {"r": [N, K], "weight": ..., "time_scale": ..., "dir_scale": ...}}

A table with `guidance` [N] or [N, K] makes it version 2. The kind of table is the recipe's
`solver`. `load_predictor` reads published files too. On the command line:

    python -m solvers.predictor show cifar10-5nfe
    python -m solvers.predictor convert published.pkl ours.json
"""

import argparse
import dataclasses
import json
import re
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep, Table
from solvers.integrate import MAX_SLOPES
from solvers.process import FLOW, VE, Process
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
from src.files import from_json, read_text, write_atomically, write_text
from src.pickles import read_pickle

__all__ = ["Predictor", "Recipe", "decode", "find_predictor", "load_predictor", "save_predictor"]

FORMAT = "epd-predictor"
TABLES = {"epd": Directions, "epd-multistep": MultistepTable}
"""The class of table by the recipe's solver; its fields are the names in the file."""
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

    def solver(self, process: Process = VE) -> EPD | ParallelMultistep:
        """The solver that takes these steps; bases of one order do not look at `max_order`."""
        recipe = self.recipe
        if isinstance(self.table, MultistepTable):
            return ParallelMultistep(self.table, process, recipe.afs)
        options = SolverOptions(
            order=recipe.max_order if len(SOLVERS[recipe.base].orders) > 1 else None,
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

    @property
    def nfe(self) -> int:
        """Network calls one after another for an image."""
        return self.on_any_grid.calls

    @property
    def evaluations(self) -> int:
        """Rows through the network for an image: every one of the K points counts."""
        return self.on_any_grid.rows

    @property
    def on_any_grid(self) -> Sampler:
        """The sampler on levels of no network, which makes the same calls."""
        sigmas = tuple(2.0**-n for n in range(self.recipe.num_steps))
        return Sampler(self.solver(), sigmas, afs=self.recipe.afs)


def recipe_sigmas(recipe: Recipe, levels: NoiseLevels) -> Tensor:
    """The recipe's grid [num_steps] on a network's levels; ValueError where it has none there."""
    if for_flow(recipe) != (levels.process.name == "flow"):
        what = f"{recipe.backend} ({recipe.schedule_type})"
        raise ValueError(f"a predictor for {what} is not for a {levels.process.name} model")
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


def levels_of(recipe: Recipe) -> NoiseLevels | None:
    """The levels that a recipe itself tells of; None where they are its model's alone."""
    if for_flow(recipe):
        low = recipe.sigma_min or 1e-3
        shift = recipe.flowmatch_shift or low * 999 / (1 - low)  # 1/1000 as low is shifted
        return NoiseLevels(FLOW, low, 1.0, shift=shift)
    low, high = recipe.sigma_min, recipe.sigma_max
    if recipe.sigmas is not None:
        low, high = recipe.sigmas[-1], recipe.sigmas[0]
    spaced = recipe.schedule_type != "discrete"
    return NoiseLevels(VE, low, high) if low and high and spaced else None


# --- checks -------------------------------------------------------------------------------


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
    intervals, points = recipe.num_steps - 1, recipe.num_points
    for name, values in named_tensors(table).items():
        shape = list(values.shape)
        if name in ("a", "b"):
            if len(shape) != 2 or shape[0] != intervals or not 1 <= shape[1] <= 1 + MAX_SLOPES:
                wanted = f"[{intervals}, 1 to {1 + MAX_SLOPES}]"
                raise ValueError(f"{name} has the shape {shape}: it must be {wanted}")
        elif shape != [intervals, points] and (name, shape) != ("guidance", [intervals]):
            needs = f"num_steps {recipe.num_steps} and num_points {points} need"
            raise ValueError(f"{name} has the shape {shape}: {needs} {[intervals, points]}")
        require(name, values, values.isfinite(), "must be a finite number")
    require("r", table.r, (table.r >= 0) & (table.r <= 1), "must lie in [0, 1]")
    require("time_scale", table.time_scale, table.time_scale > 0, "must be above 0")
    if table.guidance is not None:
        require("guidance", table.guidance, table.guidance >= 0, "must be 0 or more")
    if isinstance(table, MultistepTable):
        if table.a.shape != table.b.shape:
            shapes = f"a {list(table.a.shape)} and b {list(table.b.shape)}"
            raise ValueError(f"{shapes} differ in shape")
        return predictor
    require("weight", table.weight, table.weight >= 0, "must not be negative")
    total = table.weight.double().sum(-1)
    require("sum of weight", total, (total - 1).abs() <= 1e-4, "must be 1, as weights are shares")
    return predictor


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
        one_line = re.sub(r"\[\n[^][{}\"]*\]", lambda m: " ".join(m[0].split()), text)
        write_text(path, one_line + "\n")
    elif path.suffix == ".pkl":
        with write_atomically(path) as temp, temp.open("wb") as file:
            torch.save(content, file)  # an open file: equal predictors make equal bytes
    else:
        raise ValueError(f"{path}: a predictor's file ends in .pkl or .json")


def to_content(predictor: Predictor) -> dict[str, Any]:
    """What a file holds, tables as float64 tensors on the CPU."""
    tensors = named_tensors(predictor.table)
    return {
        "format": FORMAT,
        "format_version": 1 if predictor.table.guidance is None else 2,
        "table": {name: t.detach().double().cpu().contiguous() for name, t in tensors.items()},
        # through text, so that equal recipes make equal bytes
        "recipe": json.loads(json.dumps(recipe_to_plain(predictor.recipe))),
    }


def named_tensors(table: Table) -> dict[str, Tensor]:
    """The tensors of a table by the names that files use."""
    fields = ((f.name, getattr(table, f.name)) for f in dataclasses.fields(table))
    return {name: values for name, values in fields if values is not None}


def load_predictor(path: str | Path) -> Predictor:
    """The predictor of a file of ours (.pkl or .json) or of a published pickle, checked.

    Nothing that the file holds is executed (`src.pickles`).

    Raises ValueError in one line with the path: not there, not a predictor, broken, hostile, of a
    future version, or with a table or a recipe that `validate` refuses.
    """
    path = Path(path)
    if looks_like_json(path):
        if path.is_file() and path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path}: more than {MAX_JSON} bytes is no predictor")
        content = from_json(read_text(path), str(path))
    else:
        content = read_pickle(path)
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
        reads = f"this code reads up to {FORMAT_VERSION}, so it needs an update"
        raise ValueError(f"format_version {version} is unknown: {reads}")
    tensors, recipe = content.get("table"), content.get("recipe")
    if not isinstance(tensors, dict) or not isinstance(recipe, dict):
        raise ValueError("it has no table or no recipe")
    recipe = recipe_from_plain(recipe)
    one_of("solver", recipe.solver, tuple(TABLES))
    fields = dataclasses.fields(TABLES[recipe.solver])
    names = [f.name for f in fields if f.default is dataclasses.MISSING]
    missing, unknown = set(names) - set(tensors), set(tensors) - {f.name for f in fields}
    if missing or unknown:
        fault = f"lacks {sorted(missing)}" if missing else f"has the unknown {sorted(unknown)}"
        raise ValueError(f"the table {fault}: it has {', '.join(names)}")
    table = {name: numbers(name, values) for name, values in tensors.items()}
    return Predictor(TABLES[recipe.solver](**table), recipe)


def numbers(name: str, values: Any) -> Tensor:
    """A tensor of floats, or rows of numbers, in float64."""
    if isinstance(values, Tensor) and values.is_floating_point():
        return values.double()
    rows: list[Any] = values if isinstance(values, list) else [[None]]
    rows = rows if all(isinstance(row, list) for row in rows) else [rows]
    is_number = all(type(v) in (int, float) and abs(v) < 1e300 for row in rows for v in row)
    if not is_number or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{name} is not a table of numbers with rows of one length")
    return torch.tensor(values, dtype=torch.float64)


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
    matches = [k for k in shipped if k == wanted or k.removesuffix("/predictor") == wanted]
    matches = matches or [k for k in shipped if k.rpartition("/")[2] == wanted]
    if len(matches) > 1:
        raise ValueError(f"{name!r} may be {' or '.join(sorted(matches))}: say which")
    if not matches:
        names = sorted({k.rpartition("/")[2] for k in shipped} | set(shipped))
        near = get_close_matches(wanted, names, 3, 0.4) or names[:3]
        hint = f"the nearest are {', '.join(near)}" if near else f"{exps} has none"
        raise ValueError(f"no file and no shipped predictor {name[:200]!r}: {hint}")
    return shipped[matches[0]]


# --- command line -------------------------------------------------------------------------


def described(predictor: Predictor) -> str:
    """The recipe and the table as text for people."""
    settings = recipe_to_plain(predictor.recipe)
    lines = [f"{name:18} {json.dumps(v)}" for name, v in settings.items() if v not in (None, {})]
    lines.append(f"{'nfe':18} {predictor.nfe} sequential, {predictor.evaluations} evaluations")
    tensors = named_tensors(predictor.table)
    of_points = {n: t for n, t in tensors.items() if n not in ("a", "b") and t.ndim == 2}
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
        lines += [f"\n{name}, of the earlier slopes of each interval", *rows]
    return "\n".join(lines)


def listed(predictor: Predictor) -> str:
    """The levels of a predictor as a list; ValueError where they are its model's alone."""
    levels = levels_of(predictor.recipe)
    if levels is None:
        raise ValueError("its levels are those of its model's own timesteps")
    return ", ".join(f"{sigma:.6g}" for sigma in predictor.sampler(levels).sigmas)


def main(arguments: list[str] | None = None) -> int:
    """Show or convert a predictor; the exit status is 1 for a file that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m solvers.predictor", description="Show or convert predictors."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the settings and the table")
    show.add_argument("path", help="a file, or a name within exps/ such as cifar10-5nfe")
    show.add_argument("--sigmas", action="store_true", help="only its levels, as a list")
    convert = commands.add_parser("convert", help="write as .pkl or .json, by the ending")
    convert.add_argument("source", help="a file of ours or a published one, or a name")
    convert.add_argument("target", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            predictor = load_predictor(find_predictor(options.path))
            text = listed(predictor) if options.sigmas else described(predictor)
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
