"""Errors against the fine solution, on a backend where everything is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.methods import HandMade
from eval.candidates import Candidate, fine_solution, hand_made, variants
from eval.frechet import moments
from eval.measure import Fine, Study, best, measure, solve_finely
from solvers.epd import Directions
from tests.eval.small import exact, judge, rebatched, study

STUDY = study()


@pytest.fixture(scope="module")
def fine() -> Fine:
    return solve_finely(STUDY, judge())


def heun(steps: int) -> Candidate:
    return hand_made(HandMade("heun", steps + 1, "polynomial"), STUDY.backend.levels)


def epd(k: int) -> Candidate:
    """EPD that is Euler: all its points at x itself."""
    euler = hand_made(HandMade("euler", 4, "polynomial", afs=True), STUDY.backend.levels)
    ones = torch.ones(3, k, dtype=torch.float64)
    table = Directions(0 * ones, ones / k, ones, ones)
    return replace(euler, name="epd", method=replace(euler.method, table=table), points=k)


def test_the_fine_solution_is_at_no_distance_from_itself(fine: Fine) -> None:
    assert measure(STUDY, [STUDY.fine], fine)[0].rmse == 0


def test_the_error_is_the_root_of_the_mean_square_over_all_numbers(fine: Fine) -> None:
    moved = replace(fine, latents=fine.latents + 0.25)
    assert measure(STUDY, [STUDY.fine], moved)[0].rmse == pytest.approx(0.25, rel=1e-12)


def test_the_error_falls_with_the_square_of_the_steps_of_heun(fine: Fine) -> None:
    coarse, half = (s.rmse for s in measure(STUDY, [heun(20), heun(40)], fine))
    assert 3 < coarse / half < 6


def test_the_error_does_not_hang_on_the_batch(fine: Fine) -> None:
    found = {b: measure(rebatched(STUDY, b), [heun(5)], fine)[0].rmse for b in (1, 3, 8)}
    assert found[1] == pytest.approx(found[3], rel=1e-9) == pytest.approx(found[8], rel=1e-9)


def test_calls_and_evaluations_are_counted_apart(fine: Fine) -> None:
    found = measure(STUDY, [heun(3), epd(1), epd(3)], fine)
    assert [(s.nfe, s.rows, s.points) for s in found] == [(6, 6, 1), (5, 5, 1), (5, 11, 3)]


def test_a_table_that_stays_at_x_is_euler(fine: Fine) -> None:
    euler = hand_made(HandMade("euler", 4, "polynomial"), STUDY.backend.levels)
    without_afs = replace(epd(2), method=replace(epd(2).method, afs=False))
    first, second = measure(STUDY, [euler, without_afs], fine)
    assert first.rmse == pytest.approx(second.rmse, rel=1e-12)


def test_the_distance_is_that_of_all_images_as_their_bytes(fine: Fine) -> None:
    (score,) = measure(STUDY, [STUDY.fine], fine, judge())
    features = judge().extract(fine.images.float() / 255)
    expected = judge().reference.distance(moments(features))
    assert score.frechet == pytest.approx(expected, rel=1e-9)
    assert fine.score.frechet == pytest.approx(expected, rel=1e-9)


def test_without_a_judge_there_is_no_distance(fine: Fine) -> None:
    assert measure(STUDY, [heun(2)], fine)[0].frechet is None


def test_time_is_in_calls_of_the_network(fine: Fine) -> None:
    assert measure(STUDY, [heun(2)], fine)[0].time > 0


def test_the_best_of_each_name_and_number_of_calls_is_that_of_least_error(fine: Fine) -> None:
    schedules = ("polynomial", "logsnr")
    levels = STUDY.backend.levels
    rivals = [c for n in (4, 6) for c in variants("euler", n, schedules, levels)]
    scores = measure(STUDY, rivals, fine)
    chosen = best(scores, rivals)
    assert [c.nfe for c in chosen] == [4, 6]
    for candidate in chosen:
        least = min((s for s in scores if s.nfe == candidate.nfe), key=lambda s: s.rmse)
        assert (candidate.schedule, candidate.method.afs) == (least.schedule, least.afs)


def test_a_candidate_that_ends_elsewhere_is_refused(fine: Fine) -> None:
    other = exact().levels.grid("polynomial", 4, sigma_min=0.01)
    candidate = Candidate("short", replace(heun(3).method, sigmas=other), "polynomial-7")
    with pytest.raises(ValueError, match=r"short ends at sigma 0\.01"):
        measure(STUDY, [candidate], fine)


def test_a_candidate_under_other_guidance_is_refused(fine: Fine) -> None:
    method = replace(heun(3).method, guidance_rate=4.0)
    candidate = Candidate("guided", method, "polynomial-7", source=str(Path("g.pkl")))
    with pytest.raises(ValueError, match=r"g\.pkl has the guidance rate 4"):
        measure(STUDY, [candidate], fine)


def test_jobs_are_cut_into_batches_with_their_places() -> None:
    cut = Study(STUDY.backend, STUDY.jobs[:7], fine_solution(STUDY.backend.levels, 2), 3)
    assert [(at, len(part)) for at, part in cut.parts()] == [(0, 3), (3, 3), (6, 1)]
