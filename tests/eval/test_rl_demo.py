import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from eval import rl_demo
from eval.rl_demo import Compared, by_prompt, draw_curve, halves, judges_here
from src.images import read_png
from src.runs import Metrics
from tests.training.ppo.small import SIDE, config_of, write_twins
from training.ppo.runs import keep_settings

BRIGHT = "tests.training.ppo.small:brightness"
CPU = torch.device("cpu")


def test_prompts_that_choose_are_not_those_reported_on(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("a\nb\nc\nd\na\na\n")
    path, reported = halves(tmp_path / "all.txt", tmp_path)
    assert path.read_text().split() == ["a", "c", "a"]
    assert reported == ("b", "d")


def test_gains_are_of_pairs() -> None:
    before = torch.tensor([0.0, 10.0, 20.0, 30.0])
    gain = Compared("r", before, before + 1).gain
    assert (gain.value, gain.low, gain.high) == (1, 1, 1)
    assert Compared("r", before, before + 1).cells[-1] == "1.00"


def test_a_judge_that_is_not_here_is_left_out_and_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EPD_MPS", str(tmp_path / "none"))
    assert list(judges_here([BRIGHT, "mps"], CPU)) == [BRIGHT]
    assert "without mps: mps: no such file or folder" in capsys.readouterr().err


def evaluation(step: int, gain: float) -> dict[str, float]:
    ends = {"eval/r_gain_low": gain - 1, "eval/r_gain_high": gain + 1}
    return {"step": step, "eval/r_gain": gain, "eval/best_step": 0.0} | ends


def test_the_curve_is_drawn_of_what_was_told(tmp_path: Path) -> None:
    draw_curve(tmp_path / "curve.png", [evaluation(0, 0), evaluation(2, 0.5)], 16)
    assert read_png(tmp_path / "curve.png")[0].shape[0] == 3


def test_the_demo_samples_and_scores_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_twins("sd3_512", tmp_path)
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / rl_demo.BEST).write_bytes((tmp_path / "start.pkl").read_bytes())
    known = config_of("sd3_512")
    model = {"model": str(tmp_path / "model"), "resolution": SIDE}
    config = dataclasses.replace(
        known,
        data=dataclasses.replace(known.data, predictor_snapshot=str(tmp_path / "start.pkl")),
        model=dataclasses.replace(known.model, **model),
        reward=dataclasses.replace(known.reward, type=BRIGHT),
    )
    keep_settings(config, run)
    for line in (evaluation(0, 0), evaluation(2, 0.5)):
        Metrics(run / "logs" / "metrics.jsonl").write(int(line.pop("step")), line)
    monkeypatch.setattr(rl_demo, "train", lambda *_: run)
    monkeypatch.setattr(rl_demo, "JUDGES", ())
    options = ["--images", "3", "--outdir", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(rl_demo.main, options)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["images"] == 3
    assert told["scores"][BRIGHT]["gain"] == 0
    for name in ("before", "after"):
        assert len(list((tmp_path / "out" / name).glob("*.png"))) == 3
    assert (tmp_path / "out" / "grid.png").is_file()


def test_images_of_a_prompt_count_once() -> None:
    scores = torch.tensor([1.0, 5.0, 3.0, 7.0])
    assert by_prompt(scores, ["a", "b", "a", "b"]).tolist() == [2.0, 6.0]
