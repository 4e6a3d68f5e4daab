"""Distil a predictor: a model and a teacher -> a table of few parallel steps."""

import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from tqdm import tqdm
from yaml import YAMLError

from backends.base import Backend, ModelOptions, Prompt
from backends.load import find_model, load_backend, published_model
from backends.spread import spread
from eval.features import load_space
from rewards.efficientnet import load_features, prepared
from rewards.registry import Setup, load_reward, reads_texts
from solvers.predictor import save_predictor
from solvers.recipe import FLOW_BACKENDS
from src import ranks
from src.files import nearest, read_text, to_json, write_text
from src.functions import name_of, own_function
from src.options import DTYPES, BoolFlag, Device, Number, OneLineCommand
from src.runs import Run, Stop, Stopped, checkpoints, find_run, new_run, read_sealed
from src.seeds import randint
from src.text import read_prompts
from training.distances import OF_FEATURES, load_network
from training.distill import best_sampler, learn, predictor_of
from training.plots import draw_losses, draw_table
from training.settings import GRADIENT_ALONE, SMALL, Backbone, Settings, preset, resolved
from training.student import rmse
from training.teacher import Cache, Model, Problem, fingerprint, make_problem

CONFIG = "config.yaml"
MOVABLE = ("model", "prompts", "features", "model_config", "init")
"""Settings that may differ where a run goes on: files may have moved."""
FIELDS = [f for kind in (Backbone, Settings) for f in dataclasses.fields(kind)]
DEFAULTS: dict[str, Any] = {f.name: f.default for f in FIELDS if f.name != "device"}


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option for each of the settings."""
    for field in reversed([f for f in FIELDS if f.name != "device"]):
        about = field.metadata
        names, flag = about["names"] or (f"--{field.name}",), about["kind"] is click.BOOL
        names = (f"--{field.name}/--no-{field.name}",) if flag else names
        kind = {"cls": BoolFlag} if flag else {"type": about["kind"]}
        option = click.option(
            *names, field.name, default=field.default, help=about["help"], **kind
        )
        command = option(command)
    return command


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@settings_options
@click.option("--total_kimg", type=Number(0, min_open=True), help="samples, in thousands.")
@click.option("--guidance_type", type=click.Choice(["uncond", "cfg"]), help="As the rate says.")
@click.option("--teacher-cache", type=click.Path(path_type=Path), help="Keep trajectories here.")
@click.option("--cache_gb", type=Number(0, min_open=True), default=4.0, help="Its largest size.")
@click.option("--resume", help="A run's folder, a checkpoint, or latest.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: exps/00001-WHAT.")
@click.option("--points_degree", type=click.IntRange(1), default=1, help="Ranks for a call.")
@click.option("--compile", cls=BoolFlag, help="Compile the network: slow to start, then fast.")
@click.option("--device", type=Device(), default="auto")
@click.option("--dry-run", is_flag=True, help="Print the resolved settings, and do nothing.")
@click.pass_context
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
    folder = find_run(resume, Path("exps"), settings=CONFIG) if resume else None
    backbone, settings = configured(options, given, folder)
    if backbone.preset and backbone.model == Backbone.model:
        if not dry_run:
            raise ValueError(f"preset {backbone.preset} needs its network: give --model PATH")
        flow = backbone.backend in FLOW_BACKENDS or settings.schedule == "flowmatch"
        looks, shape = bool(backbone.features), (SMALL,)  # no published model is smaller
        settings = resolved(settings, flow=flow, shape=shape, features=looks)
        click.echo(to_json(vars(backbone) | vars(settings), 2))
        return
    stop, cache = Stop(), None
    if options["teacher_cache"] and not dry_run:
        say = functools.partial(click.echo, err=True)
        cache = Cache(options["teacher_cache"], int(options["cache_gb"] * 1e9), say)
    device = torch.device("cpu") if dry_run else ranks.init(options["device"])
    mesh = None if dry_run else ranks.point_mesh(options["points_degree"], device)
    if settings.name == Settings.name:
        settings = replace(settings, name=backbone.model.rstrip("/").rpartition("/")[2])
    with ranks.progress(None, "call") as bar:

        def poll() -> None:
            """Before a call of the network: count it, and stop here where that is asked for."""
            bar.update()
            stop.poll()

        def agreed(tensor: Tensor) -> Tensor:
            """The sum over ranks, where none of them is to stop."""
            stop.agree()
            return ranks.all_reduce_sum(tensor)

        model = opened(backbone, settings, device)
        denoise = model.backend.denoise
        compiled = torch.compile(denoise) if options["compile"] else denoise
        model = replace(model, backend=spread(replace(model.backend, denoise=compiled), mesh))
        if cache:
            path = find_model(backbone.model)
            key = fingerprint(path) if path.exists() else backbone.model
            model = replace(model, cache=cache, about={**model.about, "model": key})
        problem = make_problem(replace(model, poll=poll, reduce=agreed), settings)
        if mesh and (cache or problem.settings.method != "fit"):
            raise ValueError("--points_degree is for --method fit without --teacher-cache")
        if dry_run:
            levels = {"backend": model.backend.family, "sigmas": problem.student.sigmas}
            click.echo(to_json(vars(backbone) | vars(problem.settings) | levels, 2))
            return
        run = open_run(backbone, problem.settings, folder, outdir)
        say_notices(run, backbone, settings, problem.settings)
        try:
            with stop.listening():
                distil(problem, run, stop, resume)
        except Stopped:
            run.log("stopped: go on with --resume")
            sys.exit(stop.exit_status)
        finally:
            ranks.close()


def distil(problem: Problem, run: Run, stop: Stop, resume: str | None) -> None:
    """Learn tick by tick, writing what each gives into the run's folder.

    Raises ValueError for a checkpoint of other settings, and where nothing can be learned.
    """
    state, tick, started = {}, 0, time.monotonic()
    settings = {**vars(Backbone()), **problem.model.training, **vars(problem.settings)}
    settings["shape"] = list(problem.model.backend.shape)
    if resume and checkpoints(run.folder):
        by_name = resume.endswith(".pt")
        path, content = (Path(resume), read_sealed(resume)) if by_name else run.newest()
        for name, was in content["settings"].items():
            if name not in MOVABLE and settings.get(name, was) != was:
                raise ValueError(f"{path} was made with {name} {was}: mend {CONFIG}")
        state, tick = content["state"], content["ticks"]
        run.log(f"going on from {path.name}")
    run.rewind(tick)
    for tick, (what, metrics) in enumerate(learn(problem, state), tick + 1):  # noqa: B020
        stop.held = True
        sampler = best_sampler(problem, state)
        metrics |= {"rmse_teacher": rmse(sampler, problem.validation)}
        metrics |= {"rmse_fine": rmse(sampler, problem.reference)}
        metrics |= {"seconds": time.monotonic() - started}
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        said = ", ".join(f"{n} {v:.5g}" for n, v in finite.items() if v is not None)
        run.log(f"tick {tick}, {what}: {said}")
        run.measure(tick, finite)
        if run.writes:
            for name in (f"predictor-{tick:05d}.pkl", "predictor.pkl"):
                save_predictor(predictor_of(problem, state), run.folder / name)
        run.save(tick, {"ticks": tick, "settings": settings, "state": state})
        stop.held = False
        stop.poll()
    if run.writes:
        predictor = predictor_of(problem, state)
        draw_table(predictor, best_sampler(problem, state).sigmas, run.folder / "table.png")
        draw_losses(run.metrics.read(), run.folder / "loss.png")
        cost = f"{predictor.nfe} sequential calls, {predictor.evaluations} rows an image"
        run.log(f"{cost}: predictor.pkl")


def configured(
    options: Mapping[str, Any], given: set[str], folder: Path | None
) -> tuple[Backbone, Settings]:
    """The settings of a run that goes on, or of a preset under those that were given.

    Raises ValueError where an explicit option is not that of the run, or contradicts another.
    """
    kimg, values = options["total_kimg"], dict(options)
    if kimg is not None and "samples" in given:
        raise ValueError("give either --samples or --total_kimg, not both")
    if kimg is not None:
        values, given = values | {"samples": max(1, round(kimg * 1000))}, {*given, "samples"}
    if "name" in given and "model" not in given and not folder:  # a run has its own
        values["model"] = published_model(options["name"], options["backend"])
    if options["guidance_type"] == "uncond" and "guidance_rate" not in given and not folder:
        values, given = values | {"guidance_rate": 1.0}, {*given, "guidance_rate"}
    if folder:
        run = {**DEFAULTS, **read_config(folder / CONFIG)}  # older ones lack some
        asked = {n: v for part in split(values) for n, v in vars(part).items()}
        if "samples" in given:
            asked["samples"] = max(1, round(asked["samples"] / run["batch"])) * run["batch"]
        for name in sorted(given & run.keys()):
            if asked[name] != run[name]:
                raise ValueError(f"--{name} {asked[name]}: the run has {run[name]}, leave it out")
        values = run
    elif options["preset"]:
        values |= {n: v for n, v in preset(options["preset"]).items() if n not in given}
        if options["method"] == "fit":
            values |= {n: DEFAULTS[n] for n in {*GRADIENT_ALONE, "last_distance", "alpha"} - given}
    check_guidance(options["guidance_type"], values)
    return split(values)


def check_guidance(kind: str | None, values: Mapping[str, Any]) -> None:
    """ValueError where the rate is another one than --guidance_type says."""
    rate = values["guidance_rate"]
    if kind == "uncond" and rate not in (None, 1):
        raise ValueError(f"guidance_type uncond is guidance_rate 1, not {rate}")
    if kind == "cfg" and rate in (None, 1) and not (rate is None and values["init"]):
        raise ValueError("guidance_type cfg needs a guidance_rate other than 1")


def split(values: Mapping[str, Any]) -> tuple[Backbone, Settings]:
    """Values by their names as those of the backbone and those of the settings."""
    own = vars(Backbone())
    settings = Settings(**{n: v for n, v in values.items() if n in DEFAULTS and n not in own})
    return Backbone(**{n: v for n, v in values.items() if n in own}), settings


def of_features(distances: str) -> list[str]:
    """Those of some distances, joined by +, that look at features."""
    return [each for each in distances.split("+") if any(name in each for name in OF_FEATURES)]


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run; ValueError for a file that is missing or holds other names."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(read_text(path)), resolve=True)
    except (YAMLError, OmegaConfBaseException, AssertionError) as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error
    if isinstance(content, dict) and content.pop("try_schedules", None):  # False was the usual
        raise ValueError(f"{path}: try_schedules is gone: name one with --schedule_type")
    for name in content if isinstance(content, dict) else ["?"]:
        if name not in DEFAULTS:
            near = nearest(str(name), DEFAULTS)
            raise ValueError(f"{path}: unknown setting {name!r}, did you mean {near}?")
    return content


def open_run(
    backbone: Backbone, settings: Settings, folder: Path | None, outdir: Path | None
) -> Run:
    """Where the run writes: a new folder, the given one, or the one that it goes on in.

    Raises ValueError for an outdir that has another run, or is not where this one goes on.
    """
    if folder and outdir and outdir.resolve() != folder.resolve():
        raise ValueError(f"--outdir {outdir}: the run goes on in {folder}, leave it out")
    if ranks.is_first() and folder is None:
        if outdir and (outdir / CONFIG).exists():
            raise ValueError(f"{outdir} has a run already: --resume {outdir}, or another --outdir")
        what = f"{Path(backbone.model).stem}-{settings.num_steps}-{settings.solver}"
        what = re.sub(r"[^A-Za-z0-9._-]", "-", f"{what}-k{settings.points}")
        folder = outdir or new_run(what)
        values = vars(backbone) | {n: v for n, v in vars(settings).items() if n != "device"}
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(values)))
    place = ranks.of_each_rank(str(folder))[0]
    return Run(Path(place), functools.partial(tqdm.write, file=sys.stderr), ranks.is_first())


def say_notices(run: Run, backbone: Backbone, asked: Settings, settings: Settings) -> None:
    """Say what is easily overlooked."""
    if asked.samples not in (None, settings.samples):
        run.log(f"samples {asked.samples} became {settings.samples}, of whole batches")
    both = f"{settings.distance}+{settings.last_distance}"
    if backbone.features and not of_features(both):
        run.log(f"--features {backbone.features} are not looked at by the distance {both}")


def opened(backbone: Backbone, settings: Settings, device: torch.device) -> Model:
    """The backend, what it is told, and what looks at what a state decodes to.

    Raises ValueError where it is not the one that is asked for, or a distance lacks its network.
    """
    b, asked = backbone, f"{settings.distance}+{settings.last_distance}"
    if b.label is not None and b.prompts:
        raise ValueError("give either classes or prompts, not both")
    path, prompts = find_model(b.model), read_prompts(b.prompts) if b.prompts else ()
    size = (b.resolution, b.resolution) if b.resolution else None
    about = ModelOptions(size, b.negative_prompt, b.model_config)
    if b.features is None and (looks := of_features(asked)):
        raise ValueError(f"distance {looks[0]} needs its network: give --features")
    if b.reward is None and "reward" in asked:
        raise ValueError(f"distance {settings.distance} needs its reward: give --reward NAME")
    if b.reward and "reward" not in asked:
        fix = "leave it out, or give --distance l2+0.1*reward, say"
        raise ValueError(f"--reward {b.reward} does nothing: {fix}")
    backend = load_backend(str(path), device=device, dtype=DTYPES[b.dtype], options=about)
    texts = bool(prompts) or isinstance(backend.usual_prompt(0), str)
    if b.reward and (readers := reads_texts([b.reward])) and not texts:
        raise ValueError(f"{readers[0]} judges images by their prompts: this model takes none")
    if b.backend not in ("auto", backend.family):
        raise ValueError(f"backend {b.backend} is not that of {path}: it is {backend.family}")

    def prompt_of(seed: int) -> Prompt:
        if prompts:
            return prompts[int(randint([seed], len(prompts), stream="prompt"))]
        return backend.usual_prompt(seed) if b.label is None else b.label

    by = b.reward or ""
    scorer = load_reward(by, Setup(torch.device(backend.device))) if by else None

    def scored(x: Tensor, numbers: Sequence[int]) -> Tensor:
        assert scorer
        texts = [str(prompt_of(number)) for number in numbers]
        return scorer(backend.decode(x).expand(-1, 3, -1, -1), texts)

    inception = "inception" in asked and is_script(b.features or "")
    key = {"dtype": str(backend.dtype), "prompts": list(prompts)}
    key |= {"class": b.label, "negative_prompt": b.negative_prompt}
    key |= {"model_config": fingerprint(Path(b.model_config))} if b.model_config else {}
    return Model(
        backend,
        lambda seeds: backend.encode([prompt_of(seed) for seed in seeds]),
        features_of(b.features, inception, backend) if b.features else None,
        scored if scorer else None,
        ("inception" if inception else recorded(b.features), by),
        about=key,
        training={n: v for n, v in vars(b).items() if v is not None},
    )


def is_script(features: str) -> bool:
    """Whether features are a TorchScript file."""
    return "=" not in features and features.endswith((".pt", ".pth", ".ts", ".torchscript"))


def recorded(features: str | None) -> str:
    """What a recipe calls features: a function of one's own by the name of what it wraps."""
    if features and ":" in features and not is_script(features):
        return name_of(own_function(features))
    return features or ""


def features_of(name: str, inception: bool, backend: Backend) -> Callable[[Tensor], Tensor]:
    """Features of what a state decodes to: a TorchScript file, a shipped network, or a space.

    A space is one of `eval.features`, as a name (dinov2=FOLDER) or module:function. Raises
    ValueError for features that are missing or unknown, and a side out of range.
    """
    if is_script(name):
        network = load_network(name, backend.device)
        if inception:  # NVIDIA's TorchScript
            return lambda x: network(
                backend.decode(x).expand(-1, 3, -1, -1) * 255, return_features=True
            )
        return lambda x: network(backend.decode(x))
    kind, _, place = name.partition("=")
    if kind == "efficientnet-lite0":  # at a side of 224, or of another, which is faster
        if place and not 8 <= int(place if place.isdecimal() else 0) <= 4096:
            raise ValueError(f"features {name}: the side of its images is 8 to 4096 pixels")
        maps, side = load_features(backend.device).maps, int(place or 224)
        return lambda x: maps(prepared(backend.decode(x), side)).mean((2, 3))
    space = load_space(kind, backend.device, Path(place) if place else None)
    return lambda x: space.network(backend.decode(x).expand(-1, 3, -1, -1))


if __name__ == "__main__":
    main()
