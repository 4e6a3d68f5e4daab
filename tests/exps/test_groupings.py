from pathlib import Path

from exps.groupings import curve, reached
from src.runs import Metrics
from training.ppo.config import load_config

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
