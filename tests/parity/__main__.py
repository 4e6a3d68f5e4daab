"""Ask the references and us the same, tell both, keep their numbers: make parity.

The references run in an environment of their own, which is made on the first call: 5 GB of old
packages. What cannot be installed or run is told with the reason, and its recorded numbers stay.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from src.files import nearest, read_json, write_json
from src.options import OneLineCommand, one_line_errors
from tests.parity.cases import OURS, write
from tests.parity.golden import DATA, furthest, limits
from tests.parity.theirs import NAMES, NUMBERS

HERE = Path(__file__).parent
PINS = HERE / "requirements.txt"
PATIENCE = 900  # seconds for one reference: a full-size network is initialised
STAMP = "requirements.sha256"


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.argument("names", nargs=-1)
@click.option(
    "--env",
    type=click.Path(path_type=Path),
    default=Path("build/parity/env"),
    help="The environment of the references; made where it is not, to be thrown away.",
)
@click.option(
    "--files",
    type=click.Path(path_type=Path),
    default=Path("build/parity/files"),
    help="Where the small models and pictures go.",
)
@one_line_errors
def main(names: tuple[str, ...], env: Path, files: Path) -> None:
    """Compare with the references of these NAMES, or with all, and record their numbers.

    Ends with 1 where numbers are apart. Example: make parity
    """
    known = [*NUMBERS, *(f"names.{name}" for name in NAMES)]
    for name in names:
        if name not in known:
            raise ValueError(f"no reference {name!r}: did you mean {nearest(name, known)}?")
    python = environment(env)
    write(files)
    recorded: dict[str, Any] = read_json(DATA) if DATA.is_file() else {}
    ours = {name: answer(files) for name, answer in OURS.items() if asked(name, names)}
    apart = []
    for name in names or known:
        said = ask(python, name, files)
        if isinstance(said, str):
            click.echo(f"{name:<22} could not be run: {said}")
            continue
        recorded[name] = said
        if "numbers" not in said:
            count = sum(number for number, _ in said["names"].values())
            click.echo(
                f"{name:<22} {count:>4} names and shapes of the published size, {said['by']}"
            )
            continue
        far = furthest(ours[name.partition(".")[0]], said["numbers"], limits(name))
        verdict = "the same" if far <= 1 else "APART"
        apart += [name] if far > 1 else []
        count = len(said["numbers"])
        click.echo(
            f"{name:<22} {count:>4} numbers, {far:.2g} of what is allowed: {verdict}, {said['by']}"
        )
    write_json(DATA, {name: recorded[name] for name in known if name in recorded})
    if apart:
        raise ValueError(f"{len(apart)} references give other numbers: {', '.join(apart)}")


def asked(ours: str, names: tuple[str, ...]) -> bool:
    """Whether a number of ours is wanted."""
    return not names or any(name.partition(".")[0] == ours for name in names)


def environment(folder: Path) -> Path:
    """-> the Python of the references' environment, which is made, or mended, if need be.

    ValueError with pip's own reason where a package cannot be had.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = hashlib.sha256(PINS.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    click.echo(f"installing the references into {folder} (5 GB, some minutes) ...", err=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    done = subprocess.run([*pip, "-r", str(PINS)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the references cannot be installed: {reason(done.stderr)}")
    stamp.write_text(wanted)
    return python


def ask(python: Path, name: str, files: Path) -> dict[str, Any] | str:
    """-> what a reference says, or why it cannot be run."""
    kind, of = ("names", name[6:]) if name.startswith("names.") else ("numbers", name)
    command = [str(python), str(HERE / "theirs.py"), kind, of, str(files)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {PATIENCE} s"
    return reason(done.stderr) if done.returncode else json.loads(done.stdout)


def reason(errors: str) -> str:
    """The last thing that a program said when it failed; of pip, its last error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["nothing was said"]
    return next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])


if __name__ == "__main__":
    main()
