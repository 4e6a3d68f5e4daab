"""Commands in processes of their own."""

import sys
from pathlib import Path

import pytest

from eval import scripts
from eval.scripts import IDLE, last_line, main, peak_memory, run_script
from solvers.predictor import load_predictor
from src.files import read_json
from tests.eval.small import save_mixture

MIB = 1 << 20


def test_a_command_is_ended_in_good_order_once_there_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--model", str(save_mixture(tmp_path / "m")), "--outdir", str(folder)]
    options += ["--method", "gradient", "--batch", "4", "--tick", "0.008", "--validation", "4"]
    first = folder / "predictor-00001.pkl"
    ran = run_script("train_distill.py", [*options, "--fine_steps", "9"], first.exists)
    assert load_predictor(first).recipe.num_points == 2
    assert ran.seconds > 0
    assert 50 * MIB < ran.peak < 50_000 * MIB
    assert len(list(folder.glob("predictor-*.pkl"))) < 1250


def test_a_command_that_refuses_is_an_error_of_its_own_words() -> None:
    with pytest.raises(ValueError, match=r"train_distill.py: EPD cannot stand on unipc"):
        run_script("train_distill.py", ["--solver", "epd-unipc"])


def test_the_last_line_is_without_the_mark_of_an_error() -> None:
    assert last_line("Usage: x\nError: no such thing\n") == "no such thing"
    assert last_line("") == "it said nothing"


def test_an_idle_process_loads_the_model_and_reports(tmp_path: Path) -> None:
    main(str(tmp_path / "r.json"), IDLE, str(save_mixture(tmp_path / "m")), "cpu")
    assert read_json(tmp_path / "r.json")["peak"] > 50 * MIB


def test_a_failing_script_reports_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.py").write_text("import sys; sys.exit(sys.argv[1])")
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit, match="why"):
        main(str(tmp_path / "r.json"), "s.py", "why")
    assert read_json(tmp_path / "r.json")["peak"] > 0


def test_the_peak_does_not_shrink() -> None:
    before = peak_memory()
    held = bytearray(64 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() >= before
