"""Sample images: a predictor or any solver, a model, classes or prompts, seeds -> PNG files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from backends.base import SCHEDULES, Backend, ModelOptions, Prompt
from backends.generate import Batch, Job, Method, generate
from backends.load import find_model, load_backend
from backends.methods import HandMade, check_fit, predictor_method, sequential_calls
from solvers.catalog import SOLVERS, SolverOptions
from solvers.predictor import Predictor, find_predictor, load_predictor
from src import ranks
from src.files import from_json, read_json, to_json, write_json
from src.images import grid, read_png, save_png
from src.options import (
    Device,
    DType,
    Number,
    OneLineCommand,
    SeedList,
    one_line_errors,
    text_options,
)
from src.text import digest, meet, read_prompts

GRID_IMAGES = 100
INDEX = "samples.json"
RECIPE_OPTIONS = {
    "solver": "base",
    "num_steps": "num_steps",
    "schedule_type": "schedule_type",
    "schedule_rho": "schedule_rho",
    "afs": "afs",
    "max_order": "max_order",
    "guidance_rate": "guidance_rate",
}
"""The options that a predictor's recipe decides, and the recipe's names for them."""
CHURN = ("s_churn", "s_min", "s_max", "s_noise")


@dataclass(frozen=True)
class Settings:
    """One run: what a picture depends on, apart from its seed and class, is `about`."""

    backend: Backend
    method: Method
    jobs: list[Job]
    outdir: Path
    subdirs: bool
    about: dict[str, Any]

    def path(self, seed: int) -> Path:
        """Where the image of a seed lies."""
        folder = self.outdir / f"{seed - seed % 1000:06d}" if self.subdirs else self.outdir
        return folder / f"{seed:06d}.png"


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--predictor", "--predictor_path", help="Path, or name in exps/ (cifar10-5nfe).")
@click.option("--model", default="fashion-mnist-32", help="Folder, file, hub or shipped name.")
@click.option("--solver", help=f"Without a predictor: {', '.join(SOLVERS)}; dpmpp-3 is order 3.")
@click.option("--num_steps", type=click.IntRange(2), help="Grid points, one more than intervals.")
@click.option("--schedule_type", type=click.Choice(SCHEDULES), help="How the grid is spaced.")
@click.option("--schedule_rho", type=Number(0, min_open=True), help="Its exponent.")
@click.option("--max_order", type=click.IntRange(1, 4), help="Order of a multistep solver.")
@click.option("--afs/--no-afs", default=False, help="Analytic first step: one call less.")
@click.option("--guidance_rate", type=Number(0), default=1.0, help="1 is no guidance.")
@click.option("--denoise_to_zero", is_flag=True, help="One more call at the end, to sigma 0.")
@click.option("--s_churn", type=Number(0), default=0.0, help="EDM's noise, with --solver edm.")
@click.option("--s_min", type=Number(0), default=0.0, help="Its lowest level.")
@click.option("--s_max", type=click.FloatRange(0), default=math.inf, help="Its highest level.")
@click.option("--s_noise", type=Number(0), default=1.0, help="Its strength.")
@click.option("--seeds", type=SeedList(), default="0-63", help='Such as "0-63,100".')
@click.option("--batch", type=click.IntRange(1), default=64, help="Images at once, a process.")
@click.option("--points_chunk", type=click.IntRange(1), help="Points at once, to save memory.")
@click.option("--class", "label", type=click.IntRange(0), help="Class; else drawn by the seed.")
@text_options
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: samples/MODEL/METHOD.")
@click.option("--subdirs", is_flag=True, help="A sub-folder for every 1000 seeds.")
@click.option("--grid", "with_grid", is_flag=True, help="Also one picture of the first 100.")
@click.option("--trajectory", is_flag=True, help="Also every state on the way, one strip a seed.")
@click.option("--dtype", type=DType(), default="float32", help="Of the network; x stays float32.")
@click.option("--device", type=Device(), default="auto")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.pass_context
@one_line_errors
def main(
    ctx: click.Context, trajectory: bool, with_grid: bool, dry_run: bool, **options: Any
) -> None:
    """Sample images and write one PNG a seed; images that are there already are kept.

    \b
    python sample.py --predictor cifar10-5nfe --model edm-cifar10.pkl --seeds 0-63
    python sample.py --solver dpmpp-3 --num_steps 8 --class 7 --grid
    python sample.py --predictor sd15-best --model v1-5-pruned-emaonly.ckpt --prompt "a red fox"
    torchrun --nproc_per_node=2 sample.py --solver heun --num_steps 18 --seeds 0-999 --subdirs
    """  # noqa: D301
    given = {
        n: v for n, v in options.items() if ctx.get_parameter_source(n) != ParameterSource.DEFAULT
    }
    if dry_run:
        options["device"] = torch.device("cpu")
    options["device"] = ranks.init(options["device"])
    run = settings(options, given)
    if dry_run:
        click.echo(to_json(run.about | {"outdir": str(run.outdir), "images": len(run.jobs)}, 2))
        return
    missing = ranks.gather_objects(open_folder(run) if ranks.is_first() else None)[0]
    make(run, missing, options["batch"], trajectory)
    ranks.barrier()
    if ranks.is_first():
        write_index(run)
        if with_grid:
            write_grid(run)
        click.echo(f"{len(run.jobs)} images, {len(missing)} of them new, in {run.outdir}")
    ranks.close()


def settings(options: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """The options made into what they mean; ValueError where they contradict each other."""
    predictor = None
    if options["predictor"]:
        predictor = load_predictor(find_predictor(options["predictor"]))
        refuse_contradictions(predictor, given, options["predictor"])
    model = find_model(options["model"])
    texts = texts_of(options)
    backend = load_backend(
        str(model),
        device=options["device"],
        dtype=options["dtype"],
        options=model_options(options, texts),
    )
    method = predictor_or_solver(predictor, options, backend)
    jobs = jobs_of(backend, texts, options)
    backend.guided(method.guidance_rate, backend.encode([job.prompt for job in jobs[:1]]))
    about = describe(method, options, predictor) | describe_text(backend, texts, options)
    name = Path(options["predictor"]).stem if predictor else options["solver"] or "euler"
    folder = Path("samples") / model.stem / f"{name}_nfe{about['nfe']}"
    return Settings(backend, method, jobs, options["outdir"] or folder, options["subdirs"], about)


def texts_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The prompts of the options, none where there are none; ValueError for two sources."""
    given = [n for n in ("prompt", "prompt_file", "label") if options[n] not in (None, ())]
    if len(given) > 1:
        names = " and ".join("--class" if n == "label" else f"--{n}" for n in given)
        raise ValueError(f"{names} are given: choose one of them")
    if options["prompt_file"]:
        return read_prompts(options["prompt_file"])
    return options["prompt"]


def model_options(options: Mapping[str, Any], texts: tuple[str, ...]) -> ModelOptions:
    """How a text-to-image model is opened."""
    if options["release_encoders"] and not texts:
        raise ValueError("--release_encoders needs --prompt or --prompt-file")
    return ModelOptions(
        size=options["resolution"],
        negative_prompt=options["negative_prompt"],
        config=options["model_config"],
        cpu_offload=options["cpu_offload"],
        vae_tiling=options["vae_tiling"],
        vae_slicing=options["vae_slicing"],
        encode_first=tuple(dict.fromkeys(texts)) if options["release_encoders"] else (),
    )


def jobs_of(backend: Backend, texts: tuple[str, ...], options: Mapping[str, Any]) -> list[Job]:
    """A job a seed: of its prompt, of the class, or of what the seed itself says."""
    seeds, label = options["seeds"], options["label"]
    if texts:
        return [Job(seed, text) for seed, text in meet(seeds, texts)]
    return [Job(s, backend.usual_prompt(s) if label is None else label) for s in seeds]


def describe_text(
    backend: Backend, texts: tuple[str, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a text-to-image model's pictures depend on besides; nothing for other models."""
    if not isinstance(backend.usual_prompt(0), str):
        return {}
    height, width = backend.image_size
    prompts = f"{len(texts)} prompts, {digest(texts)}" if texts else "by seed"
    negative = options["negative_prompt"]
    return {"resolution": f"{width}x{height}", "prompts": prompts, "negative_prompt": negative}


def subject(prompt: Prompt) -> dict[str, Prompt]:
    """What a picture is of, under its name."""
    return {"prompt" if isinstance(prompt, str) else "class": prompt}


def refuse_contradictions(predictor: Predictor, given: Mapping[str, Any], name: str) -> None:
    """ValueError for an explicit option that says otherwise than the predictor's recipe."""
    for option, entry in RECIPE_OPTIONS.items():
        wanted = getattr(predictor.recipe, entry)
        if option in given and given[option] != wanted:
            said = f"--{option} {given[option]} contradicts {name}, whose {entry} is {wanted}"
            raise ValueError(f"{said}: leave the option out")
    if given.get("s_churn"):
        raise ValueError(
            f"--s_churn {given['s_churn']} contradicts {name}: only --solver edm churns"
        )


def predictor_or_solver(
    predictor: Predictor | None, options: Mapping[str, Any], backend: Backend
) -> Method:
    """The method that the options ask for."""
    if predictor:
        check_fit(predictor.recipe, backend)
        method = predictor_method(predictor, backend.levels)
        return dataclasses.replace(
            method,
            denoise_to_zero=options["denoise_to_zero"],
            points_chunk=options["points_chunk"],
        )
    chosen = HandMade(
        solver=options["solver"] or "euler",
        num_steps=options["num_steps"] or 18,
        schedule_type=options["schedule_type"],
        schedule_rho=options["schedule_rho"],
        afs=options["afs"],
    )
    churn = {name: options[name] for name in CHURN}
    if options["s_churn"] and chosen.solver != "edm":
        raise ValueError(
            f"--s_churn {options['s_churn']} is for --solver edm, not {chosen.solver}"
        )
    extra = SolverOptions(order=options["max_order"], **churn)
    return dataclasses.replace(
        chosen.method(backend.levels, extra),
        guidance_rate=options["guidance_rate"],
        denoise_to_zero=options["denoise_to_zero"],
    )


def describe(
    method: Method, options: Mapping[str, Any], predictor: Predictor | None
) -> dict[str, Any]:
    """What goes into every picture: enough to make it again."""
    return {
        "model": options["model"],
        "predictor": options["predictor"],
        "solver": f"epd over {method.solver}" if predictor else method.solver,
        "order": method.options.order,
        "num_steps": len(method.sigmas),
        "num_points": predictor.recipe.num_points if predictor else None,
        "sigmas": method.sigmas.tolist(),
        "nfe": sequential_calls(method),
        "afs": method.afs,
        "guidance_rate": method.guidance_rate,
        "denoise_to_zero": method.denoise_to_zero,
        "churn": {n: str(getattr(method.options, n)) for n in CHURN if method.solver == "edm"},
        "class": "by seed" if options["label"] is None else options["label"],
        "dtype": str(options["dtype"]).removeprefix("torch."),
    }


def make(run: Settings, missing: Sequence[Job], batch: int, trajectory: bool) -> None:
    """Sample this rank's part of the missing images and write each as soon as it is there."""
    parts = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    if ranks.is_first() and 0 < len(parts) < ranks.world_size():
        even = -(-len(missing) // ranks.world_size())
        click.echo(f"{len(parts)} batches leave ranks idle: --batch {even} uses all", err=True)
    with tqdm(total=len(missing), unit="image", disable=not ranks.is_first()) as bar:
        for part in ranks.share(parts):
            for made in generate(
                run.backend, run.method, part, batch=batch, trajectory=trajectory
            ):
                write_batch(run, made)
            bar.update(min(len(part) * ranks.world_size(), len(missing) - bar.n))


def write_batch(run: Settings, made: Batch) -> None:
    """The pictures of a batch, each with its recipe, and strips of the states on the way."""
    for i, job in enumerate(made.jobs):
        if made.states:
            strip = run.backend.decode(torch.stack([x[i] for x in made.states]))
            path = run.path(job.seed)
            save_png(path.parent / "trajectory" / path.name, grid(strip, len(strip)))
        text = {"recipe": run.about | {"seed": job.seed} | subject(job.prompt)}
        save_png(run.path(job.seed), made.images[i], text)


def open_folder(run: Settings) -> list[Job]:
    """The jobs whose images are not there; ValueError if the folder's were made otherwise."""
    index = run.outdir / INDEX
    there = [job for job in run.jobs if run.path(job.seed).exists()]
    if index.exists() and read_json(index)["recipe"] != from_json(to_json(run.about), INDEX):
        raise ValueError(f"{index} tells of another recipe than this: choose another --outdir")
    if there and not index.exists():
        raise ValueError(
            f"{run.path(there[0].seed)} is there without {INDEX}: choose another --outdir"
        )
    write_index(run)
    return [job for job in run.jobs if job not in there]


def write_index(run: Settings) -> None:
    """samples.json: the recipe, and every image that is there with its seed and class."""
    index = run.outdir / INDEX
    images = {e["file"]: e for e in read_json(index)["images"]} if index.exists() else {}
    for job in run.jobs:
        if (path := run.path(job.seed)).exists():
            file = path.relative_to(run.outdir).as_posix()
            images[file] = {"file": file, "seed": job.seed} | subject(job.prompt)
    ordered = sorted(images.values(), key=lambda entry: entry["seed"])
    write_json(index, {"recipe": run.about, "images": ordered})


def write_grid(run: Settings) -> None:
    """grid.png of the first images, in the order of the seeds."""
    images = [read_png(run.path(job.seed))[0] for job in run.jobs[:GRID_IMAGES]]
    save_png(run.outdir / "grid.png", grid(torch.stack(images), gap=2))


if __name__ == "__main__":
    main()
