"""Tables, CSV, curves and the page of a comparison."""

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import torch
from matplotlib.figure import Figure

from eval.measure import Frechet, Score
from eval.report import best_names, curves, metrics_of, page, ratios, table
from src.figures import png
from src.images import read_png
from src.stats import Estimate
from src.text import number


def score(name: str, nfe: int, rmse: float, frechet: float | None = None) -> Score:
    source = "x.pkl" if "epd" in name else None
    one = Score(name, nfe, "logsnr", False, 1, float(nfe), rmse, frechet, nfe * 1.1, source)
    return one if frechet is None else replace(one, frechets={"cheap": Frechet(frechet)})


def with_reward(of: Score, value: float) -> Score:
    estimate = Estimate(value, round(value - 0.1, 9), round(value + 0.1, 9))
    return replace(of, rewards={"clip": estimate}, gains={"clip": estimate})


SCORES = [
    score("euler", 3, 0.5, 30.0),
    score("euler", 5, 0.2, 20.0),
    score("epd K=2", 3, 0.1, 31.5),
    score("epd K=2", 5, 0.05, 12.25),
]


def test_the_table_has_a_line_for_every_score_with_what_was_measured_of_it() -> None:
    lines = table(SCORES).splitlines()
    assert len(lines) == 2 + len(SCORES)
    assert lines[2].split() == ["euler", "3", "0.5000", "30.00", "logsnr", "no", "3", "3.30"]
    one = replace(with_reward(SCORES[0], 0.25), rmse_low=0.4, rmse_high=0.6)
    one = replace(one, frechets={"cheap": Frechet(51.2, 0.31, True), "other": Frechet(9.0)})
    line = table([one]).splitlines()[2]
    assert "0.5000 [0.4000, 0.6000]  51.20 +-0.31, trained on" in line
    assert "9.000  0.2500 [0.1500, 0.3500]" in line
    *_, bare = table([score("euler", 3, 0.5), with_reward(SCORES[0], 0.2)]).splitlines()[:3]
    assert bare.split()[:5] == ["euler", "3", "0.5000", "-", "-"]
    assert number(None) == "-"


def test_the_ratios_name_the_best_of_each_kind_and_what_it_evaluates() -> None:
    single = replace(score("epd K=1", 3, 0.25), source="y.pkl", rows=2.0)
    worse = replace(score("epd K=3", 3, 0.3), source="z.pkl", points=3, rows=9.0)
    double = replace(SCORES[2], points=2, rows=3.0, evaluations=5.0)
    rivals = [score("ipndm", 3, 0.4), score("broken", 3, float("nan"))]
    rmse = metrics_of(SCORES)[0]
    head, _, line = ratios([*SCORES[:2], *rivals, single, double, worse], rmse).splitlines()
    assert head.endswith("RMSE: learned / hand-made")
    assert line.split() == [
        *("3", "epd", "K=2", "0.1000", "5", "epd", "K=1", "0.2500", "2", "ipndm", "0.4000", "3"),
        "0.250",
    ]
    (*_, line) = ratios([SCORES[0], replace(SCORES[2], points=2)], rmse).splitlines()
    assert line.split()[5:7] == ["-", "-"]
    assert ratios(SCORES[:2], rmse) == ratios(SCORES[2:], rmse) == ratios([], rmse) == ""


def test_a_distance_in_features_that_a_table_was_fitted_in_is_shown_and_not_compared() -> None:
    by_hand, fitted, honest = score("ipndm", 3, 0.4), score("a", 3, 0.3), score("b", 3, 0.3)
    scores = [
        replace(by_hand, frechets={"f": Frechet(50.0)}),
        replace(fitted, source="a.pkl", frechets={"f": Frechet(35.0, trained_on=True)}),
        replace(honest, source="b.pkl", frechets={"f": Frechet(60.0)}),
    ]
    (_, frechet) = metrics_of(scores)
    assert [frechet.cell(s) for s in scores] == ["50.00", "35.00, trained on", "60.00"]
    assert ratios(scores, frechet).split()[-1] == "1.200"
    assert ratios(scores[:2], frechet) == ""


def test_the_curves_are_a_picture_with_few_colours(tmp_path: Path) -> None:
    many = [score(f"solver-{i}", n, 0.6 + i / 10, 40.0 + i) for i in range(12) for n in (3, 5)]
    names = best_names([*SCORES, *many], metrics_of(SCORES))
    assert sorted(names) == ["epd K=2", "euler"]
    scores = [with_reward(s, v - 0.1) for v, s in enumerate([*SCORES, *many])]
    figure = curves(scores, "title", with_reward(score("heun", 64, 0.0, 9.0), 0.0))
    (tmp_path / "p.png").write_bytes(png(figure))
    assert read_png(tmp_path / "p.png")[0].std() > 0.02
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == ["epd K=2", "euler", "fine solution", "others"]


def test_every_figure_is_in_the_page_and_what_comes_from_outside_is_text() -> None:
    scores = [
        replace(with_reward(s, 0.2 + 0.01 * s.nfe), rmse_low=s.rmse / 2, rmse_high=s.rmse * 2)
        for s in SCORES
    ]
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    strips = [*((s.name, s.nfe, images) for s in scores), ("heun", 64, images)]
    drawing = Figure((1, 1))
    html = page(
        scores[:3],
        replace(scores[0], name="heun", rewards={"clip": Estimate(0.3, 0.29, 0.31)}),
        strips,
        {"epd K=2, 3 calls": drawing},
        drawing,
        title="a model <b>: solvers",
        facts={"seeds": "0-7"},
        meaning={"clip": "a cosine"},
        subjects="0: a red fox; 1: <script>alert(1)</script>",
    )
    text = unescape(re.sub(r"<[^>]*>", "", html))
    for error in ("0.5000 [0.2500, 1.000]", "0.2000 [0.1000, 0.4000]", "0.1000 [0.05000, 0.2000]"):
        assert error in text
    assert "RMSE: lower is better." in text
    assert "The fine solution has 0.3000 [0.2900, 0.3100]." in text
    assert "<script" not in html
    assert "<title>a model &lt;b&gt;: solvers</title>" in html
    assert html.count("<td></td>") == 4  # epd at 5 calls: error, distance, reward and gain
    assert html.count('<td class="best">0.1000') == 1
    assert html.count("data:image/png;base64,") == html.count("src=") == 1 + 4 + 2 + 1
