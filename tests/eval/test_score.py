"""A folder scored under its prompts, stopped and gone on with; two folders pair by pair."""

import csv
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from eval.pictures import find_pictures
from eval.score import ScoredPicture, Scoring, items_of, main, pairs, score_pictures
from rewards.base import Reward
from src.images import read_png, save_png
from tests.eval.drawings import brightness, image, on_two_ranks, redness, refused, sampled
from tests.rewards.networks import write_open_clip_folder

BRIGHT, RED = "tests.eval.drawings:brightness", "tests.eval.drawings:redness"
CPU = torch.device("cpu")


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [*map(str, options), "--device", "cpu"])


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores/scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores/summary.json").read_text())


def expected(folder: Path, reward: Reward) -> list[float]:
    entries = json.loads((folder / "samples.json").read_text())["images"]
    images = [read_png(folder / e["file"])[0][None] for e in entries]
    scores = [reward(x, [e["prompt"]]) for x, e in zip(images, entries, strict=True)]
    return torch.cat(scores).tolist()


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_image_is_scored_under_the_prompt_that_sample_py_wrote(
    tmp_path: Path, batch: int
) -> None:
    folder, both = sampled(tmp_path / "a", 11), f"multi:{BRIGHT}=1,{RED}=3"
    done = run(folder, "--reward", both, "--reward", BRIGHT, "--batch", batch)
    assert done.exit_code == 0, done.output
    rows = read_csv(folder)
    assert [(row["file"], row["seed"], row["prompt"]) for row in rows] == [
        (f"{i:06d}.png", str(i), "a" * (1 + i % 3)) for i in range(11)
    ]
    for name, reward in ((BRIGHT, brightness), (RED, redness), (both, None)):
        scores = [float(row[name]) for row in rows]
        if reward:
            assert scores == pytest.approx(expected(folder, reward), rel=1e-5)
        values, numbers = torch.tensor(scores).double(), summary_of(folder)["rewards"][name]
        assert numbers["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert numbers["std"] == pytest.approx(values.std().item(), rel=1e-5)
        assert numbers["low"] < numbers["mean"] < numbers["high"]
    for row in rows:
        parts = float(row[BRIGHT]) + 3 * float(row[RED])
        assert float(row[both]) == pytest.approx(parts / 4, rel=1e-5)


def task(folder: Path, reward: Reward, **more: Any) -> Scoring:
    return Scoring(find_pictures(folder), (), {"it": reward}, {"it": "it 1"}, CPU, **more)


def test_nothing_that_was_scored_is_lost_or_scored_again_and_what_changed_is(
    tmp_path: Path,
) -> None:
    folder, out = sampled(tmp_path / "a", 11), tmp_path / "out"
    seen: list[int] = []

    def counting(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(len(images))
        return brightness(images, prompts)

    def stopped(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if sum(seen) > 5:
            raise KeyboardInterrupt
        return counting(images, prompts)

    def scored(task: Scoring, folder: Path) -> tuple[list[ScoredPicture], dict[str, str]]:
        return score_pictures(task, *items_of(task), folder)

    with pytest.raises(KeyboardInterrupt):
        scored(task(folder, stopped, batch=3), out)
    before = sum(seen)
    with (out / "cache-0.jsonl").open("a") as file:
        file.write('{"picture": "half a li')
    first, bad = scored(task(folder, counting, batch=3), out)
    assert 5 < before < sum(seen) == 11
    assert bad == {}
    values = [one.scores["it"] for one in first]
    assert values == pytest.approx(expected(folder, brightness), rel=1e-5)
    path = folder / "000001.png"  # another picture in its place, as old as that
    old = path.stat()
    save_png(path, image(77, height=12), {"recipe": {"seed": 1, "prompt": "aa"}})
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    second, _ = scored(task(folder, counting), out)
    same = [a.scores == b.scores for a, b in zip(first, second, strict=True)]
    assert same == [i != 1 for i in range(11)]
    assert sum(seen) == 12
    given = replace(task(folder, brightness), prompts=("long prompt",) * 11)
    third, _ = scored(given, out)
    assert all(one.prompt == "long prompt" and one.scores["it"] > 11 for one in third)


def test_the_published_spellings_are_understood(tmp_path: Path) -> None:
    folder, texts, out = sampled(tmp_path / "a", 3), tmp_path / "p.txt", tmp_path / "out.json"
    save_png(folder / "other.png", torch.ones(3, 8, 8), {"recipe": {"seed": 9}})
    texts.write_text("one\ntwo\nthree\n")
    options = ["--images", folder, "--pattern", "0*.png", "--prompts", texts, "--output-json", out]
    assert run(*options, "--reward", BRIGHT).exit_code == 0
    content = json.loads(out.read_text())
    assert [entry["prompt"] for entry in content["images"]] == ["one", "two", "three"]
    values = [entry[BRIGHT] for entry in content["images"]]
    assert content["rewards"][BRIGHT]["mean"] == pytest.approx(sum(values) / 3)
    done = run(folder, folder, "--output-json", out, "--reward", BRIGHT)
    assert "--output-json is of one place" in done.output


def test_a_picture_of_a_class_is_scored_under_its_number(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image(0), {"recipe": {"seed": 3, "class": 7}})
    done = run(tmp_path, "--reward", "fashion-judge", "--reward", BRIGHT)
    assert done.exit_code == 0, done.output
    (row,) = read_csv(tmp_path)
    assert (row["seed"], row["prompt"]) == ("3", "7")
    assert float(row["fashion-judge"]) < 0
    clip = f"clip={write_open_clip_folder(tmp_path / 'w')}"
    done = run(tmp_path, "--reward", "clip", "--weights", clip)
    refused(done, "does not say its prompt")


def test_bad_pictures_and_scores_are_one_line_or_counted_and_listed(tmp_path: Path) -> None:
    folder, undefined = sampled(tmp_path / "a", 6), "tests.eval.drawings:undefined"
    save_png(folder / "000003.png", torch.zeros(3, 8, 8))
    refused(run(folder, "--reward", undefined), "gave nan for image 3 of 5 (and 0 more)")
    broken = folder / "000002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refused(run(folder, "--reward", BRIGHT), "000002.png is not a readable")
    done = run(folder, "--reward", undefined, "--skip-bad")
    assert done.exit_code == 0, done.output
    assert "2 images left out" in done.stderr
    summary = summary_of(folder)
    assert (summary["count"], sorted(summary["left_out"])) == (4, ["000002.png", "000003.png"])
    assert not {"000002.png", "000003.png"} & {row["file"] for row in read_csv(folder)}
    whole = sampled(tmp_path / "b", 2)
    done = run(whole, "--reward", "tests.eval.drawings:shapeless", "--skip-bad")
    assert "could be scored: tests.eval.drawings:shapeless must return" in done.output


def test_each_mistake_is_one_line(tmp_path: Path) -> None:
    a, bare = sampled(tmp_path / "a", 4), tmp_path / "bare"
    save_png(bare / "1.png", image(0))
    save_png(bare / "2.png", image(1))
    texts = ["--prompt", "x", "--prompt", "y", "--prompt", "z"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cache-0.jsonl").write_text('{"file": "000000.png"}\n')
    table = (
        (run(bare, "--reward", BRIGHT), "does not say its prompt: give --prompt"),
        (run(bare, "--reward", BRIGHT, *texts), "need as many prompts, or one, not 3"),
        (run(a, "--reward", "clap"), "did you mean clip?"),
        (run(a, "--reward", "tests.eval.drawings:none"), "cannot be imported"),
        (run(a, "--reward", "tests.eval.drawings:shapeless"), "must return a tensor [4]"),
        (run(tmp_path / "none", "--reward", BRIGHT), "no such folder"),
        (run("--reward", BRIGHT), "0 places: give one, or two to compare"),
        (run(a, a, a, "--reward", BRIGHT), "give one, or two to compare"),
        (run(a, "--reward", BRIGHT, "--weights", "clip"), "should be such as clip="),
        (run(a, "--reward", "clip", "--weights", f"clip={bare}/no"), "clip: no such file"),
        (run(a, "--reward", RED, "--outdir", tmp_path / "out"), "holds a line that is no score"),
        (
            run(a, "--reward", RED, "--weights", "hps=x"),
            "--weights hps=x: nothing here reads them",
        ),
        (
            run(a, "--reward", RED, "--output-json", "/proc/x/y.json"),
            "cannot write /proc/x/y.json",
        ),
    )
    for done, words in table:
        refused(done, words)
    assert not [*tmp_path.glob("*/scores")]


def test_prompts_of_a_file_meet_pictures_by_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        save_png(tmp_path / f"{number}.png", image(number))
    texts = (part for number in range(12) for part in ("--prompt", f"p{number}"))
    assert run(tmp_path, "--reward", RED, *texts).exit_code == 0
    rows = read_csv(tmp_path)
    assert [(row["file"], row["prompt"]) for row in rows] == [
        (f"{number}.png", f"p{number}") for number in range(12)
    ]


def test_two_folders_are_compared_pair_by_pair(tmp_path: Path) -> None:
    a, b = sampled(tmp_path / "a", 8), sampled(tmp_path / "b", 10, seed=50)
    done = run(a, b, "--reward", RED, "--outdir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out/versus.json").read_text())
    assert (summary["pairs"], summary["unpaired"]) == (8, [0, 2])
    leads = torch.tensor(expected(b, redness)[:8]) - torch.tensor(expected(a, redness))
    numbers = summary["rewards"][RED]
    assert numbers["difference"]["mean"] == pytest.approx(leads.mean().item(), abs=1e-6)
    assert numbers["win_rate"]["mean"] == (leads > 0).float().mean().item()
    assert "8 pairs of one seed and prompt, 2 images without" in done.output
    others = tmp_path / "c"
    for seed in (90, 91):
        save_png(others / f"{seed}.png", image(seed), {"recipe": {"seed": seed, "prompt": "a"}})
    refused(run(a, others, "--reward", RED), "no picture of one seed and prompt")
    assert not (others / "scores").exists()


def test_pairs_are_of_one_seed_and_prompt_whatever_the_folders_look_like() -> None:
    fox, owl = (
        ScoredPicture(f"00000{i}.png", i, text, {}) for i, text in ((1, "fox"), (2, "owl"))
    )
    same = ScoredPicture("000000/000001.png", 1, "fox", {"it": 4.0})
    second = [same, ScoredPicture("2.png", 2, "cat", {})]
    assert pairs([fox, owl], second) == [(fox, same)]
    with pytest.raises(ValueError, match="nothing to compare"):
        pairs([owl], second)
    with pytest.raises(ValueError, match="have one seed and prompt"):
        pairs([fox, replace(fox, name="other/1.png")], second)


def test_two_ranks_score_what_one_does_and_go_on_with_it(tmp_path: Path) -> None:
    one, two = sampled(tmp_path / "one", 9), sampled(tmp_path / "two", 9)
    assert run(one, "--reward", BRIGHT).exit_code == 0
    options = [two, "--reward", BRIGHT, "--device", "cpu", "--batch", 2]
    first, second = on_two_ranks(main, lambda _rank: options)
    assert "9 images of" in first
    assert second == ""
    assert read_csv(two) == read_csv(one)
    assert len(list((two / "scores").glob("cache-*.jsonl"))) == 2
    assert run(two, "--reward", BRIGHT).exit_code == 0
    assert read_csv(two) == read_csv(one)


def test_an_edited_reward_is_scored_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = sampled(tmp_path / "a", 3), tmp_path / "own_reward.py"
    monkeypatch.syspath_prepend(tmp_path)
    means = []
    for factor in (1, 100):
        source.write_text(f"def f(images, _):\n    return images.mean((1, 2, 3)) * {factor}\n")
        sys.modules.pop("own_reward", None)
        importlib.invalidate_caches()
        done = run(folder, "--reward", "own_reward:f")
        assert done.exit_code == 0, done.output
        means.append(summary_of(folder)["rewards"]["own_reward:f"]["mean"])
    assert means[1] == pytest.approx(100 * means[0], rel=1e-5)


def test_a_mislabelled_picture_is_scored_under_its_own_prompt(tmp_path: Path) -> None:
    """As sampling anew into a folder with other seeds leaves them."""
    folder = sampled(tmp_path / "a", 4)
    index = json.loads((folder / "samples.json").read_text())
    index["images"][1]["prompt"] = "somebody else's"
    index["images"].pop()
    (folder / "samples.json").write_text(json.dumps(index))
    done = run(folder, "--reward", BRIGHT)
    assert "samples.json gives 1 of 4 images another seed or prompt" in done.stderr
    assert [row["prompt"] for row in read_csv(folder)] == ["a", "aa", "aaa", "a"]
