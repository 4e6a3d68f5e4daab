"""Fetch public weights from the hub: python -m rewards.fetch NAME..."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import click
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from rewards.weights import (
    WEIGHTS,
    Weight,
    lookup,
    origin,
    place,
    read_record,
    sha256,
    write_record,
)
from src.options import OneLineCommand, one_line_errors

TRANSPORT = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the errors of whatever HTTP library the hub's client is on."""


@dataclass(frozen=True)
class Item:
    """One file of a repository, where it goes, and what it must be; sha256 may be "", unknown."""

    weights: str
    name: str
    revision: str
    to: Path
    size: int
    sha256: str


@click.command(cls=OneLineCommand)
@click.argument("names", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
@one_line_errors
def main(names: tuple[str, ...], yes: bool) -> None:
    """Fetch the weights of these NAMES; without any, list them.

    What would be fetched, how much and to where is said first. A stopped fetch goes on where it
    was. Example: bash launch.sh weights clip aesthetic
    """
    if not names:
        for name, weight in WEIGHTS.items():
            click.echo(f"{name:<13} {weight.about} [{weight.repo or origin(name)}]")
        return
    items = [item for name in dict.fromkeys(names) for item in plan(name)]
    wanted = [item for item in items if not is_there(item)]
    for item in items:
        size = f"{item.size:,} B" if item in wanted else "is there"
        click.echo(f"{item.to}: {size}, {WEIGHTS[item.weights].about}")
    if not wanted:
        return
    total = sum(item.size for item in wanted)
    if not yes and not click.confirm(f"Fetch {len(wanted)} files, {total / 1e9:.2f} GB?"):
        raise ValueError("nothing was fetched")
    for item in wanted:
        fetch(item)
        click.echo(f"{item.to}: fetched and checked")


def plan(name: str) -> list[Item]:
    """The files of the weights of that name, as the hub describes them; fetches nothing.

    ValueError, in one line: an unknown name, weights that the hub does not have, no connection,
    a licence that has to be accepted first.
    """
    weight = lookup(name)
    if not weight.repo:
        raise ValueError(f"{name} is not on the hub: get {place(name)}: {origin(name)}")
    with one_line(name, weight):
        info = HfApi().model_info(weight.repo, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or ()}
    patterns = weight.wanted
    if any("*" not in p and p not in files for p in patterns):
        raise ValueError(f"{name}: {page(weight)} has not all of {', '.join(patterns)}")
    chosen = [file for n, file in files.items() if any(fnmatch(n, p) for p in patterns)]
    return [
        Item(
            name,
            file.rfilename,
            info.sha or "main",
            place(name) / file.rfilename if weight.is_folder else place(name),
            file.size or 0,
            weight.sha256 or (file.lfs.sha256 if file.lfs else ""),
        )
        for file in chosen
    ]


def is_there(item: Item) -> bool:
    """Whether it was fetched before; ValueError where another file is in its place."""
    if not item.to.exists():
        return False
    size = item.to.stat().st_size
    digest = read_record(item.to).get("sha256") or (sha256(item.to) if item.sha256 else "")
    if size != item.size or (item.sha256 and digest != item.sha256):
        raise ValueError(f"{item.to} is another file ({size} B, not {item.size}): move it away")
    return True


def fetch(item: Item) -> None:
    """Fetch one file, or the rest of it, check it, put it in its place, record it.

    ValueError, in one line, where the connection fails (what came is kept for the next time) or
    the file is not what it must be (it is deleted).
    """
    weight = WEIGHTS[item.weights]
    folder = place(item.weights) if weight.is_folder else item.to.parent
    with one_line(item.weights, weight):
        path = Path(
            hf_hub_download(weight.repo, item.name, revision=item.revision, local_dir=folder)
        )
    size, digest = path.stat().st_size, sha256(path)
    if size != item.size or (item.sha256 and digest != item.sha256):
        path.unlink()
        raise ValueError(f"{item.to}: what came has another SHA-256 ({digest}): try again")
    path.replace(item.to)
    write_record(item.to, {"size": size, "sha256": digest, "from": f"{weight.repo}/{item.name}"})


def page(weight: Weight) -> str:
    """The repository's page."""
    return f"{constants.ENDPOINT}/{weight.repo}"


@contextmanager
def one_line(name: str, weight: Weight) -> Iterator[None]:
    """Turn what may go wrong on the way into a ValueError of one line."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{name}: accept its licence at {page(weight)}, log in with `hf auth login`, "
            "then try again"
        ) from error
    except TRANSPORT as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: {page(weight)} cannot be read: {why}") from error


if __name__ == "__main__":
    main()
