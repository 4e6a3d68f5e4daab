"""Write the 43 predictors that the authors of EPD-Solver published as files of ours.

The source is a JSON of their numbers, or the folder of their pickles (read by an allow-list,
nothing of them runs). Examples, from the repository's root:

    python -m exps.import_published
    python -m exps.import_published --source published/ --target exps
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from solvers.predictor import Predictor, load_predictor, save_predictor, validate
from solvers.published import translate
from solvers.recipe import recipe_from_plain

ROOT = Path(__file__).resolve().parent.parent
PAPERS = {
    "iccv": "Distilling Parallel Gradients for Fast ODE Solvers of Diffusion Models, ICCV 2025, "
    "arXiv:2507.14797",
    "tpami": "Parallel Diffusion Solver via Residual Dirichlet Policy Optimization, "
    "arXiv:2512.22796",
}
REMARKS = {
    "sd15-distilled": "named distilled by its authors, but an RL export at step 1,000",
}
SD15 = "its metadata say 1024 pixels, the paper's figures for SD1.5 are at 512"
FOLDERS = {"lsun_bedroom_ldm": "lsun-bedroom"}
BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"
COLUMNS = (
    *("name", "dataset", "backend", "num_steps", "K", "NFE", "evaluations", "base"),
    *("schedule", "AFS", "guidance", "teacher", "source file"),
)


def name_of(published: str) -> str:
    """`iccv/00018-cifar10-4-5-ipndm-uni1.0-afs/...` -> `cifar10/cifar10-5nfe-ipndm`."""
    found = re.fullmatch(r"iccv/\d+-(\w+)-\d+-(\d+)-(\w+)-[^/]+/[^/]+", published)
    if found is None:
        return published.removeprefix("tpami/").removesuffix(".pkl")
    dataset, nfe, student = found.groups()
    folder = FOLDERS.get(dataset, dataset)
    return f"{folder}/{folder}-{nfe}nfe" + ("" if student == "epd" else f"-{student}")


def documented(predictor: Predictor, published: str) -> Predictor:
    """The predictor with its origin in the recipe's `source`."""
    stem = name_of(published).rpartition("/")[2]
    remarks = [REMARKS[stem]] if stem in REMARKS else []
    remarks += [SD15] if stem.startswith("sd15") else []
    paper = PAPERS[published.partition("/")[0]]
    source = "; ".join([f"{paper}; file {published}", *remarks])
    return Predictor(predictor.table, dataclasses.replace(predictor.recipe, source=source))


def from_numbers(path: Path) -> Iterator[tuple[str, Predictor]]:
    """(published file, predictor) for each entry of a JSON of metadata and raw parameters.

    The parameters were float32; through float32 the digits give back every bit of them.
    """
    for published, entry in json.loads(path.read_text()).items():
        raw = {n: torch.tensor(v, dtype=torch.float32) for n, v in entry["parameters"].items()}
        table, entries = translate(entry["metadata"], raw)
        yield published, Predictor(table, recipe_from_plain(entries))


def from_folder(path: Path) -> Iterator[tuple[str, Predictor]]:
    """(published file, predictor) for each pickle in a folder with the authors' layout."""
    for file in sorted(path.rglob("*.pkl")):
        yield file.relative_to(path).as_posix(), load_predictor(file)


def import_all(source: Path, target: Path) -> dict[str, Predictor]:
    """Write every predictor of `source` under `target`; by name, in the order of the source."""
    entries = from_folder(source) if source.is_dir() else from_numbers(source)
    written: dict[str, Predictor] = {}
    for published, predictor in entries:
        name = name_of(published)
        written[name] = validate(documented(predictor, published))
        path = target / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_predictor(written[name], path)
    return written


def row(name: str, predictor: Predictor) -> tuple[object, ...]:
    """The entries of a predictor in the table of README.md."""
    recipe = predictor.recipe
    guided = recipe.guidance_type == "cfg"
    base = recipe.base if recipe.base == "euler" else f"{recipe.base}-{recipe.max_order}"
    file = re.search(r"file ([^;]+)", recipe.source)
    return (
        *(f"`{name}`", recipe.dataset_name, recipe.backend, recipe.num_steps, recipe.num_points),
        *(predictor.nfe, predictor.evaluations, base),
        f"{recipe.schedule_type} {recipe.schedule_rho:g}",
        *("yes" if recipe.afs else "no", f"{recipe.guidance_rate:g}" if guided else "none"),
        f"{recipe.teacher}, M = {recipe.M}",
        file[1] if file else "",
    )


def table(predictors: dict[str, Predictor]) -> str:
    """The table of README.md."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(n, p) for n, p in predictors.items())]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows)


def with_table(text: str, predictors: dict[str, Predictor]) -> str:
    """The text with the table between its two marks renewed."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table(predictors)}\n{END}{after}"


@click.command(help=__doc__)
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    default=ROOT / "tests" / "data" / "predictors.json",
    show_default="tests/data/predictors.json",
    help="A JSON of raw parameters and metadata, or the folder of the published pickles.",
)
@click.option(
    "--target",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "exps",
    show_default="exps",
    help="The folder to write into; the table of its README.md is renewed.",
)
def main(source: Path, target: Path) -> None:
    """Write the predictors and the table of README.md."""
    try:
        predictors = import_all(source, target)
    except (ValueError, KeyError) as error:
        raise click.ClickException(str(error)) from None
    readme = target / "README.md"
    if readme.is_file():
        readme.write_text(with_table(readme.read_text(), predictors))
    click.echo(f"wrote {len(predictors)} predictors under {target}")


if __name__ == "__main__":
    main()
