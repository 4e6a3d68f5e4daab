"""Candidates make the calls that they should; errors, on a backend where everything is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.generate import Job, generate
from eval.fid import statistics_of
from eval.measure import (
    SCHEDULES,
    SOLVERS,
    Benchmark,
    Candidate,
    Fine,
    FrechetReference,
    best,
    by_hand,
    fine_solution,
    learned,
    measure,
    predictor_files,
    solve_finely,
    space_name,
    variants,
)
from solvers.epd import EPD, Directions
from src.images import to_bytes
from tests.eval.pictures import CHEAP, features
from tests.eval.small import benchmark, exact, reference, save, save_multistep

BENCHMARK = benchmark()
LEVELS = BENCHMARK.backend.levels


@pytest.fixture(scope="module")
def fine() -> Fine:
    return solve_finely(BENCHMARK, [reference()])


def heun(steps: int) -> Candidate:
    return by_hand("heun", steps + 1, "polynomial", LEVELS)


def epd(k: int, afs: bool = True) -> Candidate:
    """EPD that is Euler: all its points at x itself."""
    euler = by_hand("euler", 4, "polynomial", LEVELS, afs=afs)
    ones = torch.ones(3, k, dtype=torch.float64)
    solver = EPD(Directions(0 * ones, ones / k, ones, ones))
    return replace(euler, name="epd", sampler=replace(euler.sampler, solver=solver), points=k)


# --- candidates ---------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [3, 4, 5, 9])
def test_every_variant_makes_the_calls_that_it_should(nfe: int) -> None:
    for solver in SOLVERS:
        assert {c.nfe for c in variants(solver, nfe, SCHEDULES["ve"], LEVELS)} == {nfe}
    assert fine_solution(LEVELS, 64).nfe == 128


def test_afs_is_tried_beside_none_but_on_a_single_schedule_only_where_calls_need_it() -> None:
    kinds = {(c.schedule, c.sampler.afs) for c in variants("euler", 5, SCHEDULES["ve"], LEVELS)}
    schedules = ("polynomial-7", "logsnr", "time_uniform-1")
    assert kinds == {(s, afs) for s in schedules for afs in (False, True)}
    for nfe, afs in ((4, False), (5, True)):
        assert [c.sampler.afs for c in variants("heun", nfe, ["polynomial"], LEVELS)] == [afs]
    flow = exact("flow").levels
    assert variants("heun", 5, SCHEDULES["flow"], flow) == []
    assert not any(c.sampler.afs for c in variants("euler", 5, SCHEDULES["flow"], flow))
    assert by_hand("euler", 4, "time_uniform", LEVELS, rho=2).schedule == "time_uniform-2"


def test_predictors_are_named_by_kind_base_and_k_in_the_order_of_their_calls(
    tmp_path: Path,
) -> None:
    paths = [
        save(tmp_path, "a", steps=4),
        save(tmp_path, "b", base="ipndm"),
        save(tmp_path, "c", k=1),
        save_multistep(tmp_path / "d.pkl", 3),
    ]
    names = [(c.name, c.nfe, c.points) for c in learned(paths, exact())]
    assert sorted(names[:3]) == [
        ("epd K=1", 3, 1),
        ("epd-ipndm K=2", 3, 2),
        ("epd-multistep K=3", 3, 3),
    ]
    assert names[3:] == [("epd K=2", 5, 2)]
    assert [c.fitted_on for c in learned(paths[:1], exact())] == [(CHEAP,)]
    assert [
        space_name(n) for n in ("efficientnet-lite0=112", "dinov2=here", "w/inception.pt")
    ] == [
        *("efficientnet", "dinov2", "inception"),
    ]


def test_two_predictors_of_one_kind_are_told_apart_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    both = learned([save(Path(), "first"), save(Path(), "second")], exact())
    assert [c.name for c in both] == ["epd K=2 (first.pkl)", "epd K=2 (second.pkl)"]


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("process", ["ve", "flow"])
def test_parallel_multistep_on_levels_of_its_own_makes_a_call_an_interval(
    tmp_path: Path, points: int, process: str
) -> None:
    backend = exact(process)
    (one,) = learned([save_multistep(tmp_path / "p.pkl", points, process)], backend)
    assert (one.schedule, one.points, one.sampler.afs) == ("custom", points, False)
    here = Benchmark(backend, (Job(0), Job(1)), fine_solution(backend.levels, 8), 2)
    (score,) = measure(here, [one], solve_finely(here))
    assert (score.nfe, score.rows) == (3, 3 * points)
    assert 0 < score.rmse < 5


def test_predictors_that_do_not_belong_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not for a ve model"):
        learned([save_multistep(tmp_path / "p.pkl", process="flow")], exact())
    with pytest.raises(ValueError, match="32 pixels"):
        learned(predictor_files(["cifar10-3nfe"]), exact())


def test_patterns_names_and_paths_find_predictors_once(tmp_path: Path) -> None:
    path = save(tmp_path, "one")
    save(tmp_path, "two")
    files = predictor_files([str(path), str(tmp_path / "*.pkl"), "cifar10-3nfe"])
    assert [p.name for p in files] == ["one.pkl", "two.pkl", "cifar10-3nfe.pkl"]
    for pattern in ("nowhere/*.pkl", "no-such-predictor"):
        with pytest.raises(ValueError, match=r"no predictor|no file"):
            predictor_files([pattern])


# --- measuring ----------------------------------------------------------------------------


def test_the_error_is_the_root_of_the_mean_square_over_all_numbers(fine: Fine) -> None:
    assert measure(BENCHMARK, [BENCHMARK.fine], fine)[0].rmse == 0
    moved = replace(fine, latents=fine.latents + 0.25)
    assert measure(BENCHMARK, [BENCHMARK.fine], moved)[0].rmse == pytest.approx(0.25, rel=1e-12)


def test_the_error_does_not_hang_on_the_batch(fine: Fine) -> None:
    errors = [measure(replace(BENCHMARK, batch=b), [heun(5)], fine)[0].rmse for b in (1, 3, 8)]
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-9)


def test_calls_and_evaluations_are_counted_apart(fine: Fine) -> None:
    scores = measure(BENCHMARK, [heun(3), epd(1), epd(3)], fine)
    assert [(s.nfe, s.rows, s.points) for s in scores] == [(6, 6, 1), (5, 5, 1), (5, 11, 3)]
    assert all(s.time > 0 for s in scores)


def test_a_table_that_stays_at_x_is_euler(fine: Fine) -> None:
    euler = by_hand("euler", 4, "polynomial", LEVELS)
    first, second = measure(BENCHMARK, [euler, epd(2, afs=False)], fine)
    assert first.rmse == pytest.approx(second.rmse, rel=1e-12)


def as_seen(candidate: Candidate) -> Tensor:
    """The features of a candidate's images, as their bytes."""
    batches = generate(BENCHMARK.backend, candidate.sampler, BENCHMARK.jobs, batch=3)
    images = torch.cat([batch.images for batch in batches])
    return features((to_bytes(images).float() / 255).expand(-1, 3, -1, -1)).double()


def test_frechet_distances_are_of_all_images_as_their_bytes(fine: Fine) -> None:
    """To statistics that are given, and to the fine solution's own images."""
    fixed, free = reference(), FrechetReference(reference().space)
    (score,) = measure(BENCHMARK, [heun(2)], fine, [fixed])
    mine, theirs = statistics_of(as_seen(heun(2))), statistics_of(as_seen(BENCHMARK.fine))
    assert fixed.statistics
    assert score.frechet == pytest.approx(fixed.statistics.distance(mine), rel=1e-5)
    assert fine.score.frechet == pytest.approx(fixed.statistics.distance(theirs), rel=1e-5)
    (score,) = measure(BENCHMARK, [heun(2)], fine, [free])
    assert score.frechets[CHEAP].value == pytest.approx(theirs.distance(mine), rel=1e-4)
    assert measure(BENCHMARK, [heun(2)], fine)[0].frechet is None


def test_the_best_of_each_name_and_number_of_calls_is_that_of_least_error(fine: Fine) -> None:
    rivals = [c for n in (4, 6) for c in variants("euler", n, ("polynomial", "logsnr"), LEVELS)]
    scores = measure(BENCHMARK, rivals, fine)
    chosen = best(scores, rivals)
    assert [c.nfe for c in chosen] == [4, 6]
    for candidate in chosen:
        least = min((s for s in scores if s.nfe == candidate.nfe), key=lambda s: s.rmse)
        assert (candidate.schedule, candidate.sampler.afs) == (least.schedule, least.afs)


def test_candidates_that_solve_another_problem_are_refused(fine: Fine) -> None:
    sigmas = tuple(replace(LEVELS, sigma_min=0.01).grid("polynomial", 4).tolist())
    short = Candidate("short", replace(heun(3).sampler, sigmas=sigmas), "polynomial-7")
    guided = replace(heun(3), sampler=replace(heun(3).sampler, guidance_rate=4.0), source="g.pkl")
    with pytest.raises(ValueError, match=r"short ends at sigma 0\.01"):
        measure(BENCHMARK, [short], fine)
    with pytest.raises(ValueError, match=r"g\.pkl has the guidance rate 4"):
        measure(BENCHMARK, [guided], fine)
