"""What is compared: candidates make the calls that they are asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.generate import Job
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
from eval.measure import Study, measure, solve_finely
from solvers.epd import Directions
from solvers.multistep import MultistepTable
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


def save_multistep(folder: Path, k: int = 1, process: str = "ve") -> Path:
    """Three intervals of a multistep that copies the newest slope, on levels of its own."""
    n = 3
    newest = torch.zeros(n, 5, dtype=torch.float64)
    newest[:, 1] = 1
    newest[0] = torch.eye(5, dtype=torch.float64)[0]
    one = torch.ones(n, k, dtype=torch.float64)
    learned_table = MultistepTable(newest, one / 2, one / k, 0 * newest, one)
    sigmas = (80.0, 3.0, 0.4, 0.002) if process == "ve" else (1.0, 0.8, 0.3, 0.001)
    recipe = Recipe(
        num_steps=n + 1,
        num_points=k,
        solver="epd-multistep",
        schedule_type="custom",
        sigmas=sigmas,
        process=process,
        scale_dir=0.0,
    )
    folder.mkdir(exist_ok=True)
    path = folder / "predictor.pkl"
    save_predictor(Predictor(learned_table, recipe), path)
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


def test_a_predictor_with_known_slopes_says_so(tmp_path: Path) -> None:
    path, known = tmp_path / "a.pkl", torch.ones(2, 1)
    recipe = Recipe(num_steps=3, num_points=2, afs=True)
    save_predictor(Predictor(replace(table(2, 2), known=known), recipe), path)
    assert [c.name for c in learned([path], exact())] == ["epd+known K=2"]


def test_two_predictors_of_one_kind_are_told_apart_by_their_files(tmp_path: Path) -> None:
    found = learned([save(tmp_path, "first"), save(tmp_path, "second")], exact())
    assert [c.name for c in found] == ["epd K=2 (first)", "epd K=2 (second)"]


def test_runs_of_one_kind_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [save_multistep(tmp_path / name) for name in ("one", "two")]
    names = [c.name for c in learned(paths, exact())]
    assert names == ["epd-multistep K=1 (one)", "epd-multistep K=1 (two)"]


def test_files_of_one_name_in_folders_of_one_name_are_told_apart_by_their_paths(
    tmp_path: Path,
) -> None:
    for top in ("a", "b"):
        (tmp_path / top).mkdir()
    paths = [save_multistep(tmp_path / top / "run") for top in ("a", "b")]
    assert len({c.name for c in learned(paths, exact())}) == 2


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("process", ["ve", "flow"])
def test_parallel_multistep_on_levels_of_its_own_makes_a_call_an_interval(
    tmp_path: Path, points: int, process: str
) -> None:
    backend = exact() if process == "ve" else exact_flow()
    (found,) = learned([save_multistep(tmp_path / "run", points, process)], backend)
    assert (found.name, found.nfe) == (f"epd-multistep K={points}", 3)
    assert (found.schedule, found.points, found.method.afs) == ("custom", points, False)
    study = Study(backend, (Job(0), Job(1)), fine_solution(backend.levels, 8), 2)
    (score,) = measure(study, [found], solve_finely(study))
    assert (score.nfe, score.rows) == (3, 3 * points)
    assert 0 < score.rmse < 5


def test_parallel_multistep_for_the_other_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not for a ve model"):
        learned([save_multistep(tmp_path / "run", process="flow")], exact())


def test_a_grid_that_ends_elsewhere_is_not_compared(tmp_path: Path) -> None:
    backend = exact()
    (found,) = learned([save_multistep(tmp_path / "run")], backend)
    method = replace(found.method, sigmas=found.method.sigmas.clamp(min=0.01))
    study = Study(backend, (Job(0),), fine_solution(backend.levels, 8), 1)
    with pytest.raises(ValueError, match="ends at sigma"):
        measure(study, [replace(found, method=method)], solve_finely(study))


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
