"""A run that can be stopped and taken up again, of either stage: its folder and what lies there.

Settings as YAML, `metrics.jsonl`, `log.txt`, and checkpoints sealed by a checksum. The checkpoint
is written last, so what a run wrote after its newest one is dropped when it goes on.

A sealed file is one line of text (a mark and the SHA-256 of the rest) and what `torch.save` wrote;
it is read as inert data (`src.pickles`), and only where the checksum holds.
"""

import dataclasses
import hashlib
import io
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import OmegaConf

from src import ranks
from src.files import append_jsonl, read_jsonl, to_json, write_atomically, write_text
from src.pickles import BROKEN, read_zip

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NUMBERED = re.compile(r"(?![0-9]{8}-[0-9]{6}(?:\.[0-9]+)?-)([0-9]{5,})-")  # not by time
LATEST = "latest"
MARK = b"epd-sealed-1 "
CHECKPOINT = re.compile(r"checkpoint-[0-9]{8,}\.pt")
KEPT = 2  # checkpoints: the newest, and one more should that be damaged


# --- folders ------------------------------------------------------------------------------


def new_run(what: str, root: str | Path = "exps", *, stamped: bool = False) -> Path:
    """The next folder `00001-<what>` under `root`, numbered one above the highest, made.

    `stamped`: `20260131-120000-<what>` instead; `.2` follows the time where it is taken. Processes
    that ask for one name at once get a folder each.

    Raises ValueError if `what` cannot be a file name, or `root` cannot be made.
    """
    if not NAME.fullmatch(what):
        raise ValueError(f"'{what}' cannot name a run: use letters, digits, '.', '_' and '-'")
    root, stamp = Path(root), time.strftime("%Y%m%d-%H%M%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {root}: {error.strerror}") from error
    for n in count(1):
        numbers = [int(m[1]) for p in root.iterdir() if (m := NUMBERED.match(p.name))]
        usual = f"{max(numbers, default=0) + 1:05d}"
        folder = root / f"{stamp + (f'.{n}' if n > 1 else '') if stamped else usual}-{what}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def find_run(
    resume: str, root: Path, *, settings: str, name: str = "*", checkpoints: str | None = None
) -> Path:
    """The folder of the run to go on with: of a checkpoint, of a path, or the latest.

    `resume` is a path or "latest": then it is the newest folder under `root` whose name, behind
    its number or time, is `name` (* is any), which has the file `settings` and, where the pattern
    `checkpoints` is given, one such file.

    Raises ValueError where there is none.
    """
    if resume == LATEST:
        ending = ".*" if name == "*" else re.escape(name)
        stamp = re.compile(rf"([0-9]{{5,}}(?:-[0-9]{{6}}(?:\.[0-9]+)?)?)-{ending}")
        runs = []
        for folder in root.iterdir() if root.is_dir() else ():
            match = stamp.fullmatch(folder.name)
            with_one = checkpoints is None or any(folder.glob(checkpoints))
            if match and with_one and (folder / settings).is_file():
                runs.append(([int(part) for part in re.split("[-.]", match[1])], folder))
        if not runs:
            what = f"run {name!r}" if name != "*" else "run"
            having = "" if checkpoints is None else " with a checkpoint"
            raise ValueError(f"no {what}{having} in {root}: start without --resume")
        return max(runs)[1]
    path = Path(resume)
    if not path.exists():
        raise ValueError(f"no run and no checkpoint at {resume}: give its path, or {LATEST}")
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / settings).is_file():
            return folder
    raise ValueError(f"{resume} is no folder of a run: it has no {settings}")


# --- what lies there ----------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """A JSON-lines file of numbers by step: valid JSON at every moment, never NaN."""

    path: Path

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line. ValueError for NaN and infinity."""
        append_jsonl(self.path, {"step": step, **values})

    def read(self) -> list[dict[str, Any]]:
        """All lines; none while there is no file."""
        return read_jsonl(self.path) if self.path.exists() else []

    def drop_after(self, step: int, again: str = "") -> None:
        """Take out the lines of later steps, and those of this one that have a number `again`.

        Raises ValueError as `read_jsonl`.
        """
        if self.path.exists():
            lines = (line for line in self.read() if line["step"] <= step)
            kept = (line for line in lines if line["step"] < step or again not in line)
            write_text(self.path, "".join(to_json(line) + "\n" for line in kept))


@dataclass(frozen=True)
class Run:
    """A run's folder, and where its parts lie in it; only the first rank writes."""

    folder: Path
    say: Callable[[str], object]  # hears each line of the log
    writes: bool = True
    settings: str = "config.yaml"
    logs: str = "."
    checkpoints: str = "."
    keep: int = KEPT  # checkpoints

    @property
    def metrics(self) -> Metrics:
        """Its numbers by step."""
        return Metrics(self.folder / self.logs / "metrics.jsonl")

    def log(self, text: str) -> None:
        """Add a line to log.txt, and show it."""
        if self.writes:
            self.say(text)
            path = self.folder / self.logs / "log.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def measure(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line of numbers."""
        if self.writes:
            self.metrics.write(step, values)

    def write_settings(self, settings: Any) -> None:
        """Write a dataclass of settings as YAML."""
        if self.writes:
            text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))
            write_text(self.folder / self.settings, text)

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step; all but the newest `keep` go."""
        if self.writes:
            folder = self.folder / self.checkpoints
            write_sealed(folder / f"checkpoint-{step:08d}.pt", content)
            for old in checkpoints(folder)[self.keep :]:
                old.unlink(missing_ok=True)

    def newest(self, say: Callable[[str], object] | None = None) -> tuple[Path, dict[str, Any]]:
        """The newest whole checkpoint and its content; `say`, or the log, names damaged ones.

        Raises ValueError where there is none.
        """
        folder, broken = self.folder / self.checkpoints, []
        for path in checkpoints(folder):
            try:
                return path, read_sealed(path)
            except ValueError as error:
                broken.append(path.name)
                (say or self.log)(f"{error}: going back to the one before")
        if broken:
            raise ValueError(f"{folder} has no checkpoint that is whole ({', '.join(broken)})")
        raise ValueError(f"{folder} has no checkpoint: give a run that has one, or start anew")

    def rewind(self, step: int, again: str = "") -> None:
        """Drop the numbers and the checkpoints of later steps, which are done again.

        So do lines of the step itself that have a number `again`.
        """
        if self.writes:
            self.metrics.drop_after(step, again)
            for path in checkpoints(self.folder / self.checkpoints):
                if step_of(path) > step:
                    path.unlink(missing_ok=True)


# --- checkpoints --------------------------------------------------------------------------


def write_sealed(path: str | Path, content: Mapping[str, Any]) -> int:
    """Write tensors, numbers, text, lists and dicts of them; -> the size in bytes.

    Raises ValueError where the folder or the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    payload = buffer.getvalue()
    whole = MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
    with write_atomically(path) as temp:
        temp.write_bytes(whole)
    return len(whole)


def read_sealed(path: str | Path) -> dict[str, Any]:
    """The content of a sealed file, tensors on the CPU.

    Raises ValueError in one line, naming the file: missing, cut off, changed, or another format.
    """
    path = Path(path)
    try:
        head, _, payload = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not head.startswith(MARK):
        raise ValueError(f"{path} is no checkpoint of ours")
    if hashlib.sha256(payload).hexdigest().encode() != head.removeprefix(MARK):
        raise ValueError(f"{path} is damaged: its checksum does not hold")
    try:
        content = read_zip(io.BytesIO(payload), bytearray(payload))
    except BROKEN as error:
        what = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{path} holds what is not read: {what}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = [path for path in folder.glob("checkpoint-*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.stem.partition("-")[2])


# --- signals ------------------------------------------------------------------------------


class Stopped(Exception):
    """The run was asked to stop, and may: its state can be written down."""


@dataclass
class Stop:
    """Whether a signal came; `held` while results are written, when none is heard."""

    signal: int | None = None
    held: bool = False

    def poll(self) -> None:
        """Raise Stopped where a signal came, once the other ranks are about to reduce.

        Every reduction of a run begins with `agree`, which is what this one meets there. Ranks
        that share the rows of a call wait for each other in it, and stop at a reduction alone.
        """
        if self.signal is not None and not self.held and ranks.degree() == 1:
            self.agree()

    def agree(self) -> None:
        """Raise Stopped on all ranks where one is asked to stop; all ranks must call this."""
        if ranks.any_of(self.signal is not None and not self.held):
            raise Stopped

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self.signal = number

    @property
    def exit_status(self) -> int:
        """What a stopped process ends with: 128 and the signal's number."""
        return 128 + (self.signal or signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the run in good order meanwhile."""
        before = {n: signal.signal(n, self.hear) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
