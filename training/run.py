"""Other names for parts of src.runs, for the modules that still import them from here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from src.runs import Metrics


@dataclass(frozen=True)
class Folder:
    path: Path
    say: Callable[[str], object]
    writes: bool = True

    def log(self, text: str) -> None:
        if self.writes:
            self.say(text)
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def forget_after(path: Path, ticks: int) -> None:
    Metrics(path / "metrics.jsonl").drop_after(ticks)
