"""Distil a predictor: a model and a teacher -> a table of few parallel steps."""

import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from backends.load import find_model, load_backend
from eval.features import load_space
from rewards.efficientnet import load_features, prepared
from rewards.registry import Setup, load_reward
from solvers.predictor import save_predictor
from solvers.recipe import FLOW_BACKENDS
from src import ranks
from src.files import nearest, read_text, to_json, write_text
from src.options import DTYPES, BoolFlag, Device, Number, OneLineCommand
from src.runs import Run, Stop, Stopped, checkpoints, find_run, new_run, read_sealed
from src.seeds import randint
from src.text import read_prompts
from training.descend import Reward
from training.distances import OF_FEATURES, Network, load_network
from training.distill import best_sampler, learn, predictor_of
from training.plots import draw_losses, draw_table
from training.problem import Model, Problem, make_problem
from training.settings import GRADIENT_ALONE, Settings, preset, resolved
from training.student import rmse
from training.teacher import Cache, fingerprint

CONFIG = "config.yaml"
FEATURES = "efficientnet-lite0"
MOVABLE = ("model", "prompts", "features", "model_config", "init")
"""Settings that may differ where a run goes on: files may have moved."""
SETTINGS: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(Settings) if f.name != "device"
}
BACKENDS = ("auto", "edm", "analytic", "ldm", "sd3", "flux")


@dataclass(frozen=True)
class Backbone:
    """What a command distils, besides its Settings."""

    model: str = "fashion-mnist-32"
    backend: str = "auto"
    preset: str | None = None
    prompts: str | None = None
    label: int | None = None
    negative_prompt: str | None = None
    resolution: int | None = None
    model_config: str | None = None
    features: str | None = None
    reward: str | None = None
    dtype: str = "float32"


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option for each of the settings."""
    for field in reversed(dataclasses.fields(Settings)):
        about = field.metadata
        names, flag = about["names"] or (f"--{field.name}",), about["kind"] is click.BOOL
        names = (f"--{field.name}/--no-{field.name}",) if flag else names
        kind = {"cls": BoolFlag} if flag else {"type": about["kind"]}
        option = click.option(
            *names, field.name, default=field.default, help=about["help"], **kind
        )
        command = command if field.name == "device" else option(command)
    return command


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--preset", help="A published predictor's settings (cifar10-5nfe).")
@click.option("--model", default=Backbone.model, help="Folder, EDM .pkl, or a shipped name.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="What it must be.")
@click.option("--prompts", "--prompt_path", help="A text file, one prompt a line.")
@click.option("--negative_prompt", help="What guidance leads away from.")
@click.option("--resolution", type=click.IntRange(1), help="Of text-to-image models, in pixels.")
@click.option("--model_config", help="Diffusers folder with what a single file lacks.")
@click.option("--class", "label", type=click.IntRange(0), help="Class; else drawn by the seed.")
@click.option("--features", help=f"Of their distances: {FEATURES}, a TorchScript file, KIND=FILE.")
@click.option("--reward", help="Of its distance: a name of rewards/, or module:function.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@click.option("--total_kimg", type=Number(0, min_open=True), help="samples, in thousands.")
@click.option("--guidance_type", type=click.Choice(["uncond", "cfg"]), help="As the rate says.")
@settings_options
@click.option("--teacher-cache", type=click.Path(path_type=Path), help="Keep trajectories here.")
@click.option("--cache_gb", type=Number(0, min_open=True), default=4.0, help="Its largest size.")
@click.option("--resume", help="A run's folder, a checkpoint, or latest.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: exps/00001-WHAT.")
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
    if dry_run and backbone.preset and backbone.model == Backbone.model:
        flow = backbone.backend in FLOW_BACKENDS or settings.schedule == "flowmatch"
        click.echo(to_json(vars(backbone) | vars(resolved(settings, flow=flow)), 2))
        return
    stop = Stop()
    device = torch.device("cpu") if dry_run else ranks.init(options["device"])
    cache = None if dry_run else options["teacher_cache"]
    if cache:
        cache = Cache(
            cache, int(options["cache_gb"] * 1e9), functools.partial(click.echo, err=True)
        )
    backend, model = opened(backbone, settings, device, cache)
    if settings.name == Settings.name:
        settings = replace(settings, name=backbone.model.rstrip("/").rpartition("/")[2])
    bar = ranks.progress(None, "call")
    model = replace(
        model, poll=functools.partial(called, stop, bar), report=functools.partial(shown, bar)
    )
    problem = make_problem(replace(model, reduce=functools.partial(agreed, stop)), settings)
    if dry_run:
        levels = {"backend": backend.family, "sigmas": problem.student.sigmas}
        click.echo(to_json(vars(backbone) | vars(problem.settings) | levels, 2))
        return
    run = open_run(backbone, problem.settings, folder, outdir)
    with stop.listening():
        try:
            distil(problem, run, stop, resume)
        except Stopped:
            run.log("stopped: go on with --resume")
            sys.exit(stop.exit_status)
        finally:
            bar.close()
            ranks.close()


def distil(problem: Problem, run: Run, stop: Stop, resume: str | None) -> None:
    """Learn tick by tick, writing what each gives into the run's folder."""
    state, tick, started = {}, 0, time.monotonic()
    if resume and checkpoints(run.folder):
        path, content = newest(run, resume)
        for name, was in content["settings"].items():
            if name not in MOVABLE and vars(problem.settings).get(name, was) != was:
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
        settings = dataclasses.asdict(problem.settings)
        run.save(tick, {"ticks": tick, "settings": settings, "state": state})
        stop.held = False
        stop.poll()
    if run.writes:
        predictor = predictor_of(problem, state)
        draw_table(predictor, best_sampler(problem, state).sigmas, run.folder / "table.png")
        draw_losses(run.metrics.read(), run.folder / "loss.png")
        cost = f"{predictor.nfe} sequential calls, {predictor.evaluations} rows an image"
        run.log(f"{cost}: predictor.pkl")


def newest(run: Run, resume: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that is asked for by its name, or the newest that is whole."""
    if resume.endswith(".pt"):
        return Path(resume), read_sealed(resume)
    return run.newest()


def configured(
    options: Mapping[str, Any], given: set[str], folder: Path | None
) -> tuple[Backbone, Settings]:
    """The settings of a run that goes on, or of a preset under those that were given.

    Raises ValueError where an explicit option is not that of the run.
    """
    kimg, values = options["total_kimg"], dict(options)
    if kimg is not None:
        values, given = values | {"samples": max(1, round(kimg * 1000))}, {*given, "samples"}
    if "name" in given and "model" not in given:
        values["model"] = options["name"]
    if options["guidance_type"] == "uncond" and options["guidance_rate"] != 1:
        raise ValueError("guidance_type uncond is guidance_rate 1")
    if folder:
        values = going_on(values, given, read_config(folder / CONFIG))
    elif options["preset"]:
        values |= {n: v for n, v in preset(options["preset"]).items() if n not in given}
        if options["method"] == "fit":
            idle = {*GRADIENT_ALONE, "last_distance"} - given
            values |= {n: SETTINGS[n] for n in idle}
    return split(values)


def split(values: Mapping[str, Any]) -> tuple[Backbone, Settings]:
    """Values by their names as those of the backbone and those of the settings."""
    backbone = {n: values[n] for n in vars(Backbone()) if n in values}
    return Backbone(**backbone), Settings(**{n: values[n] for n in SETTINGS if n in values})


def going_on(options: Mapping[str, Any], given: set[str], run: dict[str, Any]) -> dict[str, Any]:
    """The values of a run; ValueError for an explicit option that is not the run's."""
    asked = {n: v for part in split({n: options[n] for n in given}) for n, v in vars(part).items()}
    if "samples" in given:
        asked["samples"] = max(1, round(asked["samples"] / run["batch"])) * run["batch"]
    for name in sorted(given & run.keys()):
        if asked[name] != run[name]:
            raise ValueError(f"--{name} {asked[name]}: the run has {run[name]}, leave it out")
    return run


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run; ValueError for a file that is missing or holds other names."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(read_text(path)), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error
    names = [*vars(Backbone()), *SETTINGS]
    for name in content if isinstance(content, dict) else ["?"]:
        if name not in names:
            near = nearest(str(name), names)
            raise ValueError(f"{path}: unknown setting {name!r}, did you mean {near}?")
    return content


def open_run(
    backbone: Backbone, settings: Settings, folder: Path | None, outdir: Path | None
) -> Run:
    """Where the run writes: a new folder, the given one, or the one that it goes on in."""
    text = ""
    if ranks.is_first() and folder is None:
        if outdir and (outdir / CONFIG).exists():
            raise ValueError(f"{outdir} has a run already: --resume {outdir}, or another --outdir")
        what = f"{Path(backbone.model).stem}-{settings.num_steps}-{settings.solver}"
        what = re.sub(r"[^A-Za-z0-9._-]", "-", f"{what}-k{settings.points}")
        folder = outdir or new_run(what)
        values = vars(backbone) | {n: v for n, v in vars(settings).items() if n != "device"}
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(values)))
    text = ranks.gather_objects(str(folder))[0]
    return Run(Path(text), functools.partial(tqdm.write, file=sys.stderr), ranks.is_first())


def opened(
    backbone: Backbone, settings: Settings, device: torch.device, cache: Cache | None
) -> tuple[Backend, Model]:
    """The backend, and what of it is distilled.

    Raises ValueError where it is not the one that is asked for, or features lack their network.
    """
    if backbone.preset and backbone.model == Backbone.model:
        raise ValueError(f"preset {backbone.preset} needs its network: give --model PATH")
    if backbone.label is not None and backbone.prompts:
        raise ValueError("give either classes or prompts, not both")
    path = find_model(backbone.model)
    prompts = read_prompts(backbone.prompts) if backbone.prompts else ()
    size = (backbone.resolution, backbone.resolution) if backbone.resolution else None
    about = ModelOptions(size, backbone.negative_prompt, backbone.model_config)
    dtype = DTYPES[backbone.dtype]
    backend = load_backend(str(path), device=device, dtype=dtype, options=about)
    if backbone.backend not in ("auto", backend.family):
        raise ValueError(
            f"backend {backbone.backend} is not that of {path}: it is {backend.family}"
        )

    def prompt_of(seed: int) -> Prompt:
        if prompts:
            return prompts[int(randint([seed], len(prompts), stream="prompt"))]
        return backend.usual_prompt(seed) if backbone.label is None else backbone.label

    levels, plain = backend.levels, {n: v for n, v in vars(backbone).items() if v is not None}
    flow = levels.process.name == "flow"
    recipe = {
        "backend": backend.family,
        "backend_config": dict(backend.config),
        "img_resolution": round(math.sqrt(math.prod(backend.size))),
        "sigma_min": levels.sigma_min,
        "sigma_max": levels.sigma_max,
        "flowmatch_shift": levels.shift if flow else None,
        "flowmatch_mu": levels.mu if flow else None,
        "source": "train_distill.py",
    }
    key = {"model": fingerprint(path) if cache else "", "dtype": str(backend.dtype)}
    key |= {"prompts": list(prompts), "class": backbone.label}
    key |= {"negative_prompt": backbone.negative_prompt}
    features, reward, fitted_on = looks_of(backbone, settings, backend, prompt_of)
    model = Model(
        backend.denoise,
        levels,
        backend.shape,
        lambda seeds: backend.encode([prompt_of(seed) for seed in seeds]),
        backend.guide,
        features,
        reward,
        fitted_on,
        device=backend.device,
        dtype=backend.dtype,
        cache=cache,
        about=key,
        recipe=recipe,
        training=plain,
    )
    return backend, model


def shown(bar: tqdm, value: float) -> None:
    """Beside the bar, what a refinement makes small."""
    bar.set_postfix_str(f"{value:.4g}", refresh=False)


def called(stop: Stop, bar: tqdm) -> None:
    """Before a call of the network: count it, and stop here where that is asked for."""
    bar.update()
    stop.poll()


def agreed(stop: Stop, tensor: Tensor) -> Tensor:
    """The sum over ranks, where none of them is to stop."""
    stop.agree()
    return ranks.all_reduce_sum(tensor)


def looks_of(
    backbone: Backbone, settings: Settings, backend: Backend, prompt_of: Callable[[int], Prompt]
) -> tuple[Network | None, Reward | None, tuple[str, ...]]:
    """The network of features and the reward that the distances ask for, and their names.

    Both look at what a state decodes to. Raises ValueError where one is asked for but not given.
    """
    asked, names = f"{settings.distance}+{settings.last_distance}", []
    features: Network | None = None
    reward: Reward | None = None
    if any(name in asked for name in OF_FEATURES) and backbone.features is None:
        raise ValueError(f"distance {settings.distance} needs its network: give --features")
    if backbone.features is not None:
        features = features_of(backbone.features, "inception" in asked, backend)
        names.append(backbone.features)
    if "reward" in asked:
        if backbone.reward is None:
            raise ValueError(f"distance {settings.distance} needs its reward: give --reward NAME")
        scorer = load_reward(backbone.reward, Setup(torch.device(backend.device)))
        names.append(backbone.reward)

        def scored(x: Tensor, numbers: Sequence[int]) -> Tensor:
            prompts = [str(prompt_of(number)) for number in numbers]
            return scorer(backend.decode(x).expand(-1, 3, -1, -1), prompts)

        reward = scored
    return features, reward, tuple(names)


def features_of(name: str, inception: bool, backend: Backend) -> Network:
    """Features of what a state decodes to: a TorchScript file, a shipped network, or a space.

    A space is one of `eval.features`, as a name (dinov2=FOLDER) or module:function.
    """
    if name.endswith((".pt", ".pth", ".ts", ".torchscript")):
        network = load_network(name, backend.device)
        if inception:  # NVIDIA's TorchScript
            return lambda x: network(
                backend.decode(x).expand(-1, 3, -1, -1) * 255, return_features=True
            )
        return lambda x: network(backend.decode(x))
    kind, _, place = name.partition("=")
    if kind == FEATURES:  # at a side of 224, or FEATURES=SIDE, which is faster
        maps, side = load_features(backend.device).maps, int(place or 224)
        return lambda x: maps(prepared(backend.decode(x), side)).mean((2, 3))
    space = load_space(kind, backend.device, Path(place) if place else None)
    return lambda x: space.network(backend.decode(x).expand(-1, 3, -1, -1))


if __name__ == "__main__":
    main()
