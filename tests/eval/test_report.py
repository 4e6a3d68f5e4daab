"""Tables, CSV and plots of scores."""

import csv
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.curves import SIZE, plot, spread
from eval.measure import Score
from eval.report import aligned, number, pivot, ratios, table, write_csv
from src.images import read_png
from src.intervals import Estimate


def score(name: str, nfe: int, rmse: float, frechet: float | None = None) -> Score:
    source = "x.pkl" if "epd" in name else None
    return Score(name, nfe, "logsnr", False, 1, float(nfe), rmse, frechet, nfe * 1.1, source)


def with_reward(of: Score, value: float) -> Score:
    estimate = Estimate(value, round(value - 0.1, 9), round(value + 0.1, 9))
    return replace(of, rewards={"clip": estimate}, gains={"clip": estimate})


SCORES = [
    score("euler", 3, 0.5, 30.0),
    score("euler", 5, 0.2, 20.0),
    score("epd K=2", 3, 0.1, 31.5),
    score("epd K=2", 5, 0.05, 12.25),
]


def test_columns_line_up() -> None:
    lines = aligned([("a", "b"), ("long name", "1"), ("c", "22.5")]).splitlines()
    assert lines == ["a             b", "---------------", "long name     1", "c          22.5"]


def test_the_table_has_a_line_for_every_score() -> None:
    lines = table(SCORES).splitlines()
    assert len(lines) == 2 + len(SCORES)
    assert lines[2].split() == ["euler", "3", "0.5000", "30.00", "logsnr", "no", "3", "3.30"]


def test_the_pivot_stars_the_best_of_each_column() -> None:
    lines = pivot(SCORES).splitlines()
    assert lines[2].split() == ["euler", "0.5000", "0.2000", "30.00*", "20.00", "3/5"]
    assert lines[3].split() == ["epd", "K=2", "0.1000*", "0.05000*", "31.50", "12.25*", "3/5"]


def test_what_is_absent_has_a_line_of_dashes() -> None:
    lines = pivot(SCORES[:2], absent=("epd",)).splitlines()
    assert lines[-1].split() == ["epd", "-", "-", "-", "-", "-/-"]


def test_the_ratios_name_the_best_of_each_kind_and_what_it_evaluates() -> None:
    single = replace(score("epd K=1", 3, 0.25), source="y.pkl", rows=2.0)
    worse = replace(score("epd K=3", 3, 0.3), source="z.pkl", points=3, rows=9.0)
    double = replace(SCORES[2], points=2, rows=5.0)
    rival = score("ipndm", 3, 0.4)
    head, _, line = ratios([*SCORES[:2], rival, single, double, worse]).splitlines()
    assert head.split()[-3:] == ["learned", "/", "hand-made"]
    assert line.split() == [
        *("3", "epd", "K=2", "0.1000", "5", "epd", "K=1", "0.2500", "2", "ipndm", "0.4000", "3"),
        "0.250",
    ]


def test_there_is_no_ratio_of_one_kind_alone() -> None:
    assert ratios(SCORES[:2]) == ratios(SCORES[2:]) == ratios([]) == ""


def test_without_a_learned_solver_of_one_point_its_place_has_a_dash() -> None:
    (*_, line) = ratios([SCORES[0], replace(SCORES[2], points=2)]).splitlines()
    assert line.split()[5:7] == ["-", "-"]


def test_an_error_that_is_no_number_is_never_the_best() -> None:
    (*_, line) = ratios([score("euler", 3, float("nan")), *SCORES]).splitlines()[:3]
    assert line.split()[-1] == "0.200"


def test_what_was_not_measured_is_a_dash() -> None:
    assert number(None) == "-"
    *_, line = pivot([score("euler", 3, 0.5)]).splitlines()
    assert line.split() == ["euler", "0.5000*", "-", "3"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30).map(sorted))
def test_labels_are_moved_apart_and_stay_in_the_panel(places: list[float]) -> None:
    found = spread(places, 0.05)
    gap = min(0.05, 1 / max(len(places) - 1, 1))
    assert all(b - a > gap - 1e-9 for a, b in pairwise(found))
    assert found[0] > -1e-9
    assert found[-1] < 1 + 1e-9


def test_labels_that_overlap_move_apart_around_their_middle() -> None:
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.0, 0.0], 0.1) == pytest.approx([0, 0.1])


def test_labels_that_do_not_touch_stay_where_they_are() -> None:
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])


def test_the_csv_holds_every_field_of_every_score(tmp_path: Path) -> None:
    write_csv(tmp_path / "r.csv", SCORES)
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["rmse"]) for row in rows] == [s.rmse for s in SCORES]
    assert set(rows[0]) == asdict(SCORES[0]).keys() - {"rewards", "gains"}


def test_the_csv_has_three_columns_a_reward(tmp_path: Path) -> None:
    write_csv(tmp_path / "r.csv", [SCORES[0], with_reward(SCORES[1], 0.25)])
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [[row[name] for name in ("clip", "clip_low", "clip_high")] for row in rows]
    assert found == [["", "", ""], ["0.25", "0.15", "0.35"]]


def test_the_table_has_intervals_of_what_has_some() -> None:
    score = replace(with_reward(SCORES[0], 0.25), rmse_low=0.4, rmse_high=0.6)
    line = table([score]).splitlines()[2]
    assert "0.5000 [0.4000, 0.6000]" in line
    assert "0.2500 [0.1500, 0.3500]" in line


@pytest.mark.parametrize("with_distance", [True, False])
def test_the_plot_is_a_picture(tmp_path: Path, with_distance: bool) -> None:
    scores = SCORES if with_distance else [score("euler", 3, 0.5), score("heun", 3, 5.0)]
    panels = 2 if with_distance else 1
    plot(tmp_path / "p.png", scores, "title", {"real images": 9.0})
    picture, _ = read_png(tmp_path / "p.png")
    assert picture.shape[0] == 3
    assert picture.shape[2] / picture.shape[1] == pytest.approx(SIZE[0] * panels / SIZE[1], 0.01)
    assert picture.std() > 0.02


def test_rewards_have_panels_of_their_own_whatever_their_sign(tmp_path: Path) -> None:
    scores = [
        with_reward(s, value) for s, value in zip(SCORES, (-0.5, 0.0, 0.1, 0.2), strict=True)
    ]
    plot(tmp_path / "p.png", scores, "title", {}, scores[0])
    picture, _ = read_png(tmp_path / "p.png")
    assert picture.shape[1] / picture.shape[2] == pytest.approx(2 * SIZE[1] / (2 * SIZE[0]), 0.01)
    assert (picture[:, picture.shape[1] // 2 :, : picture.shape[2] // 2].std()) > 0.02
