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

from rewards.weights import RECORD, WEIGHTS, lookup, origin, place, records, sha256
from src.files import write_json
from src.options import OneLineCommand

TRANSPORT = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the errors of whatever HTTP library the hub's client is on."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository, where it goes, and what it must be; sha256 may be "", unknown."""

    weights: str
    name: str
    revision: str
    to: Path
    size: int
    sha256: str

    def differs(self, path: Path) -> str:
        """How a file is another one; "" where it is this one."""
        size = path.stat().st_size
        if size != self.size:
            return f"{size} B, not {self.size}"
        digest = sha256(path) if self.sha256 else ""
        return "" if digest == self.sha256 else f"SHA-256 {digest}, not {self.sha256}"


@click.command(cls=OneLineCommand)
@click.argument("names", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
def main(names: tuple[str, ...], yes: bool) -> None:
    """Fetch the weights of these NAMES; without any, list them.

    What would be fetched, how much and to where is said first. A stopped fetch goes on where it
    was; what came is checked. Example: bash launch.sh weights clip aesthetic
    """
    if not names:
        for name, weight in WEIGHTS.items():
            click.echo(f"{name:<13} {weight.about} [{weight.repo or origin(name)}]")
        return
    items = [item for name in dict.fromkeys(names) for item in plan(name)]
    wanted = [item for item in items if not item.to.exists()]
    for item in items:
        if item not in wanted and (why := item.differs(item.to)):
            raise ValueError(f"{item.to} is another file ({why}): move it away")
        size = f"{item.size:,} B" if item in wanted else "is there"
        click.echo(f"{item.to}: {size}, {WEIGHTS[item.weights].about}")
    total = sum(item.size for item in wanted)
    ask = f"Fetch {len(wanted)} files, {total / 1e9:.2f} GB?"
    if wanted and not yes and not click.confirm(ask):
        raise ValueError("nothing was fetched")
    for item in wanted:
        fetch(item)
        click.echo(f"{item.to}: fetched and checked")


def plan(name: str) -> list[RemoteFile]:
    """The files of the weights of that name, as the hub describes them; fetches nothing.

    ValueError, in one line: an unknown name, weights that the hub does not have, no connection,
    a licence that has to be accepted first.
    """
    weight = lookup(name)
    if not weight.repo:
        raise ValueError(f"{name} is not on the hub: get {place(name)}: {origin(name)}")
    with one_line(name):
        info = HfApi().model_info(weight.repo, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or ()}
    if any("*" not in pattern and pattern not in files for pattern in weight.wanted):
        raise ValueError(f"{name}: {page(name)} has not all of {', '.join(weight.wanted)}")
    return [
        RemoteFile(
            name,
            file,
            info.sha or "main",
            place(name) / file if weight.is_folder else place(name),
            described.size or 0,
            weight.sha256 or (described.lfs.sha256 if described.lfs else ""),
        )
        for file, described in files.items()
        if any(fnmatch(file, pattern) for pattern in weight.wanted)
    ]


def fetch(item: RemoteFile) -> None:
    """Fetch one file, or the rest of it, check it, put it in its place, record it.

    ValueError, in one line, where the connection fails (what came is kept for the next time) or
    the file is not what it must be (it is deleted).
    """
    weight = WEIGHTS[item.weights]
    folder = place(item.weights) if weight.is_folder else item.to.parent
    with one_line(item.weights):
        came = hf_hub_download(weight.repo, item.name, revision=item.revision, local_dir=folder)
    if why := item.differs(Path(came)):
        Path(came).unlink()
        raise ValueError(f"{item.to}: what came is another file ({why}): try again")
    Path(came).replace(item.to)
    record = {"size": item.size, "sha256": sha256(item.to), "from": f"{weight.repo}/{item.name}"}
    write_json(item.to.parent / RECORD, {**records(item.to.parent), item.to.name: record})


def page(name: str) -> str:
    """The page of its repository."""
    return f"{constants.ENDPOINT}/{WEIGHTS[name].repo}"


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turn what may go wrong on the way into a ValueError of one line."""
    try:
        yield
    except GatedRepoError as error:
        login = "log in with `hf auth login`, then try again"
        raise ValueError(f"{name}: accept its licence at {page(name)}, {login}") from error
    except TRANSPORT as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: {page(name)} cannot be read: {why}") from error


if __name__ == "__main__":
    main()
