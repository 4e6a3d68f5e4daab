import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src import ranks

ROOT = Path(__file__).parents[2]
WORK = """
import json, sys, torch
from pathlib import Path
from src import ranks
from src.runs import Stop, Stopped
def count():
    return len([*Path("/proc/self/task").iterdir()])
before = count()
ranks.init(torch.device("cpu"))
import torch.distributed.nn.functional  # has the group in its defaults, as diffusers makes it
ranks.barrier()
mine = torch.tensor([ranks.rank() + 1.0, 10.0])
out = {
    "share": ranks.of_each_rank(ranks.share(list("abcde"))),
    "sum": ranks.all_reduce_sum(mine).tolist(),
    "mine": mine.tolist(),
    "first": ranks.is_first(),
}
stop = Stop(signal=15 if ranks.rank() else None)  # one is asked to stop
try:
    stop.poll()
    stop.agree()
except Stopped:
    out["stopped"] = True
ranks.point_mesh(2, torch.device("cpu"))  # from here on they share rows, and count as one
out["as one"] = [ranks.rank(), ranks.world_size(), ranks.share("ab"), ranks.of_each_rank("x")]
out["own sum"], out["writes"] = ranks.all_reduce_sum(mine).tolist(), ranks.is_first()
out["any"] = ranks.any_of(not out["writes"])
ranks.close()
out["threads"] = count() - before  # one that lives on may abort the process at its end
print(json.dumps(out))
"""


def test_two_processes_split_the_work_add_up_and_stop_together() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    first, second = (json.loads(p.communicate(timeout=300)[0]) for p in processes)
    both = {"share": [["a", "c", "e"], ["b", "d"]], "sum": [3.0, 20.0], "stopped": True}
    both |= {"as one": [0, 1, ["a", "b"], ["x"]], "any": True, "threads": 0}
    for one, leads, mine in ((first, True, [1.0, 10.0]), (second, False, [2.0, 10.0])):
        own = {"mine": mine, "own sum": mine, "first": leads, "writes": leads}
        assert one == both | own


def test_progress_in_a_log_is_a_few_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("src.ranks.EVERY", 0.3)
    with ranks.progress(4, "image") as bar:
        for _ in range(4):
            time.sleep(0.11)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("4/4 images in 00:0")
    assert 1 <= len(lines) <= 4


def test_an_error_of_a_rank_stays_the_last_line(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import click\nfrom src.options import OneLineCommand\n"
        "@click.command(cls=OneLineCommand)\ndef main():\n    raise MemoryError\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "src.ranks", "--standalone", "--nproc_per_node=2", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: the memory is full")
    assert done.stderr.count("Error") == 1
