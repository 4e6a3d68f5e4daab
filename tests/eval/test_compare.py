"""The comparison from its options to its files, on tiny random networks."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import isnan
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("diffusers")

from backends.generate import generate
from backends.load import load_backend
from eval.compare import (
    chosen,
    jobs_for,
    main,
    references_for,
    runs_of,
    without_nan,
    write_results,
)
from eval.features import load_space
from eval.fid import save_statistics, statistics_of
from eval.measure import Benchmark, FrechetReference, fine_solution, from_here, measure, rivals_for
from rewards.base import score
from rewards.fashion import load_judge
from solvers.field import Condition
from src.seeds import parse_seeds
from tests import twins
from tests.eval.drawings import CHEAP, features, redness
from tests.eval.small import benchmark, save
from tests.rewards.networks import write_open_clip_folder
from tests.tiny import tiny_model

FEW = ("--solvers", "euler,heun", "--nfe", "2,3", "--fine", "4", "--seeds", "0-3", "--batch", "2")
TEXT = ("--model", "sd3", "--prompts", "p.txt", "--guidance_rate", "2", "--schedules", "flowmatch")
CLIP = ("--reward", "clip", "--weights", "clip=clip")
FREE = "tests.eval.drawings:moments"
RED = "tests.eval.drawings:redness"
SHAPELESS = "tests.eval.drawings:shapeless"
PROMPTS = ("a red fox", "two cats")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model by class, a twin of SD3, one of CLIP, and two prompts."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(folder / "classes")
    twins.saved(folder / "sd3", twins.sd3())
    write_open_clip_folder(folder / "clip")
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    others = replace(statistics_of(torch.rand(9, 7)), about={"features": "others"})
    save_statistics(folder / "others.npz", others)
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    monkeypatch.chdir(place)

    def command(*options: object) -> Result:
        common = ["--model", "classes", "--device", "cpu", "--outdir", tmp_path / "out", *FEW]
        return CliRunner().invoke(main, [*map(str, (*common, *options))])

    return command


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/results.json").read_text())


def test_the_command_leaves_its_files_and_distances_by_sets_of_many_images(
    run,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    """Each set's distance as measured by itself; found again; marked where trained on."""
    path = save(tmp_path, "mine", k=3)
    drawn = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    to = replace(statistics_of(features(drawn)), about={"features": CHEAP})
    save_statistics(tmp_path / "r.npz", to)
    options = ["--features", CHEAP, "--reference", tmp_path / "r.npz", "--features", FREE]
    options += ["--images", 6, "--sets", 2, "--nfe", 3, "--predictor", tmp_path / "*.pkl"]
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert "trained on" in done.output
    assert "learned / hand-made" in done.output
    assert "4 images. Fine solution: heun in 4 steps on polynomial-7 (8 calls)" in done.output
    content = results(tmp_path)
    scores, about = content["scores"], content["about"]
    assert [(s["name"], s["nfe"], s["source"]) for s in scores] == [
        *(("euler", 3, None), ("heun", 3, None), ("epd K=3", 3, from_here(path))),
    ]
    assert about["seeds"] == "0-3"
    assert {"commit", "cpu", "threads", "torch", "fine", "meaning"} <= about.keys()
    with (tmp_path / "out/results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["rmse"]) for row in rows] == [s["rmse"] for s in scores]
    assert {"name", "nfe", "rmse_low", "rows", f"frechet {FREE} spread"} <= rows[0].keys()
    assert [r[f"frechet {CHEAP} trained_on"] for r in rows] == ["False", "False", "True"]
    assert (tmp_path / "out/results.png").stat().st_size > 5000
    assert "epd K=3, 3 calls" in (tmp_path / "out/report.html").read_text()
    assert [s["frechets"][CHEAP]["trained_on"] for s in scores] == [False, False, True]
    assert content["fine"]["frechets"][FREE]["value"] == pytest.approx(0, abs=1e-6)
    assert all(s["frechets"][FREE]["value"] > 0 for s in scores)  # held against the fine one's
    backend, euler = load_backend("classes"), scores[0]
    schedules = ["polynomial", "logsnr", "time_uniform"]
    (candidate,) = (
        c
        for c in rivals_for(["euler"], [3], schedules, backend.levels)
        if (c.schedule, c.sampler.afs) == (euler["schedule"], euler["afs"])
    )
    values = []
    for seeds in (range(6), range(6, 12)):
        jobs = jobs_for(backend, seeds, (), even=True)
        assert [job.prompt for job in jobs] == [0, 1, 2, 0, 1, 2]
        images = next(generate(backend, candidate.sampler, jobs, batch=6)).images
        mine = statistics_of(features(((images * 255).round() / 255).expand(-1, 3, -1, -1)))
        values.append(to.distance(mine))
    assert euler["frechet"] == pytest.approx(sum(values) / 2, rel=1e-3)
    spread = abs(values[0] - values[1]) / 2**0.5
    assert euler["frechets"][CHEAP]["spread"] == pytest.approx(spread, rel=0.05)
    assert euler["frechets"][CHEAP]["sets"] == pytest.approx(values, rel=1e-3)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cache").iterdir()}
    assert run(*options).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out/cache").iterdir()} == stamps
    again = results(tmp_path)["scores"]
    assert [s["frechets"] for s in again] == [s["frechets"] for s in scores]
    damaged = min(stamps)
    damaged.write_bytes(damaged.read_bytes()[:99])
    assert run(*options).exit_code == 0
    assert damaged.stat().st_size > 99
    mended = [s["frechets"][CHEAP]["value"] for s in results(tmp_path)["scores"]]
    assert mended == pytest.approx([s["frechets"][CHEAP]["value"] for s in scores])


def test_each_solver_takes_its_best_schedule() -> None:
    here = benchmark(images=6)
    rivals = rivals_for(["euler", "dpmpp-2"], [4], ["best"], here.backend.levels)
    assert len(rivals) == 12
    _, scores = measure(here, rivals)
    errors = {(s.name, s.schedule, s.afs): s.rmse for s in scores}
    winners = chosen(here, rivals)
    assert [c.name for c in winners] == ["euler", "dpmpp-2"]
    for c in winners:
        least = min(error for (name, *_), error in errors.items() if name == c.name)
        assert errors[c.name, c.schedule, c.sampler.afs] == least


def test_what_fails_on_some_images_leaves_the_rest(tmp_path: Path) -> None:
    """A candidate one of whose images is none, and a reward that has no number for another."""
    here = benchmark(images=6)
    exact = here.backend.denoise

    def torn(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        lost = ((sigma - 9.7232).abs() < 1e-3) & (torch.arange(len(x)) == 1)
        return exact(x, sigma, cond).masked_fill(lost[:, None, None, None], torch.nan)

    here = replace(here, backend=replace(here.backend, denoise=torn))
    rivals = rivals_for(["euler"], [3], ["polynomial", "logsnr"], here.backend.levels)
    rivals = [c for c in rivals if not c.sampler.afs]
    images = next(generate(here.backend, here.fine.sampler, here.jobs, batch=6)).images
    least = images.mean((1, 2, 3)).min() + 1e-3

    def picky(images: Tensor, _prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)).where(images.mean((1, 2, 3)) > least, torch.nan)

    space = FrechetReference(load_space(CHEAP, torch.device("cpu")))
    fine, (bad, good) = measure(here, rivals, [space], {"picky": picky})
    assert chosen(here, rivals) == rivals[1:]
    assert isnan(bad.rmse)
    assert (bad.frechets, without_nan(asdict(bad))["rmse"]) == ({}, None)
    assert "holds NaN" in bad.left_out[f"a Frechet distance ({CHEAP})"]
    write_results(tmp_path, here, rivals, fine, [bad, good], settings={"model": "m"}, shown=2)
    for file in ("results.txt", "report.html"):
        assert "euler, 3 calls, without an RMSE: an image" in (tmp_path / file).read_text()
    assert good.frechets[CHEAP].value > 0
    assert "picky gave nan" in fine.left_out["picky of 1 images"]
    kept = images.mean((1, 2, 3)).sort().values[1:].mean().item()
    assert fine.rewards["picky"].value == pytest.approx(kept, abs=2e-3)
    both = {"odd": lambda x, _p: picky(1 - x, _p), "picky": picky}
    _, (left,) = measure(here, rivals[1:], rewards=both)
    assert all(what.split()[0] in why for what, why in left.left_out.items())
    none = replace(here, backend=replace(here.backend, denoise=lambda x, _s, _c: x / 0))
    with pytest.raises(ValueError, match="the fine solution holds NaN"):
        measure(none, rivals)
    with pytest.raises(ValueError, match=r"broken fails on float32 .*: KeyError: 'x'"):
        measure(here, rivals, rewards={"broken": lambda _images, _prompts: {}["x"]})


def test_rewards_come_with_intervals_and_paths_from_here(
    run,  # noqa: ANN001
    place: Path,
    tmp_path: Path,
) -> None:
    done = run(*TEXT, *CLIP, "--reward", RED, "--model", place / "sd3", "--features", CHEAP)
    assert done.exit_code == 0, done.output
    assert str(place) not in (tmp_path / "out/results.json").read_text()
    content = results(tmp_path)
    about, fine = content["about"], content["fine"]
    assert (about["model"], about["prompts"]) == ("sd3", "p.txt")
    assert (about["rewards"], about["weights"]) == (["clip", RED], {"clip": "clip"})
    for one in (*content["scores"], fine):
        for reward in ("clip", RED):
            estimate = one["rewards"][reward]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert one["rmse_low"] <= one["rmse"] <= one["rmse_high"]
    assert fine["frechet"] == pytest.approx(0, abs=1e-6)  # there is no reference
    assert all(s["frechet"] > 0 for s in content["scores"])
    with (tmp_path / "out/results.csv").open(encoding="utf-8", newline="") as file:
        ends = [
            [float(row[f"clip{end}"]) for end in ("_low", "", "_high")]
            for row in csv.DictReader(file)
        ]
    assert ends == [
        [s["rewards"]["clip"][n] for n in ("low", "value", "high")] for s in content["scores"]
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert "0: a red fox; 1: two cats; 2: a red fox" in page
    assert "cosine of image and prompt in a CLIP" in page
    assert "clip" in (tmp_path / "out/results.txt").read_text().splitlines()[0]


def test_a_reward_is_the_mean_over_what_the_solver_made_of_the_same_jobs(place: Path) -> None:
    backend = load_backend(str(place / "sd3"))
    jobs = jobs_for(backend, [0, 1, 2, 3], PROMPTS)
    assert [job.prompt for job in jobs] == [*PROMPTS, *PROMPTS]
    (euler,) = rivals_for(["euler"], [2], ["flowmatch"], backend.levels, 2.0)
    here = Benchmark(backend, jobs, fine_solution(backend.levels, 3, 2.0), batch=4)
    rewards = {"red": redness}
    fine, (one,) = measure(here, [euler], rewards=rewards)
    images = next(generate(backend, euler.sampler, jobs, batch=4)).images
    seen = score(redness, images, [""] * 4).double()
    assert one.rewards["red"].value == pytest.approx(seen.mean().item())
    gain = seen.mean().item() - fine.rewards["red"].value
    assert one.gains["red"].value == pytest.approx(gain)


def test_guidance_rates_by_hand_stand_beside_the_solvers_without(tmp_path: Path) -> None:
    options = ["--solvers", "euler", "--nfe", "2", "--fine", "2", "--schedules", "polynomial"]
    options += ["--seeds", "0-1", "--guidance", "1,3", "--outdir", str(tmp_path)]
    options += ["--reward", "rewards.fashion:accuracy"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    plain, guided = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert (plain["name"], guided["name"]) == ("euler", "euler at 1,3")
    assert [(s["rows"], s["evaluations"]) for s in (plain, guided)] == [(2, 2), (2, 3)]
    backend = load_backend("fashion-mnist-32")
    jobs = jobs_for(backend, range(2), ())
    (rival,) = rivals_for(["euler"], ["2"], ["polynomial"], backend.levels)
    ways = fine_solution(backend.levels, 2).sampler, rival.sampler.with_rates((1, 3))
    wanted, x = (next(generate(backend, way, jobs, batch=2)).latents for way in ways)
    likeliest = load_judge().log_probabilities((x + 1) / 2).argmax(-1).tolist()
    right = [label == job.prompt for label, job in zip(likeliest, jobs, strict=True)]
    assert guided["rewards"]["rewards.fashion:accuracy"]["value"] == sum(right) / 2
    assert guided["rmse"] == pytest.approx((x - wanted).square().mean().sqrt().item(), rel=1e-4)
    assert guided["rmse"] != pytest.approx(plain["rmse"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--schedules", "polynominal"), "unknown schedule"),
        (("--solvers", "eulr"), "did you mean 'euler'"),
        (("--nfe", "3,x"), "'x' is no number from 1 on"),
        (("--solvers", "", "--nfe", "3"), "nothing to compare"),
        (("--predictor", "none/*.pkl"), "no predictor is named"),
        (("--predictor", "cifar10-3nfe"), "32 pixels"),
        (("--reference", "none.npz"), "no reference statistics at none.npz"),
        (("--features", CHEAP, "--reference", "others.npz"), "is of other features (others)"),
        (("--features", "inceptoin"), "did you mean inception"),
        (CLIP, "clip judges images by their prompts: this model takes none"),
        (("--prompts", "p.txt"), "this model takes no texts"),
        ((*TEXT, "--reward", "clop"), "no reward 'clop': did you mean clip"),
        ((*TEXT, "--reward", "clip", "--weights", "clip=none"), "no such file or folder: none"),
        ((*TEXT, "--reward", "builtins:len"), "'builtins:len' must take (images, prompts)"),
        ((*TEXT, "--prompts", "none.txt"), "none.txt: No such file"),
        (("--model", "nowhere", "--reward", "mps"), "missing weights: mps"),
        (("--guidance", "1,2,3,2,1,1,1", "--nfe", "3"), "has 7 steps"),
        ((*TEXT, "--images", "20"), "--images 20 is of Frechet distances: give --features"),
        (("--reward", "operator:add"), "operator:add fails on float32 [2, 3, 16, 16]: TypeError"),
        (("--reward", SHAPELESS), f"{SHAPELESS} must return a tensor [2], not []"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_one_line(
    run,  # noqa: ANN001
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eval.compare.measure", None)  # refused before any of the work
    done = run(*options)
    assert done.exit_code != 0
    assert words in done.output.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_say_its_features_is_of_the_space_of_its_size(tmp_path: Path) -> None:
    """EDM's; and two files of one space are one too many."""
    look, files = torch.zeros(1, 3, 8, 8), [tmp_path / "edm.npz", tmp_path / "own.npz"]
    seen = [load_space(name, look.device)(torch.rand(9, 3, 8, 8)) for name in (FREE, CHEAP)]
    assert len({one.shape[1] for one in seen}) == 2
    save_statistics(files[0], replace(statistics_of(seen[0]), about={}))
    save_statistics(files[1], replace(statistics_of(seen[1]), about={"features": CHEAP}))
    for names in ((FREE, CHEAP), (CHEAP, FREE)):
        references = references_for(tmp_path, names, files, {}, look)
        assert [r.space.name for r in references] == list(names)
        assert all(r.statistics for r in references)
    save_statistics(
        tmp_path / "more.npz", replace(statistics_of(seen[0]), about={"features": FREE})
    )
    with pytest.raises(ValueError, match=r"more.npz and .*edm.npz are both of"):
        references_for(tmp_path, (FREE,), [files[0], tmp_path / "more.npz"], {}, look)
    with pytest.raises(ValueError, match=r"edm.npz is of other features \(\d+ numbers\)"):
        references_for(tmp_path, (CHEAP,), files[:1], {}, look)


@given(st.sets(st.integers(0, 60), min_size=1).map(sorted))
def test_seeds_are_written_as_they_are_read(seeds: list[int]) -> None:
    assert parse_seeds(runs_of(seeds)) == seeds
