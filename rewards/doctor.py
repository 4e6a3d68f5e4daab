"""Which weights are here: python -m rewards.doctor."""

from pathlib import Path

import click

from rewards.weights import TABLE, WEIGHTS, broken, find, hint, records, sha256
from src.options import OneLineCommand


@click.command(cls=OneLineCommand)
@click.option("--hash", "thoroughly", is_flag=True, help="Read the files, compare SHA-256.")
def main(thoroughly: bool) -> None:
    """Print which weights are found, missing or wrong, how to get them, and every place tried.

    Ends with 1 where something is wrong. Example: bash launch.sh doctor --hash
    """
    wrong = 0
    for section, names in TABLE.items():
        click.echo(f"{section}:")
        for name in names:
            state, detail = examine(name, thoroughly=thoroughly)
            wrong += state == "wrong"
            click.echo(f"  {name:<13} {state:<8} {detail}")
    if wrong:
        raise ValueError(f"{wrong} of {len(WEIGHTS)} are wrong: see above")


def examine(name: str, *, thoroughly: bool = False) -> tuple[str, str]:
    """found, missing or wrong; and where it is, how to get it, or what is wrong.

    thoroughly: also compare hashes with what was fetched and what is published.
    """
    try:
        path = find(name)
    except ValueError as error:
        return "wrong", str(error)
    if path is None:
        return "missing", hint(name).partition(": ")[2]
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    why = broken(path) or next((w for p in files if (w := _changed(p, thoroughly))), "")
    published = WEIGHTS[name].sha256 if path.name == Path(WEIGHTS[name].place).name else ""
    if not why and thoroughly and published and sha256(path) != published:
        why = "its SHA-256 is not that of the published file"
    size = sum(p.stat().st_size for p in files)
    return ("wrong", f"{path}: {why}") if why else ("found", f"{path} ({size:,} B)")


def _changed(path: Path, thoroughly: bool) -> str:
    """How a file differs from what was fetched; "" where it does not, or was not fetched."""
    size, record = path.stat().st_size, records(path.parent).get(path.name)
    if record and size != record["size"]:
        return f"it has {size} bytes, but {record['size']} were fetched"
    differs = record and thoroughly and sha256(path) != record["sha256"]
    return "its SHA-256 is not that of what was fetched" if differs else ""


if __name__ == "__main__":
    main()
