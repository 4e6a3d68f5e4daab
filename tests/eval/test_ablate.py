"""With and without each part: what is told, and the command as a whole on a small mixture."""

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from eval import ablate as module
from eval.ablate import ALONE, Cell, Row, cells, main, text
from solvers.predictor import load_predictor
from src.files import read_json
from tests.eval.small import here, save_mixture


@pytest.mark.parametrize(
    ("solver", "nfe", "flow", "steps", "afs"),
    [
        ("epd", 5, False, 4, "--afs"),
        ("epd", 4, False, 3, "--no-afs"),
        ("epd", 4, True, 3, "--no-afs"),
        ("epd-ipndm", 9, False, 6, "--afs"),
        ("epd-multistep", 5, False, 6, "--no-afs"),
        ("epd-heun", 8, False, 4, "--afs"),
    ],
)
def test_the_grid_makes_the_calls_that_are_asked_for(
    solver: str, nfe: int, flow: bool, steps: int, afs: str
) -> None:
    told = Cell(solver, 2, "grid", nfe).options(is_flow=flow)
    assert told[told.index("--num_steps") + 1] == str(steps)
    assert told[-1] == afs


@pytest.mark.parametrize(("solver", "nfe"), [("epd", 5), ("epd-heun", 4)])
def test_calls_that_do_not_come_out_are_refused(solver: str, nfe: int) -> None:
    with pytest.raises(ValueError, match=f"{solver} cannot make {nfe} calls"):
        Cell(solver, 2, "grid", nfe).options(is_flow=True)


def test_a_base_alone_is_there_once_and_multistep_knows_its_slopes_anyway() -> None:
    found = cells(["epd", "epd-multistep"], [1, 2], [ALONE, "known"], [5])
    assert found == [Cell("epd", 1, ALONE, 5), *(Cell("epd", k, "known", 5) for k in (1, 2))]


def test_a_misspelt_variant_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean greedy"):
        cells(["epd"], [1], ["gredy"], [5])


def test_the_best_of_each_number_of_calls_has_a_star() -> None:
    rows = [Row(5, "epd", 1, "grid", 5, 0.2, 1), Row(5, "epd", 2, "grid", 8, 0.1, 1)]
    rows += [Row(9, "epd", 2, "grid", 8, 0.3, 1), Row(9, "epd-x", 2, "grid", note="cannot")]
    lines = text(rows).splitlines()[2:]
    assert ["*" in line for line in lines] == [False, True, True, False]
    assert lines[3].endswith("cannot")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "distil", lambda told: here("train_distill.py", told))
    return save_mixture(tmp_path / "m")


def command(model: Path, *options: str) -> Result:
    common = ["--model", str(model), "--device", "cpu", "--outdir", str(model.parent / "out")]
    common += ["--seeds", "0-15", "--fine", "16", "--nfe", "5"]
    common += ["--distil", "--total_kimg 0.016 --batch 8 --validation 8 --fine_steps 9"]
    return CliRunner().invoke(main, [*common, *options])


def test_every_part_is_tried_and_the_predictors_kept(model: Path) -> None:
    wanted = ["--solvers", "epd,epd-multistep", "--points", "1"]
    done = command(model, *wanted, "--variants", "greedy,refined,grid,known")
    assert done.exit_code == 0, done.output
    out = model.parent / "out"
    rows = read_json(out / "results.json")["rows"]
    epd, multistep = rows[:4], rows[4:]
    assert [r["variant"] for r in epd] == ["greedy", "refined", "grid", "known"]
    assert [r["variant"] for r in multistep] == ["greedy", "refined", "grid"]
    assert all(r["rmse"] > 0 and r["rows"] == 5 and not r["note"] for r in rows)
    kept = [load_predictor(p) for p in sorted((out / "predictors").glob("*.pkl"))]
    assert {(p.nfe, p.recipe.num_points) for p in kept} == {(5, 1)}
    custom = [p.recipe.schedule_type == "custom" for p in kept]
    assert sum(custom) == 3  # where the grid is learned
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        assert [float(r["rmse"]) for r in csv.DictReader(file)] == [r["rmse"] for r in rows]


def test_the_plug_in_study_has_the_bases_alone_and_the_refusal(model: Path) -> None:
    done = command(model, "--study", "plug-in", "--distil", "--total_kimg 0.008 --batch 8 --M 3")
    assert done.exit_code == 0, done.output
    rows = read_json(model.parent / "out/results.json")["rows"]
    alone = {r["solver"]: r for r in rows if r["variant"] == ALONE}
    assert list(alone) == ["euler", "ipndm", "dpmpp", "unipc"]
    assert {r["rows"] for r in alone.values()} == {5}
    by_solver = {r["solver"]: r for r in rows if r["variant"] == "grid"}
    assert {s for s, r in by_solver.items() if r["rmse"]} == {"epd", "epd-ipndm", "epd-dpmpp"}
    assert "EPD cannot stand on unipc" in by_solver["epd-unipc"]["note"]
    assert "EPD cannot stand on unipc" in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--points", "0"], "--points '0' is no number from 1 on"),
        (["--solvers", "epd-eulr", "--variants", "grid"], "did you mean euler"),
        (["--variants", "gredy"], "did you mean greedy"),
    ],
)
def test_what_cannot_be_tried_is_an_error(model: Path, options: list[str], said: str) -> None:
    done = command(model, *options)
    assert done.exit_code == 1
    assert said in done.output.strip().splitlines()[-1]
