"""What a comparison is, and the files that it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import SCHEDULES as KNOWN
from eval import report
from eval.candidates import SCHEDULES, Candidate, variants
from eval.curves import plot
from eval.machine import provenance
from eval.measure import Fine, Judge, Rewards, Score, Study, best, measure, solve_finely
from eval.page import Page, drawn_tables, html, strips
from eval.prompted import meanings
from solvers.catalog import make_solver
from src.files import write_json, write_text

CHOOSE_ON = 64
MEANING = {
    "rmse": "to the fine solution of the same seeds, over all numbers of the latents "
    "(pixels in [-1, 1] for pixel models)",
    "nfe": "network calls one after another for an image; guidance is not counted",
    "rows": "evaluations of the network for an image, each of the K points counted",
    "frechet": "on EfficientNet-lite0 features; biased upwards at small numbers of images, so "
    "compare within this table only",
    "intervals": "95 %, by the bootstrap over images (resampled 4000 times)",
    "time": "sampling a batch, in bare network calls of that batch timed just before it; "
    "median over the batches",
}


@dataclass(frozen=True)
class Comparison:
    """Scores, best schedules chosen, and the fine solution they were held against."""

    scores: list[Score]
    fine: Fine
    candidates: list[Candidate]  # of the scores


def compare(
    study: Study,
    fixed: Sequence[Candidate],
    rivals: Sequence[Candidate] = (),
    *,
    judge: Judge | None = None,
    rewards: Rewards | None = None,
    choose_on: int = CHOOSE_ON,
) -> Comparison:
    """Measure `fixed` candidates, and of the `rivals` the best of each name and NFE.

    The best has the least RMSE on the first `choose_on` jobs. Raises ValueError for candidates
    that solve another problem than the study's fine solution.
    """
    fine = solve_finely(study, judge, rewards)
    chosen = list(rivals)
    if len({(c.name, c.nfe) for c in rivals}) < len(rivals):
        few = replace(study, jobs=study.jobs[:choose_on])
        chosen = best(measure(few, rivals, fine), rivals)
    every = [*chosen, *fixed]
    return Comparison(measure(study, every, fine, judge, rewards=rewards), fine, every)


def rivals_for(
    solvers: Sequence[str], nfes: Sequence[int], schedules: Sequence[str], study: Study
) -> list[Candidate]:
    """Every hand-made candidate of these solvers, calls and schedules (["best"]: the usual).

    Combinations that do not exist are left out. ValueError for unknown names.
    """
    levels, rate = study.backend.levels, study.fine.method.guidance_rate
    unknown = [name for name in schedules if name not in ("best", *KNOWN)]
    if unknown or not schedules:
        raise ValueError(f"unknown schedule {unknown}: choose best or from {', '.join(KNOWN)}")
    for solver in solvers:
        make_solver(solver)
    if "best" in schedules:
        schedules = (*SCHEDULES[levels.process.name], *(("discrete",) if levels.timesteps else ()))
    return [
        candidate
        for solver in solvers
        for nfe in nfes
        for candidate in variants(solver, nfe, schedules, levels, rate)
    ]


def write_summary(outdir: Path, result: Comparison, study: Study) -> str:
    """The tables as text, in results.txt too."""
    parts = [f(result.scores) for f in (report.table, report.pivot, report.ratios)]
    text = "\n\n".join(part for part in (*parts, summary(study, result.fine)) if part)
    write_text(outdir / "results.txt", text + "\n")
    return text


def write_page(
    outdir: Path, result: Comparison, study: Study, settings: Mapping[str, Any], shown: int
) -> None:
    """report.html, with the first `shown` images of every candidate."""
    about = provenance(study.backend.device)
    facts = {"images": str(len(study.jobs)), "fine solution": described_fine(study)}
    facts |= {name: plain(value) for name, value in {**settings, **about}.items() if value}
    fine, scores = result.fine.score, result.scores
    page = Page(
        title=f"{settings['model']}: solvers by the number of calls",
        facts=facts,
        scores=scores,
        fine=fine,
        curves=outdir / "results.png",
        strips=strips(study, result.candidates, shown),
        jobs=study.jobs[:shown],
        tables=drawn_tables(result.candidates),
        meaning={**MEANING, **meanings(report.reward_names(scores))},
    )
    write_text(outdir / "report.html", html(page))


def plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {of}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def summary(study: Study, fine: Fine) -> str:
    """What the figures of a table are held against, for people."""
    distance = report.number(fine.score.frechet)
    return (
        f"{len(study.jobs)} images. Fine solution: {described_fine(study)}, its Frechet distance "
        f"{distance}.\nRMSE is over the latents (pixels in [-1, 1] for pixel models); Frechet "
        f"distances are biased upwards at few images: compare within this table only."
    )


def described_fine(study: Study) -> str:
    """The fine solution in words."""
    steps = len(study.fine.method.sigmas) - 1
    return f"{study.fine.name} in {steps} steps on {study.fine.schedule} ({study.fine.nfe} calls)"


def write_results(
    outdir: Path, result: Comparison, study: Study, settings: Mapping[str, Any]
) -> None:
    """results.csv, results.json and results.png; `settings` go into the JSON as they are.

    Where they hold "real_images", the Frechet distance of real ones, the plot shows it.
    """
    about = {
        **settings,
        "images": len(study.jobs),
        "batch": study.batch,
        "fine": described_fine(study),
        "chosen_on": f"the first {min(CHOOSE_ON, len(study.jobs))} images",
        "meaning": MEANING,
        **provenance(study.backend.device),
    }
    rows = [asdict(score) for score in result.scores]
    write_json(
        outdir / "results.json",
        {"about": about, "fine": asdict(result.fine.score), "scores": rows},
    )
    report.write_csv(outdir / "results.csv", result.scores)
    lines = {
        "fine solution": result.fine.score.frechet,
        "real images": settings.get("real_images"),
    }
    floor = {name: distance for name, distance in lines.items() if distance is not None}
    title = f"{settings['model']}, {len(study.jobs)} images, against {described_fine(study)}"
    plot(outdir / "results.png", result.scores, title, floor, result.fine.score)


def runs_of(seeds: Sequence[int]) -> str:
    """Seeds as they are written: [0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, run)) for run in runs)
