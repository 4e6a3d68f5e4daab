"""Where and with what something was measured."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, machine, threads, device and versions, as plain values.

    The commit is of this checkout, "+changes" where files differ; None outside of git.
    """
    commit = None
    git = ["git", "-C", str(ROOT)]
    try:
        for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"]):
            done = subprocess.run([*git, *arguments], capture_output=True, text=True, check=True)
            commit = commit + "+changes" * bool(done.stdout) if commit else done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit,
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
