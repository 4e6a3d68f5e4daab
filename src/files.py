"""Files written whole or not at all, JSON, names that are near, and predictors by name."""

import difflib
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NoReturn

EXPS = Path(__file__).resolve().parent.parent / "exps"
IN_RUN = ("predictor.pkl", "export/*-best.pkl", "network-snapshot-*.pkl", "export/network-*.pkl")
"""Where a run of stage 1 or 2, ours or the published code's, keeps its best or last predictor."""


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` at the end.

    The temporary path keeps the suffix, for writers that look at it. If the block raises, or
    the machine stops, `path` is as it was. Missing folders are made. A link stays one, and a pipe
    or a device (/dev/stdout) is written into. ValueError where the folder cannot be made, or the
    file cannot be written or put in its place.
    """
    path = Path(path)
    if is_special(path):
        with TemporaryDirectory() as folder:
            yield Path(folder, path.name)
            path.write_bytes(Path(folder, path.name).read_bytes())
        return
    with suppress(OSError):  # of a name that is too long
        path = path.resolve() if path.is_symlink() else path
    temp = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    try:
        yield temp
        with temp.open("r+b") as file:
            os.fsync(file.fileno())
        temp.replace(path)
    except OSError as error:
        if error.errno is None or str(error.filename or temp) != str(temp):
            raise  # not of this file
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether there is a pipe or a device at a path."""
    with suppress(OSError):
        return path.exists() and not (path.is_file() or path.is_dir())
    return False


def check_writable(path: Path) -> None:
    """ValueError where no file can be written at `path`: told before the work, not after.

    Folders that are missing are not made.
    """
    if is_special(path):
        return
    try:
        with TemporaryFile(dir=next(place for place in path.absolute().parents if place.exists())):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file, whole or not at all. ValueError where it cannot be written."""
    with write_atomically(path) as temp:
        shutil.copyfile(source, temp)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. ValueError where it cannot be written."""
    with write_atomically(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON. ValueError for NaN, infinity and what JSON cannot hold."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN, infinity and foreign objects are a ValueError."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"this value cannot be written as JSON: {error}") from error


def from_json(text: str, name: str) -> Any:
    """The value of a JSON text; ValueError, naming the file `name`, where it is broken."""

    def no_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{name} is not JSON ({error.msg}, {place})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. ValueError if it is missing, unreadable or broken."""
    return from_json(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file. ValueError if it is missing or unreadable."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {path}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (byte {error.start})") from error


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one record as a line of JSON. A line that a stopped run left half-written goes.

    ValueError for NaN, infinity and what JSON cannot hold.
    """
    line = (to_json(record) + "\n").encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, but not a last line that was never finished.

    ValueError if the file is missing or a whole line is broken.
    """
    lines = read_text(path).split("\n")[:-1]
    return [from_json(line, f"{path}, line {i}:") for i, line in enumerate(lines, 1)]


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` (at least one) that is most like `name`, for "did you mean"."""
    by_lower = {n.lower(): n for n in names}
    assert by_lower, "nearest() needs a name to choose from"
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def find_predictors(name: str) -> list[Path]:
    """The files of a pattern, which may start at exps/ wherever one is, or of the one predictor.

    Raises ValueError where there is none.
    """
    if Path(name).is_file() or not glob.has_magic(name):
        return [find_predictor(name)]
    tried = (glob.glob(str(base / name), recursive=True) for base in (Path(), EXPS.parent))  # noqa: PTH207
    paths = next(filter(None, tried), [])
    files = [path for path in map(Path, paths) if path.is_file()]
    if not files:
        raise ValueError(f"no predictor is named {name!r}")
    return sorted(files, key=lambda path: path.with_suffix(""))  # x.pkl before x-tuned.pkl


def find_predictor(name: str, exps: Path = EXPS) -> Path:
    """The file of a predictor: a path, a run's folder or its number, or a name within exps/.

    `cifar10-5nfe` and `cifar10/cifar10-5nfe` find exps/cifar10/cifar10-5nfe.pkl, `2` the best or
    last predictor of the run exps/00002-...
    Raises ValueError where there is none, with the nearest names, or several have that name.
    """
    if Path(name).is_file():
        return Path(name)
    runs = sorted(exps.glob(f"{int(name):05d}-*/")) if re.fullmatch("[0-9]{1,9}", name) else []
    if len(runs) > 1:
        raise ValueError(f"run {name} may be {' or '.join(run.name for run in runs)}: say which")
    for pattern in IN_RUN:
        if files := sorted((runs[0] if runs else Path(name)).glob(pattern)):
            return files[-1]
    shipped = {p.relative_to(exps).with_suffix("").as_posix(): p for p in exps.rglob("[!.]*.pkl")}
    wanted = name.removesuffix(".pkl").removeprefix("exps/").rstrip("/")
    matches = [k for k in shipped if k in (wanted, f"{wanted}/predictor")]
    matches = matches or [k for k in shipped if k.endswith(f"/{wanted}")]
    if len(matches) > 1:
        raise ValueError(f"{name!r} may be {' or '.join(sorted(matches))}: say which")
    if matches:
        return shipped[matches[0]]
    names = sorted({k.rpartition("/")[2] for k in shipped} | {*shipped})
    near = ", ".join(difflib.get_close_matches(wanted, names, 3, 0.4) or names[:3])
    hint = f"the nearest are {near}" if near else f"{exps} has none"
    raise ValueError(f"no file and no shipped predictor {name[:200]!r}: {hint}")
