"""Fetch public weights from the hub: python -m rewards.fetch NAME...

What would be fetched, how much, under which licence and to where is told first. Files come
whole or not at all: a stopped one goes on from its `.part`, a finished one is checked by size and
by the SHA-256 that the hub, or our table, tells.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import click
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from rewards.intact import RECORD, recorded, sha256
from rewards.weights import WEIGHTS, Weight, known, origin, place
from src.files import write_json
from src.options import OneLineCommand, one_line_errors

TRANSPORT = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the errors of whatever HTTP library the hub's client is on."""


@dataclass(frozen=True)
class Item:
    """One file: where it is, where it goes, and what it must be. sha256 may be unknown, ""."""

    weights: str
    url: str
    to: Path
    size: int
    sha256: str
    etag: str


@click.command(cls=OneLineCommand)
@click.argument("names", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
@one_line_errors
def main(names: tuple[str, ...], yes: bool) -> None:
    """Fetch the weights of these NAMES; without any, list them.

    Example: bash launch.sh weights clip aesthetic
    """
    if not names:
        click.echo("\n".join(line(name, weight) for name, weight in WEIGHTS.items()))
        return
    items = [item for name in dict.fromkeys(names) for item in plan(name)]
    wanted = [item for item in items if not is_there(item)]
    for item in items:
        told = f"{item.size:,} B" if item in wanted else "is there"
        click.echo(f"{item.to}: {told}, {WEIGHTS[item.weights].licence}, {item.url}")
    if not wanted:
        return
    total = sum(item.size for item in wanted)
    if not yes and not click.confirm(f"Fetch {len(wanted)} files, {total / 1e9:.2f} GB?"):
        raise ValueError("nothing was fetched")
    for item in wanted:
        fetch(item)
        click.echo(f"{item.to}: fetched and checked")


def line(name: str, weight: Weight) -> str:
    """-> a line of the list."""
    where = weight.repo or origin(name)
    return f"{name:<13} {weight.size:<8} {weight.licence:<26} {weight.what} [{where}]"


def plan(name: str) -> list[Item]:
    """-> the files of the weights of that name. Asks the hub, fetches nothing.

    ValueError, in one line: an unknown name, weights that the hub does not have, no connection,
    a licence that has to be accepted first.
    """
    weight = known(name)
    if not weight.repo:
        raise ValueError(f"{name} is not on the hub: get {place(name)}: {origin(name)}")
    with one_line(name, weight):
        return [item(name, weight, file) for file in files(weight)]


def files(weight: Weight) -> Sequence[str]:
    """-> the names of its files, patterns resolved by the hub's list."""
    if not any("*" in file for file in weight.files):
        return weight.files
    listed = HfApi().list_repo_files(weight.repo)
    return [f for f in listed if any(fnmatch(f, pattern) for pattern in weight.files)]


def item(name: str, weight: Weight, file: str) -> Item:
    """-> one file, with what the hub tells about it."""
    url = hf_hub_url(weight.repo, file)
    told = get_hf_file_metadata(url)
    if told.size is None:
        raise ValueError(f"{url}: its size is not told")
    etag = told.etag or ""
    of_table = weight.sha256 if file == weight.files[0] else ""
    to = place(name) / file if weight.is_folder else place(name)
    return Item(name, url, to, told.size, of_table or (etag if len(etag) == 64 else ""), etag)


def is_there(item: Item) -> bool:
    """Whether it was fetched before; ValueError where another file is in its place."""
    if not item.to.exists():
        return False
    size = item.to.stat().st_size
    known = recorded(item.to.parent).get(item.to.name, {}).get("sha256", item.sha256)
    if size != item.size or (item.sha256 and known != item.sha256):
        raise ValueError(f"{item.to} is another file ({size} B, not {item.size}): move it away")
    return True


def fetch(item: Item) -> None:
    """Fetch one file, or the rest of it, check it, put it in its place, record it.

    ValueError, in one line, where the connection fails (what came is kept for the next time) or
    the file is not what it must be (it is deleted).
    """
    part = item.to.with_name(f".{item.to.name}.{item.etag[:12]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with one_line(item.weights, WEIGHTS[item.weights]), part.open("ab") as file:
        url, headers = source(item.url)
        http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=item.size)
    size, digest = part.stat().st_size, sha256(part)
    if size != item.size or (item.sha256 and digest != item.sha256):
        part.unlink()
        raise ValueError(f"{item.url}: what came has another SHA-256 ({digest}): try again")
    part.replace(item.to)
    entry = {item.to.name: {"size": size, "sha256": digest, "from": item.url}}
    write_json(item.to.parent / RECORD, {**recorded(item.to.parent), **entry})


def source(url: str) -> tuple[str, dict[str, str]]:
    """-> where the hub sends us, and headers: the token is for the hub alone."""
    headers = build_hf_headers()
    location = get_hf_file_metadata(url).location
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)
    return location, headers


@contextmanager
def one_line(name: str, weight: Weight) -> Iterator[None]:
    """Turn what may go wrong on the way into a ValueError of one line."""
    page = f"{constants.ENDPOINT}/{weight.repo}"
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{name}: accept its licence at {page}, log in with `hf auth login`, then try again"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(f"{name}: {page} has not all of {', '.join(weight.files)}") from error
    except TRANSPORT as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: {page} cannot be read: {told}") from error


if __name__ == "__main__":
    main()
