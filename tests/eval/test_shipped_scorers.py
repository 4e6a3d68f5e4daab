"""The scorers that come with the repository, by options, on pictures of every kind; a bench."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from eval import bench_score
from eval.bench_score import Timing, turns
from eval.score import main
from rewards.registry import load_rewards

CLIP = ("--reward", "clip", "--weights", f"clip={bench_score.TINY_CLIP}")
LONG = "\U0001f34e caf\u00e9 " + "very " * 300 + "long"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of every mode and odd sizes."""
    drawn = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    rgba = Image.fromarray(drawn)
    rgba.save(tmp_path / "0.png")
    for i, mode in enumerate(("RGB", "L", "LA", "P", "1", "CMYK"), 1):
        suffix = "jpg" if mode == "CMYK" else "png"
        rgba.convert("RGB").convert(mode).save(tmp_path / f"{i}.{suffix}")
    Image.fromarray(drawn[..., 0].astype(np.uint16) * 257).save(tmp_path / "7.png")
    for i, size in enumerate(((1, 1), (3, 200), (64, 64)), 8):
        rgba.resize(size).save(tmp_path / f"{i}.png")
    return tmp_path


def test_they_score_pictures_of_every_mode_and_size(folder: Path) -> None:
    (folder / "p.txt").write_text("\n".join(["red apple"] * 10 + [LONG]))
    options = (*CLIP, "--reward", "brisque", "--reward", "multi:clip=1,brisque=0.01")
    given = ("--prompt-file", str(folder / "p.txt"), "--device", "cpu")
    done = CliRunner().invoke(main, [str(folder), *options, *given])
    assert done.exit_code == 0, done.output
    with (folder / "scores/scores.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 11
    for row in rows.values():
        clip, brisque = float(row["clip"]), float(row["brisque"])
        assert -1 <= clip <= 1
        mean = (clip + 0.01 * brisque) / 1.01
        assert float(row["multi:clip=1,brisque=0.01"]) == pytest.approx(mean, rel=1e-5)


def test_a_broken_picture_is_told_and_may_be_left_out(folder: Path) -> None:
    whole = (folder / "10.png").read_bytes()
    (folder / "11.png").write_bytes(whole[: len(whole) // 2])
    options = [str(folder), "--reward", "brisque", "--prompt", "x", "--device", "cpu"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 1
    assert "11.png" in done.output.strip().splitlines()[-1]
    done = CliRunner().invoke(main, [*options, "--skip-bad"])
    assert done.exit_code == 0, done.output
    assert "11 images of" in done.output
    assert "1 images left out" in done.output


def test_the_bench_tells_ratios_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    few = ("--reward", "brisque", "--images", "6", "--alone", "2", "--size", "16", "--batch", "3")
    options = [*few, "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(bench_score.main, options)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [t["name"] for t in found["timings"]] == ["brisque", "all of them"]
    for timing in found["timings"]:
        assert timing["ratio"] == pytest.approx(timing["alone"] / timing["batched"])
    assert "Peak of memory" in done.output


def test_the_bench_has_a_prompt_for_every_image() -> None:
    with pytest.raises(ValueError, match=r"9000 \+ 100 images need as many prompts"):
        turns(load_rewards(["brisque"]), (9000, 100), 64, 64)


def test_the_ratio_is_what_batches_are_faster_by() -> None:
    assert Timing("a", 0.5, 2.0).ratio == 4
