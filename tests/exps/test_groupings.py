from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from exps.groupings import curve, load_mixture, main, nearness, reached
from src.files import read_json
from src.runs import Metrics
from training.ppo.config import load_config
from training.ppo.data import prompts_of

CONFIG = load_config("training/ppo/cfgs/sd3_512.yaml")


def told(folder: Path, gains: list[float]) -> Path:
    metrics = Metrics(folder / "logs" / "metrics.jsonl")
    for i, gain in enumerate(gains):
        metrics.write(10 * i, {"reward": 0.0})
        metrics.write(10 * i, {"eval/hps_gain": gain})
    return folder


def test_a_curve_is_the_mean_over_seeds_by_the_number_of_images(tmp_path: Path) -> None:
    runs = [told(tmp_path / "a", [0.0, 1.0, 3.0]), told(tmp_path / "b", [0.0, 3.0])]
    found = curve(runs, CONFIG)
    assert [images for images, _ in found] == [0, 10 * CONFIG.ppo.rollout_batch_size]
    assert [gain.value for _, gain in found] == [0.0, 2.0]
    assert (found[1][1].low, found[1][1].high) == (1.0, 3.0)


def test_a_gain_is_reached_at_the_first_evaluation_that_has_it(tmp_path: Path) -> None:
    found = curve([told(tmp_path / "a", [0.0, 1.0, 3.0, 2.0])], CONFIG)
    images = CONFIG.ppo.rollout_batch_size
    assert reached(found, 2.0) == 20 * images
    assert reached(found, 4.0) is None


def test_the_mixture_is_trained_by_classes_with_every_grouping(tmp_path: Path) -> None:
    changes = ["ppo.steps=4", "ppo.eval_interval=2", "ppo.eval_prompts=64"]
    given = [part for change in changes for part in ("--override", change)]
    config = ["--config", "exps/mixture-3x4x4/groupings.yaml", "--seeds", "0-1", "--device", "cpu"]
    done = CliRunner().invoke(main, [*config, *given, "--outdir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    summary = read_json(tmp_path / "summary.json")
    assert set(summary["final"]) == {"crn", "prompt", "mixed"}
    assert summary["final"]["crn"]["value"] > 0
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 3 * 3


def test_nearness_is_highest_at_the_mean_of_the_class() -> None:
    means = load_mixture().means[:2].clamp(-1, 1) / 2 + 0.5
    assert torch.allclose(nearness(means, ["0", "1"]), torch.zeros(2, dtype=torch.float64))
    assert bool((nearness(means, ["1", "0"]) < -1).all())


def test_a_prompt_that_is_no_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("0\na fox\n")
    config = load_config(
        "exps/mixture-3x4x4/groupings.yaml", [f"data.prompt_csv={tmp_path / 'p.txt'}"]
    )
    with pytest.raises(ValueError, match=r"takes class numbers .* not 'a fox'"):
        prompts_of(config)
