"""The commands of the root, each run in a process of its own, and what it took.

    python -m eval.scripts REPORT train_distill.py --num_steps 4 ...
    python -m eval.scripts REPORT idle MODEL DEVICE

run a command, or load a model and do nothing, and write the peak of memory as JSON to REPORT.
What measures does not import what trains: it runs the command that people run.
"""

import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.machine import ROOT
from src.files import read_json, write_json

IDLE = "idle"
POLL = 0.1  # seconds
STOPPED = 128 + 15
"""The exit status of a command that SIGTERM ended in good order."""


@dataclass(frozen=True)
class Ran:
    """What a command took."""

    seconds: float  # of the whole process, loading included
    peak: int  # bytes: of the GPU where one was used, else resident


def run_script(
    script: str, options: Sequence[str], enough: Callable[[], bool] = lambda: False
) -> Ran:
    """Run a command of the root in a fresh process, ended by SIGTERM once there is `enough`.

    Raises ValueError with the command's own last line where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "peak.json"
        command = [sys.executable, "-m", "eval.scripts", str(report), script, *options]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        said, stopped = heard(process, enough)
        seconds = time.perf_counter() - started
        if process.returncode and not (stopped and process.returncode == STOPPED):
            raise ValueError(f"{script}: {last_line(said)}")
        return Ran(seconds, read_json(report)["peak"])


def heard(process: subprocess.Popen[str], enough: Callable[[], bool]) -> tuple[str, bool]:
    """What a process said until its end, and whether it was asked to end."""
    stopped = False
    try:
        while True:
            try:
                return process.communicate(timeout=POLL)[1], stopped
            except subprocess.TimeoutExpired:
                if not stopped and enough():
                    process.terminate()
                    stopped = True
    finally:
        process.kill()  # where we are interrupted; it has ended otherwise


def last_line(said: str) -> str:
    """The last line, without click's mark."""
    lines = said.strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("Error: ")


def peak_memory() -> int:
    """The peak of this process in bytes: allocated on its GPUs if it used any, else resident.

    Linux's own mark is read where it is, as `ru_maxrss` starts from the parent's size there.
    """
    if torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    if marks:
        return int(marks[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(report: str, script: str, *options: str) -> None:
    """Be the script, and write the peak of memory at its end."""
    try:
        if script == IDLE:
            from backends.load import load_backend  # noqa: PLC0415 (not what a script is without)

            load_backend(options[0], device=torch.device(options[1]))
        else:
            sys.argv = [script, *options]
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        write_json(report, {"peak": peak_memory()})


if __name__ == "__main__":
    main(*sys.argv[1:])
