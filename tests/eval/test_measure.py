"""Candidates make the calls that they should; errors, on a backend where everything is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.generate import Job, generate
from eval.features import spaces_of
from eval.fid import precision_recall, statistics_of
from eval.measure import (
    SCHEDULES,
    SOLVERS,
    Benchmark,
    Candidate,
    FrechetReference,
    by_hand,
    fine_solution,
    halves_of,
    learned,
    measure,
    rivals_for,
)
from solvers.epd import EPD, Directions
from solvers.predictor import find_predictor, load_predictor
from solvers.recipe import fitted_on
from src.images import to_bytes
from tests.eval.drawings import CHEAP, features
from tests.eval.small import benchmark, exact, reference, save, save_multistep

BENCHMARK = benchmark(steps=40)
LEVELS = BENCHMARK.backend.levels


def heun(steps: int) -> Candidate:
    return by_hand("heun", steps + 1, "polynomial", LEVELS)


def epd(k: int) -> Candidate:
    """EPD that is Euler: all its points at x itself."""
    euler = by_hand("euler", 4, "polynomial", LEVELS, afs=True)
    ones = torch.ones(3, k, dtype=torch.float64)
    solver = EPD(Directions(0 * ones, ones / k, ones, ones))
    return replace(euler, name="epd", sampler=replace(euler.sampler, solver=solver), points=k)


# --- candidates ---------------------------------------------------------------------------


def test_every_variant_makes_the_calls_that_it_should_with_afs_where_it_is_tried() -> None:
    for solver in SOLVERS:
        for nfe in (3, 4, 5, 9):
            assert {c.nfe for c in rivals_for([solver], [nfe], SCHEDULES["ve"], LEVELS)} == {nfe}
    assert fine_solution(LEVELS, 64).nfe == 128
    schedules = ("polynomial-7", "logsnr", "time_uniform-1")
    five = rivals_for(["euler"], [5], SCHEDULES["ve"], LEVELS)
    assert {(c.schedule, c.sampler.afs) for c in five} == {
        (s, afs) for s in schedules for afs in (False, True)
    }
    for nfe, afs in ((4, False), (5, True)):  # on a single schedule where calls need it alone
        rivals = rivals_for(["heun"], [nfe], ["polynomial"], LEVELS)
        assert [c.sampler.afs for c in rivals] == [afs]
    flow = exact("flow").levels
    assert rivals_for(["heun"], [5], SCHEDULES["flow"], flow) == []
    assert not any(c.sampler.afs for c in rivals_for(["euler"], [5], SCHEDULES["flow"], flow))
    assert by_hand("euler", 4, "time_uniform", LEVELS, rho=2).schedule == "time_uniform-2"


def test_predictors_are_named_by_kind_base_and_k_in_the_order_of_their_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By paths and patterns, each once; two of a kind are told apart by their files."""
    monkeypatch.chdir(tmp_path)
    save(Path(), "a", steps=4)
    save(Path(), "b", base="ipndm")
    save(Path(), "c", k=1)
    save_multistep(Path("d.pkl"), 3)
    each = learned(["a.pkl", str(tmp_path / "*.pkl"), "[a-d].pkl"], exact())
    names = sorted({(c.name, c.nfe, c.points) for c in each[:-2]})
    assert [name.split(" (")[0] for name, *_ in names] == [
        *("epd K=1", "epd-ipndm K=2", "epd-multistep K=3"),
    ]
    assert [(c.name, c.nfe) for c in each[-2:]] == [("epd K=2 (a.pkl)", 5)] * 2
    assert [c.fitted_on for c in learned(["a.pkl"], exact())] == [(CHEAP,)]
    save(Path(), "e", k=1)
    one, two = (c.name for c in learned(["c.pkl", "e.pkl"], exact()))
    assert (one, two) == ("epd K=1 (c.pkl)", "epd K=1 (e.pkl)")
    networks = ("efficientnet-lite0=112", "dinov2=here", "w/inception.pt")
    assert spaces_of(networks) == ("efficientnet", "dinov2", "inception")
    assert spaces_of(["rewards.fashion:features"]) == ("fashion-judge",)
    assert replace(each[0], fitted_on=("fashion-judge",)).fitted_in("rewards.fashion:features")
    rewards = ("efficientnet-minilm-scenes", "multi:clip=1,hps=2", "own:look", "aesthetic")
    assert spaces_of(rewards) == ("efficientnet", "clip", "hps", "own:look", "clip")
    assert {"hps", "pickscore", "clip"} <= {*spaces_of(["multi"])}
    tuned = load_predictor(find_predictor("tiny-sd3/epd-multistep-k2-3nfe-emoji-tuned"))
    assert fitted_on(tuned.recipe.training) == ["efficientnet-minilm"]  # by stage 2
    save_multistep(Path("flow.pkl"), process="flow")
    for name, words in (
        ("flow.pkl", "is not for a ve model"),
        ("cifar10-3nfe", "32 pixels"),
        ("nowhere/*.pkl", "no predictor"),
        ("no-such-predictor", "no predictor|no file"),
    ):
        with pytest.raises(ValueError, match=words):
            learned([name], exact())


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("process", ["ve", "flow"])
def test_parallel_multistep_on_levels_of_its_own_makes_a_call_an_interval(
    tmp_path: Path, points: int, process: str
) -> None:
    backend = exact(process)
    (one,) = learned([str(save_multistep(tmp_path / "p.pkl", points, process))], backend)
    assert (one.schedule, one.points, one.sampler.afs) == ("custom", points, False)
    here = Benchmark(backend, (Job(0), Job(1)), fine_solution(backend.levels, 8), 2)
    _, (score,) = measure(here, [one])
    assert (score.nfe, score.rows) == (3, 3 * points)
    assert 0 < score.rmse < 5


# --- measuring ----------------------------------------------------------------------------


def test_the_error_is_the_root_of_the_mean_square_whatever_the_batch() -> None:
    def latents(candidate: Candidate) -> Tensor:
        batches = generate(BENCHMARK.backend, candidate.sampler, BENCHMARK.jobs, batch=8)
        return next(batches).latents

    expected = (latents(heun(5)) - latents(BENCHMARK.fine)).square().mean().sqrt().item()
    for batch in (1, 3, 8):
        fine, (same, one) = measure(replace(BENCHMARK, batch=batch), [BENCHMARK.fine, heun(5)])
        assert fine.rmse == same.rmse == 0
        assert one.rmse == pytest.approx(expected, rel=1e-9)
    _, scores = measure(BENCHMARK, [heun(3), epd(1), epd(3)])
    assert [(s.nfe, s.rows, s.points) for s in scores] == [(6, 6, 1), (5, 5, 1), (5, 11, 3)]
    assert all(s.time > 0 for s in scores)


def as_seen(candidate: Candidate, jobs: tuple[Job, ...] = BENCHMARK.jobs) -> Tensor:
    """The features of a candidate's images, as their bytes."""
    batches = generate(BENCHMARK.backend, candidate.sampler, jobs, batch=3)
    images = torch.cat([batch.images for batch in batches])
    return features((to_bytes(images).float() / 255).expand(-1, 3, -1, -1)).double()


def test_frechet_distances_are_of_all_images_as_their_bytes() -> None:
    """To statistics that are given, and to the fine solution's own images."""
    fixed, free = reference(), FrechetReference(reference().space)
    fine, (score,) = measure(BENCHMARK, [heun(2)], [fixed])
    mine, theirs = statistics_of(as_seen(heun(2))), statistics_of(as_seen(BENCHMARK.fine))
    assert fixed.statistics
    assert score.frechet == pytest.approx(fixed.statistics.distance(mine), rel=1e-5)
    assert fine.frechet == pytest.approx(fixed.statistics.distance(theirs), rel=1e-5)
    _, (score,) = measure(BENCHMARK, [heun(2)], [free])
    assert score.frechets[CHEAP].value == pytest.approx(theirs.distance(mine), rel=1e-4)
    _, (score,) = measure(BENCHMARK, [replace(heun(2), fitted_on=(CHEAP,))], [free])
    assert (score.frechets[CHEAP].trained_on, score.frechets[CHEAP].spread) == (True, None)
    assert measure(BENCHMARK, [heun(2)])[1][0].frechet is None


def test_precision_and_recall_are_of_images_of_other_seeds_than_the_fine_solutions() -> None:
    many = replace(BENCHMARK, jobs=tuple(map(Job, range(24))), fine=fine_solution(LEVELS, 8))
    fine, (score, same) = measure(many, [heun(2), many.fine], [reference()])
    mine, theirs = (as_seen(one, many.jobs) for one in (heun(2), many.fine))
    assert (score.precision, score.recall) == precision_recall(mine[::2], theirs[1::2])
    assert (same.precision, same.recall) == (fine.precision, fine.recall)
    assert score.precision is not None
    assert score.precision < 1
    assert measure(many, [heun(2)])[1][0].recall is None


def test_the_halves_are_of_the_same_prompts() -> None:
    """Prompts go round, and their number may be even; one that is drawn once is in neither."""
    prompts = ["a", "b", "a", "b", "a", "b", "a", "b", "c"]
    assert halves_of(prompts) == ([0, 1, 4, 5], [2, 3, 6, 7])
    assert halves_of([None] * 5) == ([0, 2, 4], [1, 3])


def test_candidates_that_solve_another_problem_are_refused() -> None:
    sigmas = tuple(replace(LEVELS, sigma_min=0.01).grid("polynomial", 4).tolist())
    short = Candidate("short", replace(heun(3).sampler, sigmas=sigmas), "polynomial-7")
    guided = replace(heun(3), sampler=replace(heun(3).sampler, guidance_rate=4.0), source="g.pkl")
    with pytest.raises(ValueError, match=r"short ends at sigma 0\.01"):
        measure(BENCHMARK, [short])
    with pytest.raises(ValueError, match=r"g\.pkl has the guidance rate 4"):
        measure(BENCHMARK, [guided])
