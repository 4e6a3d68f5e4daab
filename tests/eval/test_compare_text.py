"""The comparison of text-to-image models: the same prompts and seeds for errors and rewards."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("diffusers")

from backends.generate import generate
from backends.load import load_backend
from eval.candidates import fine_solution, variants
from eval.compare import main
from eval.measure import Study, measure, solve_finely
from eval.prompted import jobs_for
from rewards.base import score
from rewards.registry import load_reward
from tests import twins
from tests.rewards.twins import write_open_clip_folder
from tests.tiny import tiny_model

FEW = ("--solvers", "euler,heun", "--nfe", "2", "--schedules", "flowmatch", "--fine", "3")
SEEDS = ("--seeds", "0-3", "--batch", "3", "--shown", "2", "--device", "cpu")
PROMPTS = ("a red fox", "two cats")
RED = "tests.eval.pictures:redness"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin of SD3, one of CLIP and two prompts."""
    folder = tmp_path_factory.mktemp("text")
    twins.saved(folder / "sd3", twins.sd3())
    write_open_clip_folder(folder / "clip")
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    tiny_model(folder / "classes")
    return folder


def run(place: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    monkeypatch.chdir(place)
    return CliRunner().invoke(main, [*FEW, *SEEDS, "--outdir", "out", *options])


TEXT = ("--model", "sd3", "--prompts", "p.txt", "--guidance_rate", "2")
CLASSES = ("--model", "classes", "--schedules", "polynomial")
CLIP = ("--reward", "clip", "--weights", "clip=clip")


def test_the_files_hold_rewards_with_intervals_and_paths_from_here(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", str(place / "sd3"), *TEXT[2:])
    done = run(place, monkeypatch, *model, *CLIP, "--reward", RED)
    assert done.exit_code == 0, done.output
    text = (place / "out/results.json").read_text()
    assert str(place) not in text
    content = json.loads(text)
    about = content["about"]
    assert (about["model"], about["prompts"], about["weights"]) == (
        "sd3",
        "p.txt",
        {"clip": "clip"},
    )
    assert about["rewards"] == ["clip", RED]
    for one in (*content["scores"], content["fine"]):
        for reward in ("clip", RED):
            estimate = one["rewards"][reward]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert one["rmse_low"] <= one["rmse"] <= one["rmse_high"]
    page = (place / "out/report.html").read_text()
    assert "0: a red fox; 1: two cats." in page
    assert "cosine of image and prompt in a CLIP" in page
    assert "clip" in (place / "out/results.txt").read_text().splitlines()[0]


def test_a_reward_is_the_mean_over_what_the_solver_made_of_the_same_jobs(place: Path) -> None:
    backend = load_backend(str(place / "sd3"))
    jobs = jobs_for(backend, [0, 1, 2, 3], PROMPTS)
    assert [job.prompt for job in jobs] == [*PROMPTS, *PROMPTS]
    (euler,) = variants("euler", 2, ["flowmatch"], backend.levels, 2.0)
    study = Study(backend, jobs, fine_solution(backend.levels, 3, 2.0), batch=4)
    rewards = {RED: load_reward(RED)}
    fine = solve_finely(study, rewards=rewards)
    (found,) = measure(study, [euler], fine, rewards=rewards)
    made = next(generate(backend, euler.method, jobs, batch=4)).images
    seen = score(rewards[RED], made, [""] * 4).double()
    assert found.rewards[RED].value == pytest.approx(seen.mean().item())
    gain = (seen - fine.rewards[RED]).mean().item()
    assert found.gains[RED].value == pytest.approx(gain)
    assert torch.isfinite(fine.rewards[RED]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*CLASSES, *CLIP), "clip judges images by their prompts, and this model"),
        ((*CLASSES, "--prompts", "p.txt"), "this model takes no texts"),
        ((*TEXT, "--seeds", "0"), "2 prompts need as many seeds, not 1"),
        ((*TEXT, "--reward", "clop"), "no reward 'clop': did you mean clip"),
        ((*TEXT, "--reward", "clip", "--weights", "clip=none"), "no such file or folder: none"),
        ((*TEXT, "--reward", "builtins:len"), "'builtins:len' must take (images, prompts)"),
        (("--model", "sd3", "--prompts", "none.txt"), "none.txt: No such file"),
        (("--model", "nowhere", "--reward", "mps"), "missing weights: mps"),
    ],
)
def test_what_cannot_be_judged_is_an_error_of_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    done = run(place, monkeypatch, *options)
    assert done.exit_code == 1
    assert said in done.output.strip().splitlines()[-1]


def test_rewards_that_ignore_prompts_judge_any_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(place, monkeypatch, *CLASSES, "--reward", RED)
    assert done.exit_code == 0, done.output
    assert RED in done.output
