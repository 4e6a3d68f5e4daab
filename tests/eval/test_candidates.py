"""What is compared: candidates make the calls that they are asked for."""

from pathlib import Path

import pytest
import torch

from backends.methods import HandMade
from eval.candidates import (
    SCHEDULES,
    SOLVERS,
    fine_solution,
    hand_made,
    learned,
    predictor_files,
    variants,
)
from solvers.epd import Directions
from solvers.predictor import Predictor, Recipe, save_predictor
from tests.eval.small import exact, exact_flow


def table(n: int, k: int) -> Directions:
    ones = torch.ones(n, k, dtype=torch.float64)
    return Directions(ones / 2, ones / k, ones, ones)


def save(folder: Path, name: str, base: str = "euler", k: int = 2, steps: int = 3) -> Path:
    recipe = Recipe(num_steps=steps, num_points=k, base=base, afs=True, max_order=2)
    path = folder / f"{name}.pkl"
    save_predictor(Predictor(table(steps - 1, k), recipe), path)
    return path


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nfe", [3, 4, 5, 9])
def test_every_variant_makes_the_calls_that_it_should(solver: str, nfe: int) -> None:
    found = variants(solver, nfe, SCHEDULES["ve"], exact().levels)
    assert found
    assert {c.nfe for c in found} == {nfe}


def test_a_solver_of_one_call_has_each_schedule_without_afs_and_with_it() -> None:
    found = variants("euler", 5, SCHEDULES["ve"], exact().levels)
    kinds = {(c.schedule, c.method.afs) for c in found}
    schedules = ("polynomial-7", "logsnr", "time_uniform-1")
    assert kinds == {(s, afs) for s in schedules for afs in (False, True)}


def test_on_one_schedule_afs_is_there_only_where_the_calls_need_it() -> None:
    levels = exact().levels
    afs = {n: [c.method.afs for c in variants("heun", n, ["polynomial"], levels)] for n in (4, 5)}
    assert afs == {4: [False], 5: [True]}
    assert [c.method.afs for c in variants("euler", 5, ["polynomial"], levels)] == [False]


def test_flow_matching_has_no_afs_and_so_no_odd_heun() -> None:
    levels = exact_flow().levels
    assert variants("heun", 5, SCHEDULES["flow"], levels) == []
    assert not any(c.method.afs for c in variants("euler", 5, SCHEDULES["flow"], levels))


def test_the_fine_solution_makes_two_calls_a_step() -> None:
    assert fine_solution(exact().levels, 64).nfe == 128


def test_candidates_carry_the_guidance() -> None:
    assert fine_solution(exact().levels, 4, 3.0).method.guidance_rate == 3
    (found,) = variants("euler", 3, ["logsnr"], exact().levels, 3.0)
    assert found.method.guidance_rate == 3


def test_predictors_are_named_by_kind_base_and_k_in_the_order_of_their_calls(
    tmp_path: Path,
) -> None:
    paths = [
        save(tmp_path, "a", steps=4),
        save(tmp_path, "b", base="ipndm"),
        save(tmp_path, "c", k=1),
    ]
    found = [(c.name, c.nfe, c.points) for c in learned(paths, exact())]
    assert found == [("epd K=1", 3, 1), ("epd-ipndm K=2", 3, 2), ("epd K=2", 5, 2)]


def test_two_predictors_of_one_kind_are_told_apart_by_their_files(tmp_path: Path) -> None:
    found = learned([save(tmp_path, "first"), save(tmp_path, "second")], exact())
    assert [c.name for c in found] == ["epd K=2 (first)", "epd K=2 (second)"]


def test_a_predictor_for_another_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="32 pixels"):
        learned(predictor_files(["cifar10-3nfe"]), exact())


def test_patterns_names_and_paths_find_predictors_once(tmp_path: Path) -> None:
    path = save(tmp_path, "one")
    save(tmp_path, "two")
    found = predictor_files([str(path), str(tmp_path / "*.pkl"), "cifar10-3nfe"])
    assert [p.name for p in found] == ["one.pkl", "two.pkl", "cifar10-3nfe.pkl"]


@pytest.mark.parametrize("pattern", ["nowhere/*.pkl", "no-such-predictor"])
def test_a_pattern_that_finds_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"no predictor|no file"):
        predictor_files([pattern])


def test_a_schedule_is_named_with_its_exponent() -> None:
    levels = exact().levels
    assert hand_made(HandMade("euler", 4, "time_uniform", 2), levels).schedule == "time_uniform-2"
