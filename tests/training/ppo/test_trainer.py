"""Whole runs of stage 2: what they learn, write, survive, refuse and export."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from rewards.scorer import score_all
from solvers.predictor import load_predictor
from src.runs import Metrics, Stop, Stopped, read_sealed, write_sealed
from tests.training.ppo.quadrature import BEST, EVERY, SHORT, START, reward, short_run, task
from training.ppo import export, export_epd_predictor
from training.ppo.rollout import Task
from training.ppo.trainer import export_path, train

ROOT = Path(__file__).parents[3]
LAST = Path("checkpoints") / f"checkpoint-{SHORT.steps:08d}.pt"
TIMES = ("seconds/", "images_per_second")
RARE = replace(EVERY, save_interval=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    short_run(folder)
    return folder


def brightness(images: Tensor, _prompts: Sequence[str]) -> Tensor:
    """A judge of one image, [B]."""
    return images.mean((1, 2, 3))


def metrics(folder: Path, having: str = "") -> list[dict[str, Any]]:
    """What a run told, but for how long it took."""
    lines = Metrics(folder / "logs" / "metrics.jsonl").read()
    lines = [line for line in lines if not having or having in line]
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


def same_to_the_bit(one: Path, other: Path) -> bool:
    ends = (read_sealed(folder / LAST) for folder in (one, other))
    return alike(*ends) and metrics(one) == metrics(other)


# --- what is learned ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"baseline": "james-stein", "antithetic": True},
        {"grouping": "prompt", "learning_by_interval": [1.5], "entropy_by_interval": [1.0]},
        {"method": "cma", "rloo_k": 8},
        {"method": "quotients", "learning_rate": 0.1},
    ],
)
def test_the_best_table_is_found_where_it_is_known_by_every_estimator(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    long = replace(SHORT, steps=40, rollout_batch_size=16, learning_rate=5e-3, eval_interval=40)
    ppo = replace(long, dirichlet_concentration=40, eval_prompts=8)
    outcome = train(task(), replace(ppo, **more), RARE, tmp_path)
    assert abs(outcome.predictor.table.r.item() - BEST) < 0.25 * abs(START - BEST)
    last = metrics(tmp_path)[-1]  # on prompts and noise never trained on
    assert (last["step"], last["eval/near_gain_low"] > 0) == (40, True)


# --- evaluations and what is kept of them -------------------------------------------------


def test_evaluations_hold_the_policy_against_the_start_and_the_best_is_exported(
    whole: Path,
) -> None:
    lines = metrics(whole, "eval/near_gain")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["eval/near_gain"] == 0
    for line in lines:
        gain = line["eval/near"] - line["eval/near_start"]
        assert line["eval/near_gain"] == pytest.approx(gain, rel=1e-4)  # by prompt
        assert line["eval/near_gain_low"] <= line["eval/near_gain"] <= line["eval/near_gain_high"]
    best = max(lines, key=lambda line: line["eval/near_gain"])["step"]
    one, wanted = (load_predictor(export_path(whole, step)) for step in ("best", best))
    assert torch.equal(one.table.r, wanted.table.r)
    assert read_sealed(whole / "checkpoints" / "best.pt")["step"] == best


def test_a_start_at_the_edge_is_held_against_what_training_begins_at(tmp_path: Path) -> None:
    train(task(0.0), SHORT, EVERY, tmp_path)
    first = metrics(tmp_path, "eval/near_gain")[0]
    assert (first["step"], first["eval/near_gain"] > 0.01) == (0, True)  # r = 1/2, not 0
    assert "step 0: near gained" in (tmp_path / "logs" / "log.txt").read_text()


def test_the_predictor_given_is_the_best_until_something_gains_on_it(tmp_path: Path) -> None:
    def worse(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"near": -reward(images, prompts)["near"]}

    at_edge, folders = replace(task(0.0), score=worse), [tmp_path / name for name in "ab"]
    train(at_edge, replace(SHORT, early_stop=1), EVERY, folders[0])
    lines = metrics(folders[0], "eval/near_gain")
    assert [line["step"] for line in lines] == [0, 2]  # one evaluation without a new best
    assert all(line["eval/near_gain"] < 0 for line in lines)
    train(task(), replace(SHORT, eval_interval=0), EVERY, folders[1])
    short_run(folders[1], resume=folders[1])  # whose first evaluation is of the last step
    for folder, r in zip(folders, (0.0, START), strict=True):
        last = metrics(folder, "eval/near_gain")[-1]
        assert (last["eval/near_gain"] < 0, last["eval/best_step"]) == (True, 0)
        sealed, exported = folder / "checkpoints" / "best.pt", folder / "of-best.pkl"
        done = CliRunner().invoke(
            export.main, ["--checkpoint", str(sealed), "--output", str(exported)]
        )
        assert done.exit_code == 0, done.output
        for path in (export_path(folder, "best"), exported):
            assert load_predictor(path).table.r.item() == r


def test_a_best_of_steps_that_a_shorter_run_never_reaches_is_gone(tmp_path: Path) -> None:
    ppo = replace(SHORT, method="quotients", learning_rate=0.1)
    short_run(tmp_path, ppo)
    assert read_sealed(tmp_path / "checkpoints" / "best.pt")["step"] == 4
    resume = tmp_path / "checkpoints" / "checkpoint-00000002.pt"
    best = short_run(tmp_path, replace(ppo, steps=3), resume).best
    assert best == export_path(tmp_path, "best")
    ends = (export_path(tmp_path, step) for step in ("best", 2))
    kept = [load_predictor(path).table.r for path in ends]
    assert torch.equal(*kept)
    first = tmp_path / "checkpoints" / "checkpoint-00000000.pt"
    short_run(tmp_path, ppo)
    best = short_run(tmp_path, replace(ppo, steps=1), first).best
    assert load_predictor(best or "").table.r.item() == START


def test_a_call_that_ends_early_leaves_the_best_where_it_is(tmp_path: Path) -> None:
    ppo = replace(SHORT, method="quotients", learning_rate=0.1)
    best = short_run(tmp_path, ppo).best
    for start in ("checkpoint-00000004.pt", "checkpoint-00000002.pt"):
        resume = tmp_path / "checkpoints" / start
        ended = train(task(), ppo, EVERY, tmp_path, resume=resume, until=2)
        assert ended.best == best
        assert read_sealed(tmp_path / "checkpoints" / "best.pt")["step"] == 4


def test_candidates_that_score_alike_move_nothing(tmp_path: Path) -> None:
    def flat(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"near": torch.zeros(len(images))}

    ppo = replace(SHORT, method="cma", rloo_k=8, eval_interval=0)
    outcome = train(replace(task(), score=flat), ppo, EVERY, tmp_path)
    assert outcome.predictor.table.r.item() == pytest.approx(START, abs=1e-12)


def test_features_of_a_network_with_gradients_are_looked_at_without(tmp_path: Path) -> None:
    network = torch.nn.Linear(12, 3)
    near = replace(task(), features=lambda images: network(images.flatten(1)))
    ppo = replace(SHORT, pull_coef=1.0, minibatch_size=4, rollout_batch_size=8)
    train(near, ppo, EVERY, tmp_path)
    assert network.weight.grad is None


def test_an_evaluation_watches_judges_and_sets_and_ends_a_run_that_no_longer_gains(
    tmp_path: Path,
) -> None:
    def judge(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"far": -reward(images, prompts)["near"]}

    watched = replace(SHORT, watch="far", early_stop=2, steps=40, eval_seeds=3, pull_coef=0.1)
    outcome = train(replace(task(), judges={"far": judge}), watched, EVERY, tmp_path)
    lines = metrics(tmp_path, "eval/far_gain")
    best = max(lines, key=lambda line: line["eval/far_gain"])
    assert lines[-1]["eval/best_step"] == best["step"] == outcome.steps - 4
    assert outcome.stopped_early
    assert lines[0]["eval/diversity_gain"] == 0
    assert lines[-1]["eval/frechet_start"] == lines[0]["eval/frechet"] > 0
    assert lines[-1]["eval/diversity_pairs"] == 18
    assert all(line["reward/pull"] > 0 for line in metrics(tmp_path, "reward"))


def test_a_watched_judge_that_says_nothing_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    def judge(_images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
        raise ValueError("far is out of order")

    watched = replace(SHORT, watch="far")
    with pytest.raises(ValueError, match="no image could be scored: far is out of order"):
        train(replace(task(), judges={"far": judge}), watched, EVERY, tmp_path)


def test_a_judge_that_gives_no_numbers_is_told_at_every_evaluation(tmp_path: Path) -> None:
    def judge(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"far": torch.full((len(images),), math.nan)}

    train(replace(task(), judges={"far": judge}), SHORT, EVERY, tmp_path)
    log = (tmp_path / "logs" / "log.txt").read_text()
    said = "far has no score of any held-out image: far gave nan"
    assert log.count(said) == len(metrics(tmp_path, "eval/best_step"))


def test_a_judge_that_fails_takes_no_numbers_of_others_and_is_told(tmp_path: Path) -> None:
    calls = []

    def away(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        if len(calls) > 2:  # the six of the start, in batches
            raise ConnectionError("nobody answers")
        return reward(images, prompts)["near"]

    judges = {n: partial(score_all, {n: r}) for n, r in (("far", away), ("hue", brightness))}
    train(replace(task(), judges=judges), replace(SHORT, watch="hue"), EVERY, tmp_path)
    lines = metrics(tmp_path, "eval/best_step")
    assert ["eval/far" in line for line in lines] == [True, False, False]
    assert ["eval/hue_gain" in line for line in lines] == [True, True, True]
    said = "step 4: far has no score of any held-out image: far fails on float32 [1, 3, 2, 2]: "
    assert f"{said}ConnectionError: nobody answers" in (tmp_path / "logs" / "log.txt").read_text()


def test_a_judge_that_comes_later_is_held_against_the_start_too(
    whole: Path, tmp_path: Path
) -> None:
    def judge(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"far": -reward(images, prompts)["near"]}

    source = whole / "checkpoints" / "checkpoint-00000001.pt"
    train(replace(task(), judges={"far": judge}), SHORT, EVERY, tmp_path, resume=source)
    for line in metrics(tmp_path, "eval/near_gain"):
        assert line["eval/far_gain"] == pytest.approx(-line["eval/near_gain"], rel=1e-5)


# --- what a run survives, and what it refuses ---------------------------------------------


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    whole: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    folder = shutil.copytree(whole, tmp_path / "cut")
    for path in (folder / LAST, folder / "checkpoints" / "checkpoint-00000003.pt"):
        path.write_bytes(path.read_bytes()[:-50])
    train(task(), SHORT, EVERY, folder, resume=folder, say=heard.append)
    assert [text.split(" is ")[-1][:7] for text in heard[:2]] == ["damaged"] * 2
    assert any("checkpoint-00000002.pt at step 2" in text for text in heard)
    assert same_to_the_bit(folder, whole)


@pytest.mark.parametrize("method", ["ppo", "cma", "quotients"])
def test_a_run_that_goes_on_is_the_one_that_was_never_stopped(
    whole: Path, tmp_path: Path, method: str
) -> None:
    ppo = replace(SHORT, method=method)
    if method != "ppo":
        short_run(whole := tmp_path / "whole", ppo)
    for step in (0, 1, 3) if method == "ppo" else (2,):
        source, folder = whole / "checkpoints" / f"checkpoint-{step:08d}.pt", tmp_path / f"{step}"
        short_run(folder, ppo, resume=source)
        assert alike(read_sealed(folder / LAST), read_sealed(whole / LAST))
        after = [line for line in metrics(whole) if line["step"] > step]
        assert [line for line in metrics(folder) if line["step"] > step] == after


def test_a_signal_saves_and_stops_and_the_run_goes_on_from_there(
    whole: Path, tmp_path: Path
) -> None:
    stop, calls = Stop(), []

    def slow(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        calls.append(len(images))
        if len(calls) == 9:  # in the third rollout, say, or an evaluation
            stop.hear(15, None)
        return reward(images, prompts)

    with pytest.raises(Stopped):
        train(replace(task(), score=slow), SHORT, RARE, tmp_path, stop=stop)
    newest = max((tmp_path / "checkpoints").glob("checkpoint-*.pt"))
    assert 0 < read_sealed(newest)["step"] < SHORT.steps
    short_run(tmp_path, resume=tmp_path)
    assert same_to_the_bit(tmp_path, whole)


def test_an_evaluation_or_a_reward_that_fails_loses_no_step_and_no_line_is_doubled(
    whole: Path, tmp_path: Path
) -> None:
    def failing(error: BaseException, letter: str, last: int) -> Task:
        calls = []

        def score(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
            calls.extend([1] * prompts[0].startswith(letter))
            if len(calls) > last:
                raise error
            return reward(images, prompts)

        return replace(task(), score=score)

    errors = (
        (ValueError("away"), "h", 2),
        (SystemExit("killed"), "p", 0),
        (OSError("away"), "p", 2),
    )
    for i, (error, letter, last) in enumerate(errors):
        resume = tmp_path if i else None
        with pytest.raises(type(error), match=r"away|killed"):
            train(failing(error, letter, last), SHORT, RARE, tmp_path, resume=resume)
        newest = max((tmp_path / "checkpoints").glob("checkpoint-*.pt"))
        assert read_sealed(newest)["step"] == (2, 2, 3)[i]
    short_run(tmp_path, resume=tmp_path)
    assert same_to_the_bit(tmp_path, whole)


def test_a_checkpoint_of_other_settings_another_table_or_version_is_refused(
    whole: Path, tmp_path: Path
) -> None:
    source, old = whole / "checkpoints" / "checkpoint-00000001.pt", tmp_path / "old.pt"
    write_sealed(old, {"step": 3, "policy": {}})
    for ppo, r, path, words in (
        (replace(SHORT, learning_rate=0.1), START, source, "ppo.learning_rate 0.01, not 0.1"),
        (SHORT, 0.4, source, "began with another table"),
        (SHORT, START, old, "old.pt is no checkpoint of this version"),
    ):
        with pytest.raises(ValueError, match=words):
            train(task(r), ppo, EVERY, tmp_path / "new", resume=path)
    other = replace(task(), recipe=replace(task().recipe, base="ipndm"))
    with pytest.raises(ValueError, match="the predictor's base euler, not ipndm"):
        train(other, SHORT, EVERY, tmp_path / "new", resume=source)


def test_rewards_that_are_no_numbers_are_left_out_until_the_budget_is_spent(
    tmp_path: Path,
) -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        scores = reward(images, prompts)
        bad = torch.tensor([p == "ppp" for p in prompts])
        return scores | {"near": scores["near"].masked_fill(bad, math.nan)}

    sick = replace(task(), score=broken)
    train(sick, replace(SHORT, nonfinite_budget=8), EVERY, tmp_path / "a")
    lines = metrics(tmp_path / "a", "reward")
    assert lines[-1]["nonfinite"] == 4  # the 4 images of one of 7 prompts, in 8 groups
    assert all(math.isfinite(v) for line in lines for v in line.values())
    with pytest.raises(ValueError, match=r"4 images had no finite reward.*is 3: near gave nan"):
        train(sick, replace(SHORT, nonfinite_budget=3), RARE, tmp_path / "b")
    train(sick, replace(SHORT, nonfinite_budget=8), RARE, tmp_path / "b", resume=tmp_path / "b")
    ends = [read_sealed(tmp_path / run / LAST)["learner"] for run in "ab"]
    assert alike(*ends)  # no step was lost
    # a step without any reward is its images alone, whatever else they have: of one prompt here
    one = replace(SHORT, rollout_batch_size=4, eval_interval=0, nonfinite_budget=4, steps=7)
    for method, more in (("cma", {}), ("ppo", {"pull_coef": 0.1})):
        folder = tmp_path / f"{method}{more}"
        alone = replace(sick, score=lambda *of: {"near": broken(*of)["near"]})
        train(alone, replace(one, method=method, **more), EVERY, folder)
        without = [line["step"] for line in metrics(folder) if "reward/near" not in line]
        assert len(without) == 1
        ends = [export_path(folder, step) for step in (without[0] - 1, without[0])]
        before, after = (load_predictor(path).table for path in ends)
        assert torch.equal(before.r, after.r), method  # nothing was learned from nothing
    nothing = replace(
        task(), score=lambda *of: {**reward(*of), "near": reward(*of)["near"] / 0 * 0}
    )
    with pytest.raises(ValueError, match="no image could be scored: near gave nan"):
        train(nothing, SHORT, EVERY, tmp_path / "d")
    empty = replace(task(), features=lambda images: images.flatten(1)[:, :0])
    with pytest.raises(ValueError, match=r"ppo\.features must return \[1, F\], not \[1, 0\]"):
        train(empty, replace(SHORT, pull_coef=1.0), EVERY, tmp_path / "c")


WORK = """
import os, signal, sys
from itertools import count
from pathlib import Path
import torch
from src import ranks
from tests.training.ppo.quadrature import short_run
last, numbers, put = int(sys.argv[2]), count(1), os.replace
def put_or_die(*places):
    if next(numbers) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    put(*places)
os.replace = put_or_die
ranks.init(torch.device("cpu"))
short_run(Path(sys.argv[1]))
ranks.close()
"""


def work(folder: Path, killed_at: int = 0, **more: str) -> subprocess.Popen:
    """A short run in a process of its own, killed where the so many-th file would get its name."""
    command = [sys.executable, "-c", WORK, str(folder), str(killed_at)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | more, cwd=ROOT)


def test_two_ranks_make_the_run_of_one_and_one_goes_on_where_two_stood(
    whole: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [work(tmp_path, 0, RANK=r, LOCAL_RANK=r, **shared) for r in "01"]
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    same_run(tmp_path, whole)
    short_run(tmp_path, resume=tmp_path / "checkpoints" / "checkpoint-00000002.pt")
    same_run(tmp_path, whole)


def same_run(one: Path, other: Path) -> None:
    """Equal but for the rounding of batches."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    short, long = (read_sealed(folder / LAST) for folder in (one, other))
    assert short["progress"]["best_step"] == long["progress"]["best_step"]
    for name, numbers in short["learner"]["policy"].items():
        assert torch.allclose(numbers, long["learner"]["policy"][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("files", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_at_a_write_is_the_one_that_never_was(
    whole: Path, tmp_path: Path, files: int
) -> None:
    assert work(tmp_path, files).wait(timeout=240) == -signal.SIGKILL
    assert sorted((tmp_path / "checkpoints").glob("checkpoint-*.pt"))
    assert not (tmp_path / LAST).exists()
    short_run(tmp_path, resume=tmp_path)
    assert same_to_the_bit(tmp_path, whole)


# --- export -------------------------------------------------------------------------------


def test_an_export_is_the_predictor_of_the_newest_checkpoint_or_of_the_one_that_is_named(
    whole: Path, tmp_path: Path
) -> None:
    for ending in ("pkl", "json"):
        ours = tmp_path / "deep" / f"ours.{ending}"
        given = ["--checkpoint", str(whole), "--output", str(ours)]
        done = CliRunner().invoke(export.main, given)
        assert done.exit_code == 0, done.output
        newest, theirs = load_predictor(ours), load_predictor(export_path(whole, SHORT.steps))
        assert torch.equal(newest.table.r, theirs.table.r)
        assert newest.recipe == theirs.recipe
    published = [str(whole), "--checkpoint", "checkpoints/checkpoint-00000001.pt"]
    done = CliRunner().invoke(export_epd_predictor.main, published)
    path = whole / "export" / "network-snapshot-export-step000001.pkl"
    assert done.output.startswith(f"{path}: step 1 of")


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("nowhere.pt", "a.pkl", "no run and no checkpoint at nowhere.pt: give a run's folder"),
        ("nowhere", "a.pkl", "no run and no checkpoint at nowhere: give a run's folder"),
        ("pyproject.toml", "a.pkl", "is no checkpoint of ours"),
        ("src", "a.pkl", "src has no checkpoint: give a run that has one"),
        ("nowhere.pt", "a.txt", "a.txt: a predictor's file ends in .pkl"),
    ],
)
def test_what_cannot_be_exported_is_one_line(source: str, output: str, said: str) -> None:
    done = CliRunner().invoke(export.main, ["--checkpoint", source, "--output", output])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert said in done.output


def test_a_reward_whose_name_ends_as_a_gain_does_is_drawn(tmp_path: Path) -> None:
    own = replace(task(), score=lambda *of: {"my_gain": reward(*of)["near"]}, reward="my_gain")
    train(own, replace(SHORT, steps=1), EVERY, tmp_path)
    assert (tmp_path / "learning.png").exists()


def test_the_page_explains_every_number_that_is_logged(whole: Path) -> None:
    page = (ROOT / "training" / "ppo" / "README.md").read_text()
    logged = {name for line in Metrics(whole / "logs" / "metrics.jsonl").read() for name in line}
    plain = {re.sub(r"^(reward|eval)/(near|mean)", r"\1/NAME", name) for name in logged - {"step"}}
    assert {"eval/NAME_gain_low", "reward/NAME_std", "seconds/decode", "entropy"} <= plain
    assert [name for name in sorted(plain) if f"`{name}`" not in page] == []
