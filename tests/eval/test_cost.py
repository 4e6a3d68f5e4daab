"""The cost of a fit: what is told, what is extrapolated, and the command as a whole."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from eval import cost as module
from eval.cost import MIB, Cost, Plan, Run, main
from eval.scripts import IDLE, Ran
from src.files import read_json
from tests.eval.small import here, save_mixture

PLAN = Plan("m", 4, 2, "epd", 32, "cpu")
PEAKS = {"train_distill.py": 300 * MIB, "sample.py": 250 * MIB, IDLE: 200 * MIB}


def run(seconds: list[float], each: int = 100, of: int = 1000) -> Run:
    """A run whose ticks took so many seconds each; what it writes is the time since its start."""
    ticks = [
        {"seconds": sum(seconds[: i + 1]), "trajectories": each * (i + 1)}
        for i in range(len(seconds))
    ]
    return Run("gradient", (), of, Ran(sum(seconds) + 1, MIB), ticks)


def test_what_is_left_goes_on_like_the_ticks_after_the_first() -> None:
    assert run([9.0, 2.0]).whole == pytest.approx(9 + 2 + 8 * 2)
    assert run([9.0, 2.0, 4.0]).whole == pytest.approx(15 + 7 * 3)


def test_a_whole_run_is_not_extrapolated() -> None:
    assert run([9.0, 2.0], of=200).whole == 11
    assert run([9.0], of=1000).whole == 9  # nothing to tell a pace by


def test_the_gradient_is_told_the_published_settings() -> None:
    told = " ".join(PLAN.published(10_000, 1000))
    assert "--teacher heun --M 3 --teacher_substeps 2" in told
    assert "--scale_dir 0.05 --scale_time 0.05 --lr 0.2 --coslr --objective final" in told
    assert "--total_kimg 10.0 --tick 1.0" in told
    plug_in = " ".join(Plan("m", 6, 2, "epd-ipndm", 32, "cpu").published(10_000, 1000))
    assert "--teacher dpm2" in plug_in
    assert "--objective per-step" in plug_in


def test_ratios_are_of_the_fit_over_the_rest() -> None:
    fit = Run("fit", (), 32, Ran(9, 330 * MIB), [{"seconds": 2.0, "trajectories": 32}])
    sampling, idle = Ran(1, 300 * MIB), Ran(1, 270 * MIB)
    found = Cost(fit, run([10.0] * 10), sampling, idle, [0.1, 0.4]).ratios()
    assert found["fit / gradient, time"] == pytest.approx(0.02)
    assert found["fit / gradient, error"] == pytest.approx(0.25)
    assert found["fit / sampling, peak memory"] == pytest.approx(1.1)
    assert found["fit / sampling, above the idle process"] == pytest.approx(2)


def test_an_error_that_is_no_number_has_no_ratio() -> None:
    found = Cost(run([1.0]), run([1.0]), Ran(1, 1), Ran(1, 1), [0.1, None])
    assert found.ratios()["fit / gradient, error"] is None
    assert "fit / gradient, error: -" in found.text()


def one_process(
    script: str, options: Sequence[str], _enough: Callable[[], bool] = lambda: False
) -> Ran:
    """The command in this process, to its end."""
    if script != IDLE:
        here(script, options)
    return Ran(1.0, PEAKS[script])


@pytest.mark.parametrize("fraction", ["0.5", "1"])
def test_the_command_compares_both_methods_and_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: str
) -> None:
    monkeypatch.setattr(module, "run_script", one_process)
    done = command(tmp_path, "--fraction", fraction)
    assert done.exit_code == 0, done.output
    content = read_json(tmp_path / "out/results.json")
    fit, gradient = content["methods"]
    assert (fit["method"], gradient["method"]) == ("fit", "gradient")
    assert (gradient["trajectories"], gradient["trajectories_run"]) == (
        64,
        32 if fraction == "0.5" else 64,
    )
    assert 0 < fit["rmse"] < gradient["rmse"]
    assert content["ratios"]["fit / sampling, peak memory"] == pytest.approx(1.2)
    assert ("extrapolated linearly" in done.output) == (fraction == "0.5")
    assert {"commit", "seeds", "fine", "meaning", "num_steps"} <= content["about"].keys()


def test_a_refusal_of_the_distillation_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run_script", one_process)
    done = command(tmp_path, "--solver", "epd-unipc")
    assert done.exit_code == 1
    assert done.output.startswith("Error: EPD cannot stand on unipc")


def command(folder: Path, *options: str) -> Result:
    common = ["--model", str(save_mixture(folder / "m")), "--device", "cpu", "--batch", "8"]
    common += ["--trajectories", "64", "--seeds", "0-15", "--fine", "16"]
    common += ["--fit", "--total_kimg 0.016", "--outdir", str(folder / "out")]
    return CliRunner().invoke(main, [*common, *options])
