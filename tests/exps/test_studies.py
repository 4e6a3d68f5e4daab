"""Composed prompts and how pictures are asked, curves over seeds, the judge's closed form."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from exps import distil
from exps.build.fit_emoji_judge import retrieval, ridge
from exps.study import composed
from exps.study.composed import COLOURS, Wanted, parse
from exps.study.sweep import curve, main, nearness, shipped_mixture
from src.text import read_prompts


def test_prompts_are_taken_apart_and_ask_for_trained_names_alone_in_all_kinds() -> None:
    examples = {
        "ice cream": Wanted("one", ("ice cream",)),
        "an airplane and a red heart": Wanted("two", ("airplane", "red heart")),
        "cat on light blue": Wanted("colour", ("cat",), colour="light blue"),
        "a cat left of a sun": Wanted("relation", ("cat", "sun"), place="left"),
        "a bus below an alien": Wanted("relation", ("bus", "alien"), place="bottom"),
        "small cat at the top": Wanted("place", ("cat",), place="top"),
    }
    assert {prompt: parse(prompt) for prompt in examples} == examples
    prompts = read_prompts(composed.PROMPTS)
    trained = read_prompts(Path(composed.PROMPTS).with_name("emoji-train.txt"))
    assert len(prompts) == len(set(prompts)) == 100
    assert set(composed.names_of(prompts)) <= set(trained)
    assert {parse(p).colour for p in prompts} - {""} <= set(COLOURS)
    assert {parse(p).kind for p in prompts} == {"one", "two", "colour", "relation", "place"}


def test_ground_place_object_and_diversity_are_read_off_the_pixels() -> None:
    image = (torch.tensor(COLOURS["yellow"]) / 255)[:, None, None].repeat(1, 64, 64)
    red = torch.tensor([0.9, 0.1, 0.1])
    image[:, 40:56, 8:24] = red[:, None, None]
    back = composed.ground(image)
    assert composed.nearest_colour(back) == "yellow"
    assert composed.centre(image) == pytest.approx((0.25, 0.75), abs=0.02)
    cut = composed.alone(composed.half(image, "left"), back)
    assert cut.shape == (3, 64, 64)
    torch.testing.assert_close(cut.mean((1, 2)), red, atol=0.05, rtol=0)
    assert (composed.alone(composed.half(image, "right"), back) == 1).all()  # nothing there
    levels = torch.tensor([[0.0, 0.1], [0.5, 0.6]])[..., None, None, None].expand(2, 2, 3, 4, 4)
    assert composed.diversity(levels) == {"seeds_of_a_prompt": 0.1, "prompts": 0.5}


def test_a_curve_has_the_steps_that_all_runs_have_and_a_class_is_nearest_its_own_mean() -> None:
    runs = [
        [{"step": 0, "gain": 0.0}, {"step": 5, "gain": 1.0}, {"step": 6, "loss": 9.0}],
        [{"step": 0, "gain": 0.0}, {"step": 5, "gain": 3.0}, {"step": 10, "gain": 4.0}],
    ]
    steps = curve(runs, "gain")
    assert [(step, gain.value) for step, gain in steps] == [(0, 0.0), (5, 2.0)]
    assert steps[1][1].low < 2 < steps[1][1].high
    means = shipped_mixture().means[:2].clamp(-1, 1) / 2 + 0.5
    own, other = nearness(means, ["0", "1"]), nearness(means, ["1", "0"])
    assert own.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert (other < own).all()


@pytest.mark.parametrize(
    "vary", [["ppo.a=true", "ppo.b=true"], ["ppo.a"], [""], ["ppo.a=1,,2"]], ids=str
)
def test_a_curve_that_would_take_the_place_of_another_is_refused(
    vary: list[str], tmp_path: Path
) -> None:
    options = [word for text in vary for word in ("--vary", text)]
    config = "exps/mixture-3x4x4/groupings.yaml"
    done = CliRunner().invoke(main, ["--config", config, "--outdir", str(tmp_path), *options])
    assert done.exit_code
    assert "write section.key=value,value, each value once" in done.output
    assert not any(tmp_path.iterdir())


def test_a_run_that_fails_and_a_distillation_with_nothing_to_do_are_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = "exps/mixture-3x4x4/groupings.yaml"
    given = ["--config", config, "--outdir", str(tmp_path), "--seeds", "0"]
    done = CliRunner().invoke(main, [*given, "--vary", "reward.type=operator:add"])
    assert done.output == "Error: the run of operator:add with seed 0 failed, see above\n"
    assert "Error: operator:add fails on float32 [2, 3, 4, 4]" in capfd.readouterr().err
    done = CliRunner().invoke(distil.main, ["tiny-sd3", "--only", "epd-k2-*"])
    assert done.output.endswith("exps/tiny-sd3 has all that are asked for (5) already\n")
    assert done.output.count("\n") == 1


def test_the_ridge_has_no_downhill_left_and_retrieval_counts_the_own_ones() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, d, generator=g, dtype=torch.float64) for d in (6, 3))
    weight, bias = (t.requires_grad_() for t in ridge(x, y, 0.1))
    ((x @ weight.T + bias - y).square().sum() + 2 * weight.square().sum()).backward()
    for part in (weight, bias):
        torch.testing.assert_close(part.grad, torch.zeros_like(part), rtol=0, atol=1e-10)
    scores = retrieval(torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.2, 0.1, 0.6]]))
    names = ("name_of_picture_first", "picture_of_name_first", "own_above_other", "cosine_own")
    assert [scores[n] for n in names] == pytest.approx([2 / 3, 1, 5 / 6, 1.9 / 3])
