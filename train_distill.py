"""Distil a predictor: a model and a teacher -> a table of few parallel steps."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from backends.base import SCHEDULES, Backend, ModelOptions
from backends.load import family, find_model, load_backend
from rewards.efficientnet import load_features, prepared
from solvers.recipe import FLOW_BACKENDS
from src import ranks
from src.files import to_json
from src.options import DTYPES, Device, Number, OneLineCommand, one_line_errors
from src.text import read_prompts
from training.company import Company
from training.distances import NAMES as DISTANCES
from training.distances import Network, compose, load_network
from training.folders import configured, new_folder, run_folder
from training.gradient import OBJECTIVES
from training.jobs import make_job
from training.run import Folder, run, start_from
from training.settings import (
    BACKENDS,
    METHODS,
    TEACHERS,
    Config,
    calls_and_rows,
    check_batch,
    resolved,
)
from training.stop import Stop, Stopped
from training.task import Surroundings, make_task
from training.teacher import Cache, fingerprint

PUBLISHED_TEACHERS = {"dpm": "dpm2"}
FEATURES = "efficientnet-lite0"
Positive = Number(0, min_open=True)
COUNT = click.IntRange(1)


class Teacher(click.Choice):
    """A teacher by our name or the published one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(PUBLISHED_TEACHERS.get(value, value), param, ctx)


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--preset", help="A published predictor's settings (cifar10-5nfe).")
@click.option("--model", default=Config.model, help="Folder, EDM .pkl, or a shipped name.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="What it must be.")
@click.option("--method", type=click.Choice(METHODS), default=Config.method)
@click.option("--num_steps", type=click.IntRange(2), default=4, help="Grid points.")
@click.option("--num_points", type=click.IntRange(1, 8), default=2, help="K, parallel points.")
@click.option("--solver", "--sampler_stu", default="epd", help="epd, epd-BASE or epd-multistep.")
@click.option("--max_order", type=click.IntRange(1, 4), help="Of the base.")
@click.option("--teacher", "--sampler_tea", type=Teacher(TEACHERS), default="heun")
@click.option("--M", "M", type=click.IntRange(0), help="Points it adds in an interval.")
@click.option("--teacher_substeps", type=COUNT, default=1, help="Steps between its points.")
@click.option("--schedule_type", type=click.Choice(SCHEDULES), help="How the grid is spaced.")
@click.option("--schedule_rho", type=Positive, help="Its exponent.")
@click.option("--afs/--no-afs", default=None, help="Analytic first step; usual for VE.")
@click.option("--scale_dir", type=Number(0, 1), help="Reach of direction scales; fit: free.")
@click.option("--scale_time", type=Number(0, 1), help="Reach of time scales; fit: free.")
@click.option("--fcn", is_flag=True, help="No direction scale in the last interval.")
@click.option("--known", default=0, help="Slopes already evaluated that join EPD's mixture.")
@click.option("--guidance_rate", type=Number(0), default=1.0, help="1 is no guidance.")
@click.option("--prompts", "--prompt_path", help="A text file, one prompt a line.")
@click.option("--negative_prompt", help="What guidance leads away from.")
@click.option("--resolution", type=COUNT, help="Of text-to-image models, in pixels.")
@click.option("--model_config", help="Diffusers folder with what a single file lacks.")
@click.option("--class", "label", type=click.IntRange(0), help="Class; else drawn by the seed.")
@click.option("--total_kimg", type=Positive, help="Thousands of trajectories.")
@click.option("--batch", type=COUNT, default=32, help="Over all processes.")
@click.option("--batch_gpu", "--batch-gpu", type=COUNT, help="At once in a process.")
@click.option("--lr", type=Positive, help="Of Adam.")
@click.option("--coslr/--no-coslr", default=True, help="Cosine decay of the learning rate.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="What a gradient is of.")
@click.option("--distance", type=click.Choice(DISTANCES), default="l2")
@click.option("--last_distance", type=click.Choice(DISTANCES), help="At the end; else the same.")
@click.option("--features", help=f"TorchScript file, or {FEATURES}, for their distances.")
@click.option("--alpha", type=Number(0), default=10.0, help="Weight of features.")
@click.option("--published_loss", is_flag=True, help="Weigh features as the published code does.")
@click.option("--lbfgs", type=click.IntRange(0), default=0, help="Starts of L-BFGS, for Adam.")
@click.option("--rounds", type=click.IntRange(0), help="Of a fit's refinement; more is better.")
@click.option("--learn_grid/--no-learn_grid", default=None, help="The noise levels as well.")
@click.option("--try_schedules", is_flag=True, default=None, help="A fit takes the best of three.")
@click.option("--robust", is_flag=True, help="Refine once more by a loss for stray samples.")
@click.option("--checkpointing", is_flag=True, help="Gradients in less memory, more time.")
@click.option("--validation", type=COUNT, default=32, help="Trajectories apart from training.")
@click.option("--fine_steps", type=click.IntRange(3), default=33, help="Of the fine solution.")
@click.option("--tick", type=Positive, default=1.0, help="Thousands between checkpoints.")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of the network."
)
@click.option("--teacher-cache", type=click.Path(path_type=Path), help="Keep trajectories here.")
@click.option("--cache_gb", type=Positive, default=4.0, help="Its largest size.")
@click.option("--resume", help="A run's folder, a checkpoint, or latest.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: exps/00001-WHAT.")
@click.option("--device", type=Device(), default="auto")
@click.option("--dry-run", is_flag=True, help="Print the resolved settings, and do nothing.")
@click.pass_context
@one_line_errors
def main(
    ctx: click.Context, dry_run: bool, resume: str | None, outdir: Path | None, **options: Any
) -> None:
    """Learn the table of a predictor and write it into a numbered folder of exps/.

    \b
    python train_distill.py --num_steps 4 --num_points 2
    python train_distill.py --preset cifar10-5nfe --model edm-cifar10.pkl --features inception.pt
    torchrun --nproc_per_node=2 train_distill.py --method gradient --total_kimg 2
    """  # noqa: D301
    given = {n for n in options if ctx.get_parameter_source(n) != ParameterSource.DEFAULT}
    path = run_folder(resume) if resume else None
    config = configured(options, given, path)
    check_ranges(ctx, config)
    if dry_run and config.preset and "model" not in given:
        echo(resolved(config, is_flow=is_flow(config)), {"model": None})
        return
    check_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    device = torch.device("cpu") if dry_run else ranks.init(options["device"])
    config, around = surroundings(config, given, options | {"dry_run": dry_run}, device)
    stop = Stop()
    around = dataclasses.replace(around, poll=stop.poll)
    task = make_task(config, around)
    network = network_of(config, around.backend)
    silent = dry_run or not ranks.is_first()
    bar = tqdm(desc=config.method, unit="it", disable=silent, delay=1)
    company = Company(
        ranks=around.ranks,
        rank=around.rank,
        reduce=ranks.all_reduce_sum,
        agree=stop.agree,
        tell=partial(tell, bar),
        network=network,
    )
    job = make_job(task, company)
    if dry_run:
        echo(config, {"sigmas": task.student.plan.sigmas})
        return
    folder = open_folder(config, path, outdir, resume)
    try:
        with stop.listening():
            run(job, task, company, folder, stop)
    except Stopped:
        ranks.close()
        sys.exit(128 + (stop.signal or 15))
    finally:
        bar.close()
    calls, rows = calls_and_rows(config)
    folder.log(f"{calls} sequential calls, {rows} rows an image: {folder.path / 'predictor.pkl'}")
    ranks.close()


def check_ranges(ctx: click.Context, config: Config) -> None:
    """ValueError where a setting, of a file say, is not what its option takes."""
    for option in ctx.command.params:
        value = getattr(config, option.name or "", None)
        try:
            option.type_cast_value(ctx, value)
        except click.UsageError as error:
            raise ValueError(f"{option.name} {value!r}: {error.message}") from error


def is_flow(config: Config) -> bool:
    """Whether settings are those of flow matching, where no model is at hand."""
    return config.backend in FLOW_BACKENDS or config.schedule_type == "flowmatch"


def surroundings(
    config: Config, given: set[str], options: Mapping[str, Any], device: torch.device
) -> tuple[Config, Surroundings]:
    """The model and what else there is; the settings resolved for it."""
    if config.preset and "model" not in given and config.model == Config.model:
        raise ValueError(f"preset {config.preset} needs its network: give --model PATH")
    path = find_model(config.model)
    resolved(config, is_flow=is_flow(config))
    prompts = read_prompts(config.prompts) if config.prompts else ()
    cache = None if options["dry_run"] else options["teacher_cache"]
    if cache:
        cache = Cache(cache, int(options["cache_gb"] * 1e9), partial(click.echo, err=True))
        cache.check()
    about = ModelOptions(
        size=(config.resolution, config.resolution) if config.resolution else None,
        negative_prompt=config.negative_prompt,
        config=config.model_config,
    )
    backend = load_backend(str(path), device=device, dtype=DTYPES[config.dtype], options=about)
    found = family(backend)
    if config.backend not in ("auto", found):
        raise ValueError(f"backend {config.backend} is not that of {path}: it is {found}")
    flow = backend.levels.process.name == "flow"
    config = dataclasses.replace(config, backend=found)
    config = resolved(config, is_flow=flow, shape=backend.latent_shape)
    return config, Surroundings(
        backend,
        fingerprint=fingerprint(path) if cache else "",
        cache=cache,
        prompts=prompts,
        rank=ranks.rank(),
        ranks=ranks.world_size(),
    )


def network_of(config: Config, backend: Backend) -> Network | None:
    """The network of features on what a state decodes to, loaded once."""
    if not {"inception", "features"} & {config.distance, config.last_distance}:
        return None
    if config.features is None:
        raise ValueError("inception and features need their network: give --features FILE")
    if config.features == FEATURES:
        maps = load_features(backend.device).maps
        return compose(backend.decode, lambda images: maps(prepared(images)).mean((2, 3)))
    network = load_network(config.features, backend.device)
    if "inception" in (config.distance, config.last_distance):
        return compose(backend.decode, lambda images: inception(network, images))
    return compose(backend.decode, network)


def inception(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Features of NVIDIA's TorchScript Inception: images [B, C, H, W] in [0, 1] -> [B, 2048]."""
    return network(images.expand(-1, 3, -1, -1) * 255, return_features=True)


def tell(bar: Any, name: str, value: float) -> None:
    """A number beside the bar."""
    bar.set_postfix({name: f"{value:.4g}"})
    bar.update()


def open_folder(
    config: Config, path: Path | None, outdir: Path | None, resume: str | None
) -> Folder:
    """Where the run writes: a new folder, the given one, or the one that it goes on in."""
    text = ""
    if ranks.is_first():
        if path and resume and resume.endswith(".pt"):
            start_from(Path(resume), path)
        text = str(path or new_folder(config, outdir))
    place = Path(ranks.gather_objects(text)[0])
    return Folder(place, partial(tqdm.write, file=sys.stderr), ranks.is_first())


def echo(config: Config, more: Mapping[str, Any]) -> None:
    """The settings as JSON."""
    calls, rows = calls_and_rows(config)
    counts = {"trajectories": config.trajectories, "nfe": calls, "evaluations": rows}
    click.echo(to_json(dataclasses.asdict(config) | counts | dict(more), 2))


if __name__ == "__main__":
    main()
