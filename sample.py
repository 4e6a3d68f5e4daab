"""Sample images: a predictor or any solver, a model, classes or prompts, seeds -> PNG files."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import click
import torch

from backends.base import Backend, ModelOptions
from backends.generate import Job, generate
from backends.load import backbone_of, check_fit, load_backend, usual_size
from backends.spread import spread
from solvers.predictor import Predictor, find_predictor, load_predictor, named_tensors
from solvers.sampler import SOLVERS, Sampler, SolverOptions, hand_made, parse_name
from solvers.schedules import SCHEDULES
from src import ranks
from src.files import to_json
from src.options import BoolFlag, Number, OneLineCommand, SeedList, check_decided, model_options
from src.samples import Samples, usual_folder
from src.text import chosen_prompts, digest, guidance_rates, meet

OF_RECIPE = ("num_steps", "schedule_type", "schedule_rho", "max_order", "afs", "guidance_rate")
Options: TypeAlias = Mapping[str, Any]
Texts: TypeAlias = tuple[str, ...]


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--predictor", "--predictor_path", help="File, run's folder or number, exps/ name.")
@click.option("--solver", help=f"Without a predictor: {', '.join(SOLVERS)}; dpmpp-3 is order 3.")
@click.option("--num_steps", type=click.IntRange(2), help="Grid points, one more than intervals.")
@click.option("--schedule_type", type=click.Choice(SCHEDULES), help="How the grid is spaced.")
@click.option("--schedule_rho", type=Number(0, min_open=True), help="Its exponent.")
@click.option("--max_order", type=click.IntRange(1, 4), help="Order of a multistep solver.")
@click.option("--afs/--no-afs", cls=BoolFlag, help="Analytic first step: one call less.")
@click.option("--guidance_rate", type=Number(0), default=1.0, help="1 is no guidance.")
@click.option("--guidance", help="In its place: 1,4,6,4 by step, or 4@0.2-0.8 in a range.")
@click.option("--denoise_to_zero", cls=BoolFlag, help="One more call at the end, to sigma 0.")
@click.option("--s_churn", type=Number(0), default=0.0, help="EDM's noise, with --solver edm.")
@click.option("--s_min", type=Number(0), default=0.0, help="Its lowest level.")
@click.option("--s_max", type=click.FloatRange(0), default=math.inf, help="Its highest level.")
@click.option("--s_noise", type=Number(0), default=1.0, help="Its strength.")
@click.option("--seeds", type=SeedList(), default="0-63", help='Such as "0-63,100".')
@click.option("--class", type=click.IntRange(0), help="Class; else drawn by the seed.")
@click.option("--prompt", multiple=True, help="A text; again for the next seed's.")
@click.option("--prompt-file", help=".txt, one a line, or .csv with a column text.")
@click.option("--prompts_by", type=click.Choice(["seed", "order"]), default="seed", help="Whose.")
@model_options
@click.option("--batch", "--max_batch_size", type=click.IntRange(1), default=64, help="At once.")
@click.option("--points_chunk", type=click.IntRange(1), help="Points at once, to save memory.")
@click.option("--points_degree", type=click.IntRange(1), default=1, help="Ranks for an image.")
@click.option("--timeout", type=Number(0, min_open=True), default=600.0, help="For them, seconds.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: samples/MODEL/METHOD.")
@click.option("--subdirs", cls=BoolFlag, help="A sub-folder for every 1000 seeds.")
@click.option("--grid", cls=BoolFlag, help="Also one picture of the first 100.")
@click.option("--trajectory", "--return_inters", cls=BoolFlag, help="Also the states on the way.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.pass_context
def main(ctx: click.Context, **options: Any) -> None:
    """Sample images and write one PNG a seed; images that are there already are kept.

    \b
    python sample.py --predictor cifar10-5nfe --model edm-cifar10.pkl --seeds 0-63
    python sample.py --solver dpmpp-3 --num_steps 8 --class 7 --grid
    python sample.py --predictor sd15-best --model v1-5-pruned-emaonly.ckpt --prompt "a red fox"
    """  # noqa: D301
    options["device"] = ranks.init(options["device"])
    mesh = ranks.point_mesh(options["points_degree"], options["device"], options["timeout"])
    name = options["predictor"]
    predictor = load_predictor(find_predictor(name)) if name else None
    recipe = predictor.recipe if predictor else None
    if options["guidance"]:
        check_decided(ctx, {"guidance_rate": options["guidance"]}, "--guidance")
    if recipe:
        own = recipe.solver if recipe.base == "euler" else recipe.base
        decided = {option: getattr(recipe, option) for option in OF_RECIPE}
        check_decided(ctx, {"solver": own, **decided}, name)
    options["model"] = options["model"] or backbone_of(recipe, default=ctx.obj)
    texts = chosen_prompts(options["prompt"], options["prompt_file"], options["class"])
    backend = spread(open_model(options, texts, predictor), mesh)
    sampler = sampler_of(options, predictor, backend)
    jobs = jobs_of(options, texts, backend.usual_prompt)
    backend.check_rates(sampler.extreme_rates, backend.encode([job.prompt for job in jobs[:1]]))
    about = described(options, texts, predictor, backend, sampler)
    samples = Samples(options["outdir"] or usual_folder(about), about, options["subdirs"])
    if options["dry_run"]:
        click.echo(to_json(about | {"outdir": str(samples.folder), "images": len(jobs)}, 2))
        return
    wanted = [(job.seed, job.prompt) for job in jobs]
    lacking = samples.missing(wanted, options["trajectory"]) if ranks.is_first() else None
    missing = ranks.of_each_rank(lacking)[0]
    say_notices(options, backend, sampler)
    rest, size = [job for job in jobs if job.seed in missing], options["batch"]
    parts = [rest[i : i + size] for i in range(0, len(rest), size)]
    if ranks.is_first() and 0 < len(parts) < ranks.world_size():
        click.echo(f"{len(parts)} batches leave ranks idle: lower --batch", err=True)
    mine = [job for part in ranks.share(parts) for job in part]
    more = {name: options[name] for name in ("trajectory", "points_chunk")}
    with ranks.progress(len(mine), "image") as bar, ThreadPoolExecutor(1) as writer:
        written = writer.submit(list)
        for batch in generate(backend, sampler, mine, batch=size, **more):
            strips = [backend.decode(state) for state in batch.trajectory]
            written.result()  # one batch is written while the next is sampled
            names = [(job.seed, job.prompt) for job in batch.jobs]
            if ranks.writes():
                written = writer.submit(samples.write, names, batch.images, strips)
            bar.update(len(batch.jobs))
        written.result()
    ranks.barrier()
    if ranks.is_first():
        samples.write_index()
        if options["grid"]:
            samples.write_grid(job.seed for job in jobs[:100])
        click.echo(f"{len(jobs)} images, {len(missing)} of them new, in {samples.folder}")
    ranks.close()


def open_model(options: Options, texts: Texts, predictor: Predictor | None) -> Backend:
    """The backend; without --resolution, a text-to-image model's is that of the predictor."""
    if options["release_encoders"] and not texts:
        raise ValueError("--release_encoders needs --prompt or --prompt-file")
    opening = {f.name: options[f.name] for f in fields(ModelOptions) if f.name in options}
    opening["size"] = options["size"] or usual_size(predictor and predictor.recipe)
    if options["release_encoders"]:
        opening["encode_first"] = tuple({str(job.prompt): 0 for job in jobs_of(options, texts)})
    where = {"device": options["device"], "dtype": options["dtype"]}
    backend = load_backend(options["model"], **where, options=ModelOptions(**opening))
    if options["backend"] not in (None, backend.family):
        raise ValueError(f"--backend {options['backend']}: the model is of {backend.family}")
    network = torch.compile(backend.denoise) if options["compile"] else backend.denoise
    return replace(backend, denoise=network)


def sampler_of(options: Options, predictor: Predictor | None, backend: Backend) -> Sampler:
    """The predictor's sampler, or the solver on its grid that the options ask for."""
    churn = {name: value for name, value in options.items() if name.startswith("s_")}
    if SolverOptions(**churn) != SolverOptions() and (predictor or options["solver"] != "edm"):
        raise ValueError(f"--{', --'.join(churn)} are for --solver edm alone")
    if predictor:
        check_fit(predictor.recipe, backend)
        sampler = predictor.sampler(backend.levels)
    else:
        sampler = hand_made(
            options["solver"] or "euler",
            backend.levels,
            options["num_steps"] or 18,
            schedule=options["schedule_type"],
            rho=options["schedule_rho"],
            afs=options["afs"],
            guidance_rate=options["guidance_rate"],
            options=SolverOptions(order=options["max_order"], **churn),
        )
    if options["guidance"]:
        if predictor and predictor.table.guidance is not None:
            raise ValueError("--guidance: this predictor's table has its own rates, leave it out")
        sampler = sampler.with_rates(guidance_rates(options["guidance"], sampler.sigmas[:-1]))
    return replace(sampler, sigmas=(*sampler.sigmas, *[0.0] * options["denoise_to_zero"]))


def jobs_of(options: Options, texts: Texts, usual: Any = str) -> list[Job]:
    """A job a seed: of its prompt, of the class, or of what is usual for the seed."""
    seeds, label = options["seeds"], options["class"]
    if options["prompt_file"] and options["prompts_by"] == "seed":
        return [Job(seed, texts[seed % len(texts)]) for seed in seeds]
    if texts:
        enough = texts[: len(seeds)] if options["prompt_file"] else texts
        return [Job(seed, text) for seed, text in meet(seeds, enough)]
    return [Job(s, usual(s) if label is None else label) for s in seeds]


def described(
    options: Options, texts: Texts, predictor: Predictor | None, backend: Backend, sampler: Sampler
) -> dict[str, Any]:
    """What goes into every picture: enough to make it again."""
    recipe, name = predictor and predictor.recipe, options["solver"] or "euler"
    order = recipe.max_order if recipe else options["max_order"]
    has_orders = len(SOLVERS[parse_name(recipe.base if recipe else name)[0]].orders) > 1
    num_steps = len(sampler.sigmas) - options["denoise_to_zero"]
    table = named_tensors(predictor.table) if predictor else {}
    rates = table["guidance"].tolist() if "guidance" in table else None
    about = {
        "model": options["model"],
        "predictor": options["predictor"],
        "table": digest([f"{n} {t.tolist()}" for n, t in table.items()]) if table else None,
        "solver": f"{recipe.solver} over {recipe.base}" if recipe else name,
        "order": order if has_orders else None,
        "num_steps": num_steps,
        "num_points": recipe.num_points if recipe else None,
        "sigmas": sampler.sigmas[:num_steps],
        "nfe": sampler.calls,
        "afs": sampler.afs,
        "guidance_rate": options["guidance"] or rates or sampler.guidance_rate,
        "denoise_to_zero": options["denoise_to_zero"],
        "churn": {n: str(options[n]) for n in options if n.startswith("s_") and name == "edm"},
        "class": "by seed" if options["class"] is None else options["class"],
        "dtype": str(options["dtype"] or backend.dtype).removeprefix("torch."),
    }
    if isinstance(backend.usual_prompt(0), str):
        about["resolution"] = "{1}x{0}".format(*backend.size)
        about["prompts"] = f"{len(texts)} prompts, {digest(texts)}" if texts else "by seed"
        about |= {n: options[n] or None for n in ("negative_prompt", "vae_tiling", "config")}
    return about


def say_notices(options: Options, backend: Backend, sampler: Sampler) -> None:
    """Say what is easily overlooked."""
    dtype = str(backend.dtype).removeprefix("torch.")
    if options["negative_prompt"] and set(sampler.extreme_rates) == {1} and ranks.is_first():
        click.echo("the negative prompt has no effect at guidance_rate 1", err=True)
    on_cpu = backend.device.type == "cpu" and ranks.is_first()
    if on_cpu and isinstance(backend.usual_prompt(0), str):
        slow = ", many times slower than in float32" if dtype == "float16" else ""
        click.echo(f"on a CPU the network runs in {dtype}{slow}", err=True)


if __name__ == "__main__":
    main()
