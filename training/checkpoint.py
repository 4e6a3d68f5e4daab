"""Sealed files: tensors and plain values with a checksum, written whole or not at all.

A sealed file is one line of text (a mark and the SHA-256 of the rest) and what `torch.save`
wrote; it is read by `torch.load(weights_only=True)` only where the checksum holds. Checkpoints
and cached trajectories are sealed files.
"""

import hashlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from src.files import write_atomically

MARK = b"epd-sealed-1 "
KEPT = 2
"""Checkpoints that a run keeps unless told otherwise: the newest, and one should it be broken."""
NAME = re.compile(r"checkpoint-([0-9]{8})\.pt")


def write_sealed(path: str | Path, content: dict[str, Any]) -> int:
    """Write tensors, numbers, text, lists and dicts of them; -> the size in bytes.

    Raises ValueError where the folder or the file cannot be written.
    """
    payload = sealed(content)
    with write_atomically(path) as temp:
        temp.write_bytes(payload)
    return len(payload)


def sealed(content: dict[str, Any]) -> bytes:
    """The bytes of a sealed file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    return MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


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
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds what is not read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], *, kept: int = KEPT) -> Path:
    """Write folder/checkpoint-<step>.pt and drop all but the newest `kept`."""
    path = folder / f"checkpoint-{step:08d}.pt"
    write_sealed(path, content)
    for old in checkpoints(folder)[kept:]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def latest_checkpoint(folder: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that can be read; `say` hears of each that cannot.

    Raises ValueError where the folder has none.
    """
    broken = []
    for path in checkpoints(folder):
        try:
            return path, read_sealed(path)
        except ValueError as error:
            broken.append(path.name)
            say(f"{error}: going back to the one before")
    if broken:
        raise ValueError(f"{folder} has no checkpoint that is whole ({', '.join(broken)})")
    raise ValueError(f"{folder} has no checkpoint: start without --resume")
