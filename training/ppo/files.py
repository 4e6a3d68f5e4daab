"""What a run writes, and where it is taken up again. Only the first rank writes.

logs/         metrics.jsonl, log.txt, TensorBoard's events
checkpoints/  the last few, and best.pt
samples/      pictures of the same prompts and noises at every save
export/       a predictor of every save, and network-snapshot-export-best.pkl
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solvers.predictor import save_predictor
from src.images import grid, save_png
from src.runs import Metrics
from training.checkpoint import (
    NAME,
    checkpoints,
    latest_checkpoint,
    read_sealed,
    save_checkpoint,
    write_sealed,
)
from training.ppo.state import exported
from training.run import Folder, forget_after

BEST = "best"


def export_path(folder: Path, step: int | str) -> Path:
    """Where the predictor of a step lies, or the best one."""
    name = f"step{step:06d}" if isinstance(step, int) else step
    return folder / "export" / f"network-snapshot-export-{name}.pkl"


@dataclass(frozen=True)
class Files:
    """The folder of a run."""

    folder: Path
    log: Folder
    board: Any = None  # TensorBoard's writer, where it is installed and wanted

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, and the same for TensorBoard."""
        if not self.log.writes:
            return
        Metrics(self.log.path / "metrics.jsonl").write(step, values)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def keep(self, content: Mapping[str, Any], kept: int) -> None:
        """Write a checkpoint."""
        if self.log.writes:
            save_checkpoint(self.folder / "checkpoints", content["step"], dict(content), kept=kept)

    def export(self, content: Mapping[str, Any], step: int | str) -> None:
        """Write the policy's mean as a predictor."""
        path = export_path(self.folder, step)
        if self.log.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_predictor(exported(content, "this run"), path)

    def keep_best(self, content: Mapping[str, Any]) -> None:
        """Write the best checkpoint and predictor so far."""
        if self.log.writes:
            write_sealed(self.folder / "checkpoints" / f"{BEST}.pt", dict(content))
        self.export(content, BEST)

    def show(self, images: torch.Tensor, step: int) -> None:
        """Write pictures [B, C, H, W] as one grid."""
        if self.log.writes:
            finite = images.float().cpu().nan_to_num(0.0)
            save_png(self.folder / "samples" / f"step{step:06d}.png", grid(finite, gap=2))

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        if self.board is not None:
            self.board.close()


def open_files(
    folder: Path, say: Callable[[str], object], step: int, *, writes: bool, board: bool
) -> Files:
    """The files of a run that stands at `step`; what was told after it is dropped."""
    logs = folder / "logs"
    log = Folder(logs, say, writes)
    if not writes:
        return Files(folder, log)
    logs.mkdir(parents=True, exist_ok=True)
    forget_after(logs, step)
    for path in checkpoints(folder / "checkpoints"):
        found = NAME.fullmatch(path.name)
        if found and int(found[1]) > step:
            path.unlink(missing_ok=True)
    return Files(folder, log, open_board(logs, step, log.log) if board else None)


def open_board(logs: Path, step: int, say: Callable[[str], object]) -> Any:
    """TensorBoard's writer; None, and a word, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (slow, and optional)
    except ImportError:
        say("no TensorBoard here (pip install tensorboard): metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(str(logs), purge_step=step + 1 if step else None)


def read_checkpoint(path: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, or the newest whole one of a run's folder; `say` hears of broken ones.

    Raises ValueError where there is none.
    """
    if path.is_file() or path.suffix == ".pt":
        return path, read_sealed(path)
    inner = path / "checkpoints"
    return latest_checkpoint(inner if inner.is_dir() else path, say)
