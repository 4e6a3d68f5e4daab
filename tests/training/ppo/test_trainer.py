import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.predictor import load_predictor
from src.runs import Metrics, Stop, Stopped, read_sealed, write_sealed
from tests.training.ppo.quadrature import EVERY, SHORT, reward, short_run, table, task
from training.ppo.trainer import export_path, train

ROOT = Path(__file__).parents[3]
LAST = Path("checkpoints") / f"checkpoint-{SHORT.steps:08d}.pt"
TIMES = ("seconds/", "images_per_second")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    short_run(folder)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run told, but for how long it took."""
    lines = Metrics(folder / "logs" / "metrics.jsonl").read()
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def alike(one: Any, other: Any) -> bool:
    """Whether two contents of checkpoints are the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def test_evaluations_hold_the_policy_against_the_start(whole: Path) -> None:
    lines = [line for line in metrics(whole) if "eval/near_gain" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["eval/near_gain"] == 0
    for line in lines:
        gain = line["eval/near"] - line["eval/near_start"]
        assert line["eval/near_gain"] == pytest.approx(gain, rel=1e-4)  # by prompt
        assert line["eval/near_gain_low"] <= line["eval/near_gain"] <= line["eval/near_gain_high"]


@pytest.mark.parametrize("step", range(4))
def test_a_run_that_goes_on_is_the_one_that_was_never_stopped(
    whole: Path, tmp_path: Path, step: int
) -> None:
    source = whole / "checkpoints" / f"checkpoint-{step:08d}.pt"
    short_run(tmp_path, resume=source)
    assert alike(read_sealed(tmp_path / LAST), read_sealed(whole / LAST))
    after = [line for line in metrics(whole) if line["step"] > step]
    assert [line for line in metrics(tmp_path) if line["step"] > step] == after


def test_the_best_export_is_that_of_the_evaluation_that_gained_most(whole: Path) -> None:
    lines = [line for line in metrics(whole) if "eval/near_gain" in line]
    best = max(lines, key=lambda line: line["eval/near_gain"])["step"]
    found, wanted = (load_predictor(export_path(whole, step)) for step in ("best", best))
    assert torch.equal(found.table.r, wanted.table.r)
    assert read_sealed(whole / "checkpoints" / "best.pt")["step"] == best


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    whole: Path, tmp_path: Path
) -> None:
    for name in ("checkpoint-00000002.pt", "checkpoint-00000003.pt"):
        content = (whole / "checkpoints" / name).read_bytes()
        cut = content if "2" in name else content[:-50]
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cut)
    heard: list[str] = []
    train(task(), SHORT, EVERY, tmp_path, resume=tmp_path, say=heard.append)
    assert any("checkpoint-00000003.pt is damaged" in text for text in heard)
    assert any("checkpoint-00000002.pt at step 2" in text for text in heard)
    assert alike(read_sealed(tmp_path / LAST), read_sealed(whole / LAST))


def test_a_signal_saves_and_stops_and_the_run_goes_on_from_there(
    whole: Path, tmp_path: Path
) -> None:
    stop, calls = Stop(), []

    def slow(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        calls.append(len(images))
        if len(calls) == 9:  # in the third rollout, say, or an evaluation
            stop.hear(15, None)
        return reward(images, prompts)

    rare = replace(EVERY, save_interval=100)
    with pytest.raises(Stopped):
        train(replace(task(), score=slow), SHORT, rare, tmp_path, stop=stop)
    found = max((tmp_path / "checkpoints").glob("checkpoint-*.pt"))
    assert 0 < read_sealed(found)["step"] < SHORT.steps
    short_run(tmp_path, resume=tmp_path)
    assert alike(read_sealed(tmp_path / LAST), read_sealed(whole / LAST))
    assert metrics(tmp_path) == metrics(whole)


def test_a_checkpoint_of_other_settings_or_another_table_is_refused(whole: Path) -> None:
    source = whole / "checkpoints" / "checkpoint-00000001.pt"
    other = replace(SHORT, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"was made with ppo.learning_rate 0.01, not 0.1"):
        train(task(), other, EVERY, whole, resume=source)
    with pytest.raises(ValueError, match="began with another table"):
        train(task(table(0.4)), SHORT, EVERY, whole, resume=source)


def test_rewards_that_are_no_numbers_are_left_out_until_the_budget_is_spent(
    tmp_path: Path,
) -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = reward(images, prompts)
        bad = torch.tensor([p == "ppp" for p in prompts])
        return found | {"near": found["near"].masked_fill(bad, math.nan)}

    sick = replace(task(), score=broken)
    train(sick, replace(SHORT, nonfinite_budget=8), EVERY, tmp_path / "a")
    lines = [line for line in metrics(tmp_path / "a") if "reward" in line]
    assert lines[-1]["nonfinite"] == 4  # the 4 images of one of 7 prompts, in 8 groups
    assert all(math.isfinite(v) for line in lines for v in line.values())
    with pytest.raises(ValueError, match=r"4 images had no finite reward.*is 3: near gave nan"):
        train(sick, replace(SHORT, nonfinite_budget=3), EVERY, tmp_path / "b")


def test_a_run_that_no_longer_gains_stops_early_when_asked(tmp_path: Path) -> None:
    still = replace(SHORT, steps=40, learning_rate=1e-12, eval_interval=1, early_stop=2)
    flat = replace(task(), score=lambda images, _: {"near": images.new_zeros(len(images))})
    outcome = train(flat, still, EVERY, tmp_path)
    assert outcome.stopped_early
    assert outcome.steps == 2


@pytest.mark.parametrize("method", ["cma", "quotients"])
def test_rivals_go_on_as_if_they_had_never_stopped(tmp_path: Path, method: str) -> None:
    rival = replace(SHORT, method=method, learning_rate=0.3)
    for name in ("whole", "cut"):
        short_run(tmp_path / name, rival)
    source = tmp_path / "cut" / "checkpoints" / "checkpoint-00000002.pt"
    short_run(tmp_path / "cut", rival, resume=source)
    ends = [read_sealed(tmp_path / name / LAST) for name in ("whole", "cut")]
    assert alike(ends[0], ends[1])
    with pytest.raises(ValueError, match=r"was made with ppo.learning_rate 0\.3, not 0\.01"):
        short_run(tmp_path / "cut", resume=tmp_path / "cut")


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    write_sealed(tmp_path / "old.pt", {"step": 3, "policy": {}})
    with pytest.raises(ValueError, match=r"old.pt is no checkpoint of this version.*start anew"):
        short_run(tmp_path / "new", resume=tmp_path / "old.pt")


def test_a_judge_is_watched_where_that_is_asked(tmp_path: Path) -> None:
    def judge(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"far": -reward(images, prompts)["near"]}

    watched = replace(SHORT, watch="far", early_stop=1, steps=40)
    outcome = train(replace(task(), judge=judge), watched, EVERY, tmp_path)
    lines = [line for line in metrics(tmp_path) if "eval/far_gain" in line]
    best = max(lines, key=lambda line: line["eval/far_gain"])
    assert lines[-1]["eval/best_step"] == best["step"]
    assert outcome.stopped_early


def test_several_noises_to_a_prompt_show_diversity_and_the_distance_of_the_set(
    tmp_path: Path,
) -> None:
    several = replace(SHORT, steps=2, eval_seeds=3, pull_coef=0.1)
    train(task(), several, EVERY, tmp_path)
    first, *steps, last = metrics(tmp_path)
    assert first["eval/diversity_gain"] == 0
    assert last["eval/frechet_start"] == first["eval/frechet"] > 0
    assert last["eval/diversity_pairs"] == 18
    assert all(line["reward/pull"] > 0 for line in steps)


WORK = """
import sys
from pathlib import Path
import torch
from src import ranks
from tests.training.ppo.quadrature import short_run
ranks.init(torch.device("cpu"))
short_run(Path(sys.argv[1]))
ranks.close()
"""


def test_two_ranks_make_the_run_of_one_and_one_goes_on_where_two_stood(
    whole: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path)],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
        )
        for r in range(2)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    same_run(tmp_path, whole)
    short_run(tmp_path, resume=tmp_path / "checkpoints" / "checkpoint-00000002.pt")
    same_run(tmp_path, whole)


KILLED = """
import os
import signal
import sys
from itertools import count
from pathlib import Path
from tests.training.ppo.quadrature import short_run
last, numbers, put = int(sys.argv[2]), count(1), os.replace
def put_or_die(*places):
    if next(numbers) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    put(*places)
os.replace = put_or_die
short_run(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("files", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_at_a_write_is_the_one_that_never_was(
    whole: Path, tmp_path: Path, files: int
) -> None:
    """SIGKILL where the so many-th file would have got its name."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    found = sorted((tmp_path / "checkpoints").glob("checkpoint-*.pt"))
    assert found
    assert not (tmp_path / LAST).exists()
    short_run(tmp_path, resume=tmp_path)
    assert alike(read_sealed(tmp_path / LAST), read_sealed(whole / LAST))
    assert metrics(tmp_path) == metrics(whole)


def same_run(one: Path, other: Path) -> None:
    """Equal but for the rounding of batches."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    short, long = (read_sealed(folder / LAST) for folder in (one, other))
    assert short["progress"]["best_step"] == long["progress"]["best_step"]
    for name, numbers in short["learner"]["policy"].items():
        assert torch.allclose(numbers, long["learner"]["policy"][name], rtol=1e-9, atol=1e-12)
