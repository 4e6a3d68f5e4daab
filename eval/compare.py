"""Solvers and predictors side by side, on any backend, by the number of sequential calls."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from torch import Tensor

from backends.base import Backend, ModelOptions
from backends.generate import Job, generate
from backends.load import find_model, load_backend, usual_size
from eval.features import load_space
from eval.fid import Statistics, check_space, load_statistics, save_statistics
from eval.machine import provenance
from eval.measure import (
    FINE_STEPS,
    SOLVERS,
    Benchmark,
    Candidate,
    Frechet,
    FrechetReference,
    Score,
    add_statistics,
    check_comparable,
    fine_solution,
    from_here,
    learned,
    measure,
    predictor_files,
    rivals_for,
)
from eval.report import curves, metrics_of, missing, page, ratios, table, write_csv
from rewards.fingerprint import source_hash, stamp
from rewards.registry import ADAPTERS, Setup, files_of, load_rewards, reads_texts
from rewards.scorer import check_rewards
from solvers.epd import EPD, Directions, ParallelMultistep
from solvers.predictor import load_predictor
from src import ranks
from src.figures import save, table_figure
from src.files import check_writable, to_json, write_json, write_text
from src.options import Device, DType, NamedPath, Names, Number, OneLineCommand, SeedList
from src.text import guidance_rates, number, read_prompts

CHOOSE_ON = 64
SETS = 3
SHOWN = 8
REFERENCE = "test-features.npz"
MEANING = {
    "rmse": "to the fine solution of the same seeds, over all numbers of the latents "
    "(pixels in [-1, 1] for pixel models)",
    "nfe": "network calls one after another for an image; guidance is not counted",
    "rows": "evaluations of the network for an image, each of the K points counted",
    "evaluations": "the same, and those of 'nothing' that guidance takes: at a rate of 1 none",
    "frechet": "biased upwards at small numbers of images, so compare within this table only; "
    "'trained on', and in no ratio and no curve, where the table was fitted in these features",
    "precision": "how many of its images are in features within reach of the fine solution's of "
    "other seeds of the same prompts, among their 3 neighbours; recall: how many of those are "
    "within reach of its own; none of prompts that have one image each",
    "intervals": "95 %, by the bootstrap over images (resampled 4000 times)",
    "time": "sampling a batch, in bare network calls of that batch timed just before it; "
    "median over the batches",
}


def jobs_for(
    backend: Backend, seeds: Sequence[int], prompts: Sequence[str], *, even: bool = False
) -> tuple[Job, ...]:
    """Each seed with its prompt, or without any with the backend's usual one.

    The i-th prompt is for the i-th seed, again from the first. `even` gives models by class as
    many images of each. ValueError for a model that takes no prompts.
    """
    usual = backend.usual_prompt(0)
    if prompts and not isinstance(usual, str):
        raise ValueError("--prompts: this model takes no texts: leave it out")
    if prompts:
        return tuple(Job(seed, prompts[i % len(prompts)]) for i, seed in enumerate(seeds))
    if even and isinstance(usual, int):
        drawn = [backend.usual_prompt(seed) for seed in range(10_000)]
        classes = sorted({label for label in drawn if isinstance(label, int)})
        return tuple(Job(seed, classes[i % len(classes)]) for i, seed in enumerate(seeds))
    return tuple(Job(seed, backend.usual_prompt(seed)) for seed in seeds)


def chosen(benchmark: Benchmark, rivals: Sequence[Candidate]) -> list[Candidate]:
    """Of each name and number of calls the one with the least RMSE on the first 64 jobs."""
    if len({(c.name, c.nfe) for c in rivals}) == len(rivals):
        return list(rivals)
    _, scores = measure(replace(benchmark, jobs=benchmark.jobs[:CHOOSE_ON]), rivals)
    winners: dict[tuple[str, int], tuple[float, Candidate]] = {}
    for score, candidate in zip(scores, rivals, strict=True):
        key = (score.name, score.nfe)
        error = score.rmse if math.isfinite(score.rmse) else math.inf
        if key not in winners or error < winners[key][0]:
            winners[key] = (error, candidate)
    return [candidate for _, candidate in winners.values()]


def with_sets(
    benchmark: Benchmark,
    results: Sequence[tuple[Candidate, Score]],
    references: Sequence[FrechetReference],
    sets: Sequence[Sequence[Job]],
    cache: Path,
    about: Sequence[Any],
) -> list[Score]:
    """The scores with Frechet distances that are means over disjoint sets, with their spread.

    Images are streamed: only the statistics of a set are kept, in `cache`, and found there again.
    about: what images hang on besides candidate and jobs: the model, its precision, the code.
    """
    fitted = [reference for reference in references if reference.statistics is None]
    scores = []
    for candidate, score in results:
        values: dict[str, list[float]] = {}
        for jobs in sets:
            try:
                mine = set_statistics(benchmark, candidate, references, jobs, cache, about)
                fine = set_statistics(benchmark, benchmark.fine, fitted, jobs, cache, about)
            except ValueError as error:  # of images or features that are no numbers
                score = replace(
                    score, left_out={**score.left_out, "distances by sets": str(error)}
                )
                values.clear()
                break
            for name, of in ((r.space.name, r.statistics) for r in references):
                values.setdefault(name, []).append((of or fine[name]).distance(mine[name]))
        frechets = {
            name: Frechet(mean(each), stdev(each), candidate.fitted_in(name), tuple(each))
            for name, each in values.items()
        }
        first = next((one.value for one in frechets.values()), None)
        scores.append(replace(score, frechet=first, frechets=frechets))
    return scores


def set_statistics(
    benchmark: Benchmark,
    candidate: Candidate,
    references: Sequence[FrechetReference],
    jobs: Sequence[Job],
    cache: Path,
    about: Sequence[Any],
) -> dict[str, Statistics]:
    """The statistics of a candidate's images by feature space; ValueError as `add_statistics`."""
    file, sampler = candidate.source, candidate.sampler
    solver: Any = candidate.name  # which says at what guidance rates
    if file:
        solver = [hashlib.sha256(Path(file).read_bytes()).hexdigest(), candidate.name]
    whole = [solver, sampler.sigmas, sampler.afs, sampler.guidance_rate, about]
    whole += [[job.seed, job.prompt] for job in jobs]
    paths: dict[str, Path] = {}
    for space in (reference.space for reference in references):
        key = hashlib.sha256(to_json([*whole, space.about, space.version]).encode())
        paths[space.name] = cache / f"{key.hexdigest()[:32]}.npz"
    kept: dict[str, Statistics] = {}
    for name, path in paths.items():
        with suppress(ValueError):  # none, or a damaged one
            kept[name] = load_statistics(path)
    if missing := [r for r in references if r.space.name not in kept]:
        sums: dict[str, Statistics] = {}
        bar = ranks.progress(len(jobs), "image", f"{candidate.name}, {candidate.nfe} calls")
        for batch in generate(benchmark.backend, sampler, jobs, batch=benchmark.batch):
            add_statistics(sums, batch.images, missing)
            bar.update(len(batch.jobs))
        bar.close()
        for name, statistics in sums.items():
            try:
                save_statistics(paths[name], statistics)
            except ValueError as error:  # a full disk does not cost what is measured
                click.echo(f"not kept for another time: {error}", err=True)
        kept |= sums
    return kept


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.argument("more", nargs=-1, metavar="[PREDICTOR]...")
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--solvers", type=Names(), default=",".join(SOLVERS), help="Hand-made; '' for none.")
@click.option("--nfe", type=Names(), default="3,5,7,9", help="Sequential calls of those.")
@click.option("--schedules", type=Names(), default="best", help="Names, or best of the usual.")
@click.option("--predictor", multiple=True, help="Path, name in exps/, or pattern; repeatable.")
@click.option("--fine", type=click.IntRange(2), default=FINE_STEPS, help="Its Heun steps.")
@click.option("--guidance_rate", type=Number(0), default=1.0, help="1 is no guidance.")
@click.option("--guidance", multiple=True, help="All also at these rates, as sample.py's.")
@click.option(
    "--prompts", "--prompt-file", "--prompt_file", "prompts", help=".txt, one a line, or .csv."
)
@click.option("--seeds", type=SeedList(), default="0-255")
@click.option("--batch", type=click.IntRange(1), default=64)
@click.option("--features", multiple=True, help="Frechet distances in these; repeatable.")
@click.option(
    "--reference", multiple=True, type=click.Path(path_type=Path), help="Statistics for them."
)
@click.option("--images", type=click.IntRange(2), help="Frechet distances of so many, by sets.")
@click.option(
    "--sets", type=click.IntRange(2), default=SETS, help="Disjoint sets of --images seeds."
)
@click.option("--reward", multiple=True, help="Repeatable: clip, hps, ...")
@click.option(
    "--weights", type=NamedPath(), multiple=True, help="Where rewards' and features' are."
)
@click.option("--shown", type=click.IntRange(1), default=SHOWN, help="Images a line in the page.")
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/compare")
@click.option("--dtype", type=DType(), default="float32", help="Of the network; x stays float32.")
@click.option("--device", type=Device(), default="auto")
def main(**options: Any) -> None:
    """Compare solvers and predictors: error to the fine solution, rewards, cost.

    Writes report.html, a page that needs nothing else, and results.txt, .csv, .json and .png to
    OUTDIR. Hand-made solvers take the best of their schedules, each with and without AFS, by
    RMSE on the first 64 seeds. The shipped model has its Frechet reference; others need
    --features, and without a --reference for them are held against the fine solution's images.
    With --images, Frechet distances are of that many images for each of --sets disjoint ranges
    of seeds, as many of each class; what is measured is kept in OUTDIR/cache, and found there.
    Text-to-image models make the i-th prompt from the i-th seed, and every --reward judges the
    same images. All solvers on the shipped model take about a quarter of an hour on 2 cores.

    \b
    python -m eval.compare --predictor 'exps/fashion-mnist-32/*.pkl'
    python -m eval.compare --solvers euler,dpmpp-3 --nfe 5,10 --schedules polynomial --seeds 0-99
    python -m eval.compare --images 10000 --nfe 3 --features efficientnet --features own:features
    python -m eval.compare --model tiny-sd3 --guidance_rate 4 --seeds 0-99 --nfe 6,10 \
        --prompts src/prompts/emoji-heldout.txt --predictor 'exps/tiny-sd3/*.pkl' \
        --reward clip --weights clip=src/models/tiny-clip --reward efficientnet-minilm
    """  # noqa: D301 - click's mark for lines to keep
    device, outdir, names = options["device"], options["outdir"], options["reward"]
    paths = dict(options["weights"])
    setup = Setup(device, paths=paths)
    files = files_of(names, setup.paths)
    texts = read_prompts(options["prompts"]) if options["prompts"] else ()
    model = find_model(options["model"])
    patterns = [*options["predictor"], *options["more"]]
    sizes = [usual_size(load_predictor(file).recipe) for file in predictor_files(patterns)]
    about = ModelOptions(next(filter(None, sizes))) if any(sizes) else None
    backend = load_backend(options["model"], device=device, dtype=options["dtype"], options=about)
    jobs = jobs_for(backend, options["seeds"], texts)
    if (texts_for := reads_texts(names)) and not all(isinstance(j.prompt, str) for j in jobs):
        raise ValueError(f"{texts_for[0]} judges images by their prompts: this model takes none")
    fine = fine_solution(backend.levels, options["fine"], options["guidance_rate"])
    benchmark = Benchmark(backend, jobs, fine, options["batch"])
    fixed = learned(patterns, backend)
    asked = (options["solvers"], options["nfe"], options["schedules"])
    rivals = rivals_for(*asked, backend.levels, options["guidance_rate"])
    for candidate in fixed:
        check_comparable(candidate, fine)
    for text in options["guidance"]:
        at_rates([*rivals, *fixed], text, backend, jobs[0])
    if not fixed and not rivals:
        fix = "name solvers that can make these calls, or predictors"
        raise ValueError(f"nothing to compare: {fix}")
    rewards = load_rewards(names, setup)
    look = torch.zeros(1, 3, *backend.size, device=device)
    references = references_for(model, options["features"], options["reference"], paths, look)
    images = options["images"]
    if images and not references:
        raise ValueError(f"--images {images} is of Frechet distances: give --features too")
    if not images and options["sets"] != SETS:
        raise ValueError(f"--sets {options['sets']} are of --images: give it too")
    used = {*files, *(reference.space.name for reference in references)}
    if spare := [name for name in paths if name not in used]:
        raise ValueError(f"--weights {spare[0]}={paths[spare[0]]}: nothing here reads them")
    for reference in references:  # a function of one's own may not do, and the work is long
        reference.space(look)
    prompt = "" if jobs[0].prompt is None else str(jobs[0].prompt)
    check_rewards(rewards, backend.size, prompt, device)
    check_writable(outdir / "results.json")
    plain, guided = [*chosen(benchmark, rivals), *fixed], []
    for text in options["guidance"]:  # a rate for each step: of the rivals with as many, the best
        fit = [c for c in rivals if text.count(",") in (0, len(c.sampler.sigmas) - 2)]
        best = plain if len(fit) == len(rivals) else [*chosen(benchmark, fit), *fixed]
        guided += at_rates(best, text, backend, jobs[0])
    candidates = [*plain, *guided]
    fine_score, scores = measure(benchmark, candidates, references, rewards)
    settings: dict[str, Any] = {
        "model": from_here(options["model"]),
        "seeds": runs_of(options["seeds"]),
        "schedules": options["schedules"],
        "prompts": from_here(options["prompts"]) if options["prompts"] else None,
        "rewards": list(names),
        "weights": {name: from_here(path) for name, path in files.items()},
        "dtype": str(options["dtype"]),
        "features": [reference.space.about for reference in references],
        "reference": [from_here(path) for path in options["reference"]] or None,
    }
    if images and references:
        ranges = [range(k * images, (k + 1) * images) for k in range(options["sets"])]
        sets = [jobs_for(backend, seeds, texts, even=True) for seeds in ranges]
        version = stamp(model) if model.exists() else str(model)
        modules = ("backends.load", "backends.generate", "eval.measure", "solvers.predictor")
        code = [source_hash(module) for module in modules]
        weights = [stamp(Path(paths[r.space.name])) for r in references if r.space.name in paths]
        size = [list(backend.shape), list(backend.size), str(backend.dtype)]
        about = (version, *size, *weights, *code)
        results = [*zip(candidates, scores, strict=True), (fine, fine_score)]
        *scores, fine_score = with_sets(
            benchmark, results, references, sets, outdir / "cache", about
        )
        settings["frechet"] = f"of {images} images in {len(sets)} disjoint sets of seeds"
    compared = (benchmark, candidates, fine_score, scores)
    write_results(outdir, *compared, settings=settings, shown=options["shown"])
    click.echo((outdir / "results.txt").read_text(encoding="utf-8").rstrip())
    click.echo(f"report.html, results.txt, .csv, .json and .png are in {outdir}")


def at_rates(
    candidates: Sequence[Candidate], text: str, backend: Backend, job: Job
) -> list[Candidate]:
    """The candidates that have as many steps as the text has rates, at these guidance rates.

    ValueError where there is none, and for a model that cannot be guided so.
    """
    count, guided, said = text.count(",") + 1, [], ""
    for one in candidates:
        sampler, levels = one.sampler, one.sampler.sigmas[:-1]
        if count in (1, len(levels)):
            try:
                sampler = sampler.with_rates(guidance_rates(text, levels))
            except ValueError as error:  # no step of this one in the interval
                said = str(error)
                continue
            backend.check_rates(sampler.extreme_rates, backend.encode([job.prompt]))
            guided.append(replace(one, name=f"{one.name} at {text}", sampler=sampler))
    if not guided:
        said = said or f"no solver or predictor here has {count} steps"
        raise ValueError(f"--guidance {text}: {said}")
    return guided


def references_for(
    model: Path,
    features: Sequence[str],
    files: Sequence[Path],
    weights: Mapping[str, str],
    look: Tensor,
) -> list[FrechetReference]:
    """The feature spaces, each with the file of statistics that is of it, if there is one.

    Files are those given, and those in the model's folder; one that does not say whose features
    it holds (EDM's) is of the space that gives as many for images like `look`. ValueError for a
    file of other features than those asked for, and for two of one space.
    """
    shipped = sorted(model.glob("test-features*.npz")) if model.is_dir() else []
    statistics = {path: load_statistics(path) for path in (*files, *shipped)}
    spaces = [
        load_space(name, look.device, Path(weights[name]) if name in weights else None)
        for name in dict.fromkeys(features or (("efficientnet",) if statistics else ()))
    ]
    references: list[FrechetReference] = []
    unused = dict.fromkeys(files)
    for space in spaces:
        count = space(look).shape[1] if statistics else 0
        own = [p for p, s in statistics.items() if s.about.get("features") == space.about]
        silent = [p for p in files if "features" not in statistics[p].about]
        fits = [p for p in (*own, *silent) if len(statistics[p].mean) == count]
        given = [p for p in fits if p in unused]
        if len(given) > 1:
            raise ValueError(f"--reference {given[0]} and {given[1]} are both of {space.name}")
        for path in (given or fits)[:1]:
            check_space(path, statistics[path], space)
            unused.pop(path, None)
        chosen_file = (given or fits or [None])[0]
        references.append(FrechetReference(space, chosen_file and statistics[chosen_file]))
    for path in unused:
        there = statistics[path].about.get("features", f"{len(statistics[path].mean)} numbers")
        raise ValueError(f"--reference {path} is of other features ({there}): see --features")
    return references


def write_results(
    outdir: Path,
    benchmark: Benchmark,
    candidates: Sequence[Candidate],
    fine: Score,
    scores: Sequence[Score],
    *,
    settings: Mapping[str, Any],
    shown: int,
) -> None:
    """report.html, results.txt, .csv, .json and .png; ValueError where they cannot be written."""
    count = len(benchmark.jobs)
    steps = len(benchmark.fine.sampler.sigmas) - 1
    finely = f"{fine.name} in {steps} steps on {fine.schedule} ({fine.nfe} calls)"
    meaning = MEANING | {n: ADAPTERS[n].about for n in fine.rewards if n in ADAPTERS}
    about = {**settings, "images": count, "batch": benchmark.batch, "fine": finely}
    about |= {"chosen_on": f"the first {min(CHOOSE_ON, count)} images", "meaning": meaning}
    about |= provenance(benchmark.backend.device)
    first, *rows = (without_nan(asdict(score)) for score in (fine, *scores))
    write_json(outdir / "results.json", {"about": about, "fine": first, "scores": rows})
    write_csv(outdir / "results.csv", scores)
    metrics = [metric for metric in metrics_of(scores) if metric.less]
    sets = f" Frechet distances are {settings['frechet']}." if "frechet" in settings else ""
    note = (
        f"{count} images. Fine solution: {finely}, its Frechet distance "
        f"{number(fine.frechet)}.{sets}\n"
        "RMSE is over the latents (pixels in [-1, 1] for pixel models); Frechet distances are "
        "biased upwards at few images: compare within this table only."
    )
    gone = "\n".join(missing((fine, *scores)))
    parts = (table(scores), *(ratios(scores, metric) for metric in metrics), note, gone)
    write_text(outdir / "results.txt", "\n\n".join(part for part in parts if part) + "\n")
    title = f"{settings['model']}, {count} images, against {finely}"
    figure = curves(scores, title, fine)
    save(figure, outdir / "results.png")
    jobs = benchmark.jobs[:shown]
    strips = []
    for candidate in (*candidates, benchmark.fine):
        (batch,) = generate(benchmark.backend, candidate.sampler, jobs, batch=len(jobs))
        strips.append((candidate.name, candidate.nfe, batch.images.nan_to_num(0.0, 1.0, 0.0)))
    facts = {"images": str(count), "fine solution": finely}
    facts |= {name: str(value) for name, value in about.items() if value and name != "meaning"}
    text = page(
        scores,
        fine,
        strips,
        {f"{c.name}, {c.nfe} calls": figure for c in candidates if (figure := drawn(c))},
        figure,
        title=f"{settings['model']}: solvers by the number of calls",
        facts=facts,
        meaning=meaning,
        subjects="; ".join(
            f"{job.seed}" if job.prompt is None else f"{job.seed}: {job.prompt}" for job in jobs
        ),
    )
    write_text(outdir / "report.html", text)


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, None where one is NaN or infinite: JSON has no such numbers."""
    odd = (name for name, v in row.items() if isinstance(v, float) and not math.isfinite(v))
    return {**row, **dict.fromkeys(odd)}


def drawn(candidate: Candidate) -> Any:
    """A drawing of a candidate's learned table; None where it has none."""
    solver = candidate.sampler.solver
    if not isinstance(solver, EPD | ParallelMultistep):
        return None
    place = solver.table
    mix = place.weight * place.dir_scale if isinstance(place, Directions) else place.weight
    return table_figure(place.r.tolist(), mix.tolist(), candidate.sampler.sigmas)


def runs_of(seeds: Sequence[int]) -> str:
    """Seeds as they are written: [0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, run)) for run in runs)


if __name__ == "__main__":
    main()
