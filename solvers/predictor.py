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
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from solvers import vp
from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep, Table
from solvers.integrate import MAX_SLOPES
from solvers.process import FLOW, VE, Process
from solvers.published import from_published
from solvers.recipe import FLOW_BACKENDS, Recipe, check_recipe, for_flow, plain, recipe_from_plain
from solvers.sampler import SOLVERS, Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels
from src.files import find_predictor, from_json, read_text, write_atomically, write_text
from src.inert import quoted
from src.pickles import read_pickle

FORMAT, VERSION = "epd-predictor", 2
TABLES = {"epd": Directions, "epd-multistep": MultistepTable}
"""The class of table by the recipe's solver; its fields are the names in the file."""
LIMITS = {"r": (0, 1), "time_scale": (5e-324, math.inf), "guidance": (0, math.inf)}
WEIGHTS = {"weight": (0, math.inf), "sum of weight": (1 - 1e-4, 1 + 1e-4)}
MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Predictor:
    """A table of num_steps - 1 rows and the settings that it was learned for."""

    table: Table
    recipe: Recipe

    def solver(self, process: Process = VE) -> EPD | ParallelMultistep:
        """The solver that takes these steps on a model of this process."""
        recipe = self.recipe
        if isinstance(self.table, MultistepTable):
            return ParallelMultistep(self.table, process, recipe.afs)
        order = recipe.max_order if len(SOLVERS[recipe.base].orders) > 1 else None
        options = SolverOptions(order, process, recipe.predict_x0, recipe.lower_order_final)
        return EPD(self.table, make_solver(recipe.base, options))

    def sampler(self, levels: NoiseLevels) -> Sampler:
        """The sampler that this predictor was learned for, on a network with these levels.

        Raises ValueError where the predictor is for the other process, or for a schedule that
        the network lacks.
        """
        recipe, process = self.recipe, levels.process
        if for_flow(recipe) != (process == FLOW):
            what = f"{recipe.backend} ({recipe.schedule_type})"
            raise ValueError(f"a predictor for {what} is not for a {process.name} model")
        sigmas, shift, mu = recipe.sigmas, recipe.flowmatch_shift, recipe.flowmatch_mu
        if sigmas is None:
            own = {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max}
            own = {n: v for n, v in (own | {"shift": shift, "mu": mu}).items() if v is not None}
            name, count, rho = recipe.schedule_type, recipe.num_steps, recipe.schedule_rho
            sigmas = tuple(replace(levels, **own).grid(name, count, rho=rho).tolist())
        return Sampler(self.solver(process), sigmas, process, recipe.afs, recipe.guidance_rate)

    @property
    def nfe(self) -> int:
        """The network calls one after another for an image."""
        return self.on_any_grid.calls

    @property
    def evaluations(self) -> int:
        """The rows through the network for an image: every one of the K points counts."""
        return self.on_any_grid.rows

    @property
    def on_any_grid(self) -> Sampler:
        """The sampler on levels of no network, which makes the same calls."""
        sigmas = tuple(2.0**-n for n in range(self.recipe.num_steps))
        return Sampler(self.solver(), sigmas, afs=self.recipe.afs)


def levels_of(recipe: Recipe) -> NoiseLevels | None:
    """The levels that a recipe itself tells of; None where they are its model's alone."""
    low, high = recipe.sigma_min, recipe.sigma_max
    if for_flow(recipe):
        named = recipe.backend in FLOW_BACKENDS or recipe.sigmas is not None
        if "scheduler" in recipe.backend_config and not named:
            return None
        low = low or 1e-3
        shift = recipe.flowmatch_shift or low * 999 / (1 - low)  # 1/1000 as low is shifted
        return NoiseLevels(FLOW, low, 1.0, shift=shift)
    published = vp.PUBLISHED.get(recipe.dataset_name) if recipe.backend == "ldm" else None
    if config := recipe.backend_config.get("scheduler", published):
        return vp.table_of(config).levels
    if recipe.sigmas is not None:
        high, *_, low = recipe.sigmas
    if low and high and recipe.schedule_type != "discrete":
        return NoiseLevels(VE, low, high)
    return None


def validate(predictor: Predictor) -> Predictor:
    """The predictor itself, if its table and its recipe can be sampled with.

    Raises ValueError in one line with the value: a table of another kind, a shape that is not
    [num_steps - 1, num_points], NaN, r outside [0, 1], a time_scale <= 0, or a recipe that cannot
    be served; and for EPD weights that are negative, or do not sum to 1 (within 1e-4).
    """
    recipe, table = predictor.recipe, predictor.table
    check_recipe(recipe)
    if not isinstance(table, TABLES[recipe.solver]):
        raise ValueError(f"{recipe.solver} cannot read a table of {type(table).__name__}")
    shape, limits, values = [recipe.num_steps - 1, recipe.num_points], LIMITS, named_tensors(table)
    shapes = {name: [shape] for name in values} | {"guidance": [shape, shape[:1]]}
    if isinstance(table, MultistepTable):
        past = min(max(table.a.shape[-1:].numel(), 1), 1 + MAX_SLOPES)
        shapes["a"] = shapes["b"] = [[shape[0], past]]
    for name, tensor in values.items():
        if list(tensor.shape) not in shapes[name]:
            needs = f"num_steps {recipe.num_steps} and num_points {recipe.num_points} need"
            raise ValueError(f"{name} has the shape {[*tensor.shape]}: {needs} {shapes[name][0]}")
    if isinstance(table, Directions):
        limits, values["sum of weight"] = LIMITS | WEIGHTS, table.weight.double().sum(-1)
    for name, tensor in values.items():
        low, high = limits.get(name, (-math.inf, math.inf))
        wrong = ~(tensor.isfinite() & (tensor.double() >= low) & (tensor <= high))
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            value = f"{name}{place} is {tensor[tuple(place)].item():.9g}"
            raise ValueError(f"{value}: it must be finite and {low:g} to {high:g}")
    return predictor


def save_predictor(predictor: Predictor, path: str | Path) -> None:
    """Write a predictor to `path`, `.pkl` or `.json` by its name, whole or not at all.

    Raises ValueError where the predictor is not valid, or the name ends otherwise.
    """
    path, content = Path(path), to_content(validate(predictor))
    if path.suffix == ".json":
        rows = {name: values.tolist() for name, values in content["table"].items()}
        text = json.dumps({**content, "table": rows}, indent=1, allow_nan=False)
        row_a_line = re.sub(r"\[\n[^][{}\"]*\]", lambda m: " ".join(m[0].split()), text)
        write_text(path, row_a_line + "\n")
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
        "recipe": json.loads(json.dumps(plain("recipe", vars(predictor.recipe)))),
    }


def named_tensors(table: Table) -> dict[str, Tensor]:
    """The tensors of a table by the names that files use."""
    return {name: values for name, values in vars(table).items() if values is not None}


def load_predictor(path: str | Path) -> Predictor:
    """The predictor of a file of ours (.pkl or .json) or of a published pickle, checked.

    Nothing that the file holds is executed (`src.pickles`). Raises ValueError in one line with the
    path: not there, no predictor, broken, hostile, of a future version, or not to be served.
    """
    path = Path(path)
    if path.suffix != ".json":
        content = read_pickle(path)
    elif path.is_file() and path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: more than {MAX_JSON} bytes is no predictor")
    else:
        content = from_json(read_text(path), str(path))
    try:
        return validate(from_content(content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_content(content: Any) -> Predictor:
    """The predictor of a file's content, ours or published; ValueError where it is neither."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a predictor")
    if "format" not in content:
        return Predictor(*from_published(content))
    version, tensors, entries = (content.get(n) for n in ("format_version", "table", "recipe"))
    if content["format"] != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
        what = f"format {quoted(content['format'], 80)!r} version {quoted(version, 80)!r}"
        raise ValueError(f"{what} is unknown: this code reads {FORMAT} up to version {VERSION}")
    if not isinstance(tensors, dict) or not isinstance(entries, dict):
        raise ValueError("it has no table or no recipe")
    recipe = recipe_from_plain(entries)
    kind = TABLES.get(recipe.solver, Directions)  # `validate` refuses another solver
    names = [f.name for f in dataclasses.fields(kind)]
    if not {*names} - {"guidance"} <= tensors.keys() <= {*names}:
        given = sorted(map(quoted, tensors))
        raise ValueError(f"the table has {given}: it needs {', '.join(names)}")
    table = {name: numbers(name, values) for name, values in tensors.items()}
    return Predictor(kind(**table), recipe)


def numbers(name: str, values: Any) -> Tensor:
    """A tensor of floats, or rows of numbers, in float64; ValueError for anything else."""
    try:
        given = isinstance(values, Tensor)
        tensor = values if given else torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        tensor = torch.tensor(0)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is not a table of numbers with rows of one length")
    return tensor.double()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the other commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Show or convert a predictor; the exit status is 1 for a file that cannot be served."""
    parser = Parser("python -m solvers.predictor", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the settings and the table")
    show.add_argument("source", help="a file, or a name within exps/ such as cifar10-5nfe")
    show.add_argument("--sigmas", action="store_true", help="only its levels, as a list")
    convert = commands.add_parser("convert", help="write as .pkl or .json, by the ending")
    convert.add_argument("source", help="a file of ours or a published one, or a name")
    convert.add_argument("target", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        predictor = load_predictor(find_predictor(options.source))
        if options.command == "convert":
            save_predictor(predictor, options.target)
            text = f"wrote {options.target}"
        elif not options.sigmas:
            content = to_content(predictor)
            entries = content["recipe"] | {"format_version": content["format_version"]}
            used = {name: v for name, v in entries.items() if v not in (None, {})}
            lines = [f"{name:18} {json.dumps(v)}" for name, v in used.items()]
            cost = f"{predictor.nfe} sequential, {predictor.evaluations} evaluations"
            lines.append(f"{'nfe':18} {cost}")
            for name, values in named_tensors(predictor.table).items():
                lines.append(f"\n{name}, by interval")
                rows = values.reshape(len(values), -1).tolist()
                lines += ["".join(f"{v:13.6f}" for v in row) for row in rows]
            text = "\n".join(lines)
        elif levels := levels_of(predictor.recipe):
            text = ", ".join(f"{sigma:.6g}" for sigma in predictor.sampler(levels).sigmas)
        else:
            raise ValueError("its levels are those of its model's own timesteps, not written down")
    except (ValueError, OSError, RecursionError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
