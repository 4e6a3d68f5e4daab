"""The names that rewards still use; `src.pickles` has the reader."""

from pathlib import Path
from typing import Any

from src.pickles import Inert as Persistent
from src.pickles import read_pickle

__all__ = ["Persistent", "read_persistent"]


def read_persistent(path: str | Path, *, foreign: str = "inert") -> Any:
    """As `read_pickle`, which takes foreign classes always."""
    assert foreign in ("inert", "refuse")
    return read_pickle(path)
