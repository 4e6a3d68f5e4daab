"""Numbered run folders, `exps/00001-<what>`, and the log of a run's numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.files import append_jsonl, read_jsonl

NUMBERED = re.compile(r"([0-9]{5,})-")


def new_run(what: str, root: str | Path = "exps") -> Path:
    """Make and return the next folder, numbered one above the highest under `root`.

    Processes that ask for one name at once get a folder each. ValueError if `what` cannot be
    a file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", what):
        raise ValueError(f"'{what}' cannot name a run: use letters, digits, '.', '_' and '-'")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    while True:
        found = [int(m[1]) for p in root.iterdir() if (m := NUMBERED.match(p.name))]
        number = max(found, default=0) + 1
        folder = root / f"{number:05d}-{what}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


@dataclass(frozen=True)
class Metrics:
    """A JSON-lines file of numbers by step: valid JSON at every moment, never NaN."""

    path: Path

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line. ValueError for NaN and infinity."""
        append_jsonl(self.path, {"step": step, **values})

    def read(self) -> list[dict[str, Any]]:
        """-> all lines; none while there is no file."""
        return read_jsonl(self.path) if self.path.exists() else []
