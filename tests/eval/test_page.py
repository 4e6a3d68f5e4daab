"""The page of a comparison: what is in it, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch

from backends.generate import Job
from eval.measure import Score
from eval.page import Page, Strip, html
from eval.report import number
from src.images import png_bytes, read_png
from src.intervals import Estimate

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
CHECK = """<script>
const pictures = [...document.images];
document.body.dataset.found = JSON.stringify({
  pictures: pictures.length,
  broken: pictures.filter(one => !one.complete || !one.naturalWidth).length,
  wide: document.documentElement.scrollWidth > innerWidth,
  outside: [...document.querySelectorAll('[src],[href]')]
    .filter(one => !one.src.startsWith('data:')).length,
  scripts: document.scripts.length - 1,
  bold: [...document.querySelectorAll('td.best')].map(one => one.textContent),
});
</script>"""


def score(name: str, nfe: int, rmse: float, clip: float) -> Score:
    estimate = Estimate(clip, clip - 0.01, clip + 0.01)
    gain = Estimate(clip - 0.3, clip - 0.31, clip - 0.29)
    source = "x.pkl" if "epd" in name else None
    return Score(
        *(name, nfe, "polynomial-7", False, 1, float(nfe), rmse, None, 3.0, source),
        rmse_low=rmse / 2,
        rmse_high=rmse * 2,
        rewards={"clip": estimate},
        gains={"clip": gain},
    )


def picture(seed: int) -> bytes:
    drawn = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(seed))
    return png_bytes(drawn)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    curves = tmp_path / "curves.png"
    curves.write_bytes(picture(0))
    names = [(n, calls) for calls in (3, 5) for n in ("euler", "epd K=2")]
    scores = [
        score(name, nfe, 0.8 / nfe * (2 - (name != "euler")), 0.2 + 0.01 * nfe)
        for name, nfe in names
    ]
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Page(
        title="a model <b>: solvers",
        facts={"seeds": "0-7"},
        scores=scores,
        fine=replace(scores[0], name="heun", rewards={"clip": Estimate(0.3, 0.29, 0.31)}),
        curves=curves,
        strips=[*(Strip(n, nfe, images) for n, nfe in names), Strip("heun", 64, images)],
        jobs=[Job(0, "a red fox"), Job(1, "<script>alert(1)</script>")],
        tables={"epd K=2, 3 calls": picture(2), "epd K=2, 5 calls": picture(3)},
        meaning={"clip": "a cosine"},
    )


def test_every_figure_is_in_it_with_its_interval(page: Page) -> None:
    text = unescape(re.sub(r"<[^>]*>", "", html(page)))
    for one in page.scores:
        assert f"{number(one.rmse)} [{number(one.rmse_low)}, {number(one.rmse_high)}]" in text
    assert "RMSE to the fine solution: lower is better." in text
    assert "The fine solution has 0.3000 [0.2900, 0.3100]." in text


def test_what_comes_from_outside_is_text_and_no_markup(page: Page) -> None:
    assert "<script" not in html(page)
    assert "<title>a model &lt;b&gt;: solvers</title>" in html(page)


def test_a_line_that_was_not_measured_at_some_calls_has_an_empty_cell(page: Page) -> None:
    few = replace(page, scores=page.scores[:3])
    assert html(few).count("<td></td>") == 3  # of the error, the reward and the gain


def browse(file: Path, *options: str) -> str:
    assert BROWSER
    profile = f"--user-data-dir={file.parent / 'profile'}"
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", profile, *options, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browser_shows_all_pictures_and_needs_no_other_file(page: Page, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html(page).replace("</body>", f"{CHECK}</body>"))
    size = "--window-size=1200,1400"
    shown = browse(tmp_path / "report.html", "--dump-dom", "--virtual-time-budget=2000", size)
    told = re.search(r'data-found="([^"]*)"', shown)
    assert told
    found = json.loads(unescape(told[1]))
    assert found.pop("bold") == [
        *("0.2667 [0.1333, 0.5333]", "0.1600 [0.08000, 0.3200]"),  # the least error of each
        *("0.2300 [0.2200, 0.2400]", "0.2500 [0.2400, 0.2600]") * 2,  # two alike are both best
        *("-0.07000 [-0.08000, -0.06000]", "-0.05000 [-0.06000, -0.04000]") * 2,
    ]
    pictures = 1 + len(page.strips) + 1 + len(page.tables)  # the fine one under both calls
    assert found == {
        "pictures": pictures,
        "broken": 0,
        "wide": False,
        "outside": 0,
        "scripts": 0,
    }


@pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browsers_screenshot_has_headings_tables_and_colours(page: Page, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html(page))
    target = tmp_path / "shot.png"
    browse(tmp_path / "report.html", f"--screenshot={target}", "--window-size=1200,1400")
    seen, _ = read_png(target)
    assert seen.shape == (3, 1400, 1200)
    rows = (seen.mean(0) < 0.5).any(1)
    assert 0.2 < rows.float().mean() < 0.95  # lines of text and pictures, and white between
    assert (seen.amax(0) - seen.amin(0) > 0.3).sum() > 2000  # the pictures' colours
