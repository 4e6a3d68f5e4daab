"""Which weights are here: python -m rewards.doctor."""

from collections.abc import Iterable
from pathlib import Path

import click

from rewards.intact import bytes_of, changed, fault, sha256
from rewards.weights import BACKBONES, METRICS, REWARDS, WEIGHTS, find, hint
from src.options import OneLineCommand, one_line_errors

SECTIONS = {"rewards": REWARDS, "metrics": METRICS, "backbones": BACKBONES}


@click.command(cls=OneLineCommand)
@click.option("--hash", "thoroughly", is_flag=True, help="Read the files, compare SHA-256.")
@one_line_errors
def main(thoroughly: bool) -> None:
    """Print which weights are found, missing or wrong, and how to get what is missing.

    Ends with 1 where something is wrong. Example: bash launch.sh doctor --hash
    """
    states = {name: state(name, thoroughly=thoroughly) for name in WEIGHTS}
    for section, names in SECTIONS.items():
        click.echo(f"{section}:")
        click.echo("\n".join(lines({name: states[name] for name in names}.items())))
    wrong = sum(found == "wrong" for found, _ in states.values())
    if wrong:
        raise ValueError(f"{wrong} of {len(states)} are wrong: see above")


def state(name: str, *, thoroughly: bool = False) -> tuple[str, str]:
    """-> found, missing or wrong, and where, how to get it, or what is wrong."""
    try:
        path = find(name)
    except ValueError as error:
        return "wrong", str(error)
    if path is None:
        return "missing", f"{WEIGHTS[name].what}, {WEIGHTS[name].size}: {hint(name)}"
    wrong = fault(path) or differs(name, path, thoroughly=thoroughly)
    return ("wrong", f"{path}: {wrong}") if wrong else ("found", f"{path} ({bytes_of(path):,} B)")


def differs(name: str, path: Path, *, thoroughly: bool) -> str:
    """-> how files differ from what was fetched, or from the table's SHA-256."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    told = next((how for p in files if (how := changed(p, thoroughly=thoroughly))), "")
    known = WEIGHTS[name].sha256
    if not told and thoroughly and known and path.is_file() and sha256(path) != known:
        return "its SHA-256 is not that of the published file"
    return told


def lines(states: Iterable[tuple[str, tuple[str, str]]]) -> list[str]:
    """-> a line for each."""
    return [f"  {name:<13} {found:<8} {detail}" for name, (found, detail) in states]


if __name__ == "__main__":
    main()
