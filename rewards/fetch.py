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

from rewards.weights import WEIGHTS, lookup, origin, places, sha256
from src.options import OneLineCommand
from src.text import aligned

TRANSPORT = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the errors of whatever HTTP library the hub's client is on."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of the hub, the folder and the path it gets, and what it must be."""

    weights: str
    name: str
    revision: str
    folder: Path
    to: Path
    size: int
    sha256: str  # "": unknown

    def differs(self, path: Path) -> str:
        """How a file is another one; "" where it is this one."""
        if (size := path.stat().st_size) != self.size:
            return f"{size} B, not {self.size}"
        digest = sha256(path) if self.sha256 else ""
        return "" if digest == self.sha256 else f"SHA-256 {digest}, not {self.sha256}"


@click.command(cls=OneLineCommand)
@click.argument("names", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
def main(names: tuple[str, ...], yes: bool) -> None:
    """Fetch the weights of these NAMES; without any, list them.

    What would be fetched, how much and to where is said first. A stopped fetch goes on where it
    was; what came is checked, and deleted where it is another file. Example: bash launch.sh
    weights clip aesthetic
    """
    if not names:
        rows = [(n, f"{w.about} [{w.repo or origin(n)}]") for n, w in WEIGHTS.items()]
        click.echo(aligned(rows, (0, 1), rule=False))
        return
    files = [file for name in dict.fromkeys(names) for file in plan(name)]
    wanted = [file for file in files if not file.to.exists()]
    for file in files:
        if file not in wanted and (why := file.differs(file.to)):
            raise ValueError(f"{file.to} is another file ({why}): move it away")
        size = f"{file.size:,} B" if file in wanted else "is there"
        click.echo(f"{file.to}: {size}, {WEIGHTS[file.weights].about}")
    total = sum(file.size for file in wanted)
    ask = f"Fetch {len(wanted)} files, {total / 1e9:.2f} GB?"
    if wanted and not yes and not click.confirm(ask):
        raise ValueError("nothing was fetched")
    for file in wanted:
        repo, at = WEIGHTS[file.weights].repo, file.revision
        with one_line(file.weights):
            came = Path(hf_hub_download(repo, file.name, revision=at, local_dir=file.folder))
        if why := file.differs(came):
            came.unlink()
            raise ValueError(f"{file.to}: what came is another file ({why}): try again")
        came.replace(file.to)
        click.echo(f"{file.to}: fetched and checked")


def plan(name: str) -> list[RemoteFile]:
    """The files of the weights of that name, as the hub describes them; fetches nothing.

    ValueError, in one line: an unknown name, weights that the hub does not have, no connection,
    a licence that has to be accepted first.
    """
    weight, place = lookup(name), places(name)[0]
    if not weight.repo:
        raise ValueError(f"{name} is not on the hub: get {place}: {origin(name)}")
    with one_line(name):
        info = HfApi().model_info(weight.repo, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or ()}
    if any("*" not in pattern and pattern not in siblings for pattern in weight.wanted):
        raise ValueError(f"{name}: {page(name)} has not all of {', '.join(weight.wanted)}")
    files = []
    for file, described in siblings.items():
        if any(fnmatch(file, pattern) for pattern in weight.wanted):
            folder, to = (place, place / file) if weight.is_folder else (place.parent, place)
            digest = weight.sha256 or (described.lfs.sha256 if described.lfs else "")
            size, revision = described.size or 0, info.sha or "main"
            files.append(RemoteFile(name, file, revision, folder, to, size, digest))
    return files


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
