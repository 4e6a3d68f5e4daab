"""Learning curves over seeds, and the exact reward of the mixture."""

import pytest
import torch

from exps.study.sweep import curve, nearness, shipped_mixture


def test_a_curve_has_the_steps_that_all_runs_have() -> None:
    runs = [
        [{"step": 0, "gain": 0.0}, {"step": 5, "gain": 1.0}, {"step": 6, "loss": 9.0}],
        [{"step": 0, "gain": 0.0}, {"step": 5, "gain": 3.0}, {"step": 10, "gain": 4.0}],
    ]
    steps = curve(runs, "gain")
    assert [(step, gain.value) for step, gain in steps] == [(0, 0.0), (5, 2.0)]
    assert steps[1][1].low < 2 < steps[1][1].high


def test_the_mean_of_a_class_is_best_under_its_own_name() -> None:
    means = shipped_mixture().means[:2].clamp(-1, 1) / 2 + 0.5
    own, other = nearness(means, ["0", "1"]), nearness(means, ["1", "0"])
    assert own.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert bool((other < own).all())
    assert nearness(torch.zeros(1, *means.shape[1:]), ["0"]).shape == (1,)
