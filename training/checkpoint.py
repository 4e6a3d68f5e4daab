"""Another name for a part of src.runs, for the modules that still import it from here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.runs import CHECKPOINT as NAME
from src.runs import Run, checkpoints, read_sealed, write_sealed

__all__ = ["NAME", "checkpoints", "read_sealed", "write_sealed"]


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any], *, kept: int = 2) -> Path:
    Run(folder, lambda _text: None, keep=kept).save(step, content)
    return folder / f"checkpoint-{step:08d}.pt"


def latest_checkpoint(folder: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    run = Run(folder, lambda _text: None)
    object.__setattr__(run, "log", say)
    return run.newest()
