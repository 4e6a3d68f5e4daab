"""Train a predictor's table by PPO on image rewards.

python -m training.ppo.launch --config training/ppo/cfgs/sd3_512.yaml
"""

import dataclasses
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from backends.base import Backend, ModelOptions, Prompt
from backends.load import backbone_of, check_fit, find_model, kind, load_backend, usual_size
from backends.spread import spread
from rewards.registry import (
    ADAPTERS,
    Setup,
    files_of,
    load_rewards,
    own_function,
    reads_texts,
    singles,
)
from rewards.scorer import check_rewards, names_of, score_all
from rewards.weights import BACKBONES, broken, require
from solvers.epd import MultistepTable
from solvers.predictor import Predictor, find_predictor, load_predictor
from solvers.recipe import Recipe
from src import ranks
from src.files import to_json
from src.options import DTYPES, Device, OneLineCommand
from src.runs import LATEST, Stop, Stopped, find_run, new_run
from src.text import read_prompts
from training.ppo.config import MULTI, Config, Ppo, check_ranks, load_config, resolved, to_yaml
from training.ppo.policy import start_of
from training.ppo.rollout import Task, check_features, thumbnails
from training.ppo.trainer import SETTINGS, train
from training.teacher import fingerprint

CLASSES = ("edm", "analytic")
"""Backends whose prompts are class numbers."""


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--config", "file", help="A file of training/ppo/cfgs; else that of --resume.")
@click.option("--override", multiple=True, help="section.key=value; again for another.")
@click.option("--run-name", "--run_name", help="Instead of run.run_name.")
@click.option("--max-steps", "--max_steps", type=click.IntRange(1), help="Stop there this time.")
@click.option("--resume", help="A checkpoint, a run's folder, or latest.")
@click.option("--points_degree", type=click.IntRange(1), default=1, help="Ranks for an image.")
@click.option("--device", type=Device(), default="auto")
@click.option("--dry-run", is_flag=True, help="Check, print the settings, and do nothing.")
def main(
    file: str | None,
    override: tuple[str, ...],
    run_name: str | None,
    max_steps: int | None,
    resume: str | None,
    points_degree: int,
    device: torch.device,
    dry_run: bool,
) -> None:
    """Raise the reward of a predictor's images: its table is the mean of what PPO makes of it.

    \b
    python -m training.ppo.launch --config training/ppo/cfgs/tiny_sd3.yaml --override ppo.steps=100
    torchrun --nproc_per_node=4 -m training.ppo.launch --config training/ppo/cfgs/sd3_512.yaml
    python -m training.ppo.launch --resume latest
    """  # noqa: D301
    changes = (*override, *([f"run.run_name={to_json(run_name)}"] if run_name else []))
    config, folder = settings(file, changes, resume)
    check_ranks(config.ppo, int(os.environ.get("WORLD_SIZE", "1")) // points_degree)
    predictor = load_predictor(find_predictor(config.data.predictor_snapshot))
    config = resolved(config, predictor.recipe)
    prompts = prompts_of(config)
    if dry_run:
        click.echo(to_yaml(config), nl=False)
        for line in lacking(config, predictor.recipe, prompts[0]):
            click.echo(f"before it can run: {line}", err=True)
        return
    for line in lacking(config, predictor.recipe, prompts[0]):
        raise ValueError(line)
    device = ranks.init(device)
    mesh = ranks.point_mesh(points_degree, device)
    task = make_task(config, predictor, prompts, device)
    if config.ppo.features:
        check_features(task)
    task = dataclasses.replace(task, backend=spread(task.backend, mesh))
    if folder is None:
        name, root = config.run.run_name, config.run.output_root
        new = new_run(name, root, stamped=True) if ranks.is_first() else ""
        folder = Path(ranks.of_each_rank(str(new))[0])
    stop, say = Stop(), partial(tqdm.write, file=sys.stderr)
    ppo = config.ppo
    if ppo.watch == config.reward.type:  # multi has its weights in its name
        ppo = dataclasses.replace(ppo, watch=config.reward.name)
    start = (Path(resume) if Path(resume).is_file() else folder) if resume else None
    try:
        with stop.listening():
            outcome = train(
                task,
                ppo,
                config.logging,
                folder,
                resume=start,
                until=max_steps,
                settings=config,
                stop=stop,
                say=say,
            )
    except Stopped:
        ranks.close()
        sys.exit(stop.exit_status)
    if ranks.is_first():
        click.echo(f"{outcome.steps} steps in {folder}; best: {outcome.best or 'not evaluated'}")
    ranks.close()


def settings(
    file: str | None, changes: Sequence[str], resume: str | None
) -> tuple[Config, Path | None]:
    """The settings, and the folder of the run that goes on, if one does.

    Raises ValueError where neither a file nor a run has them, and where a run that is given by its
    path is to have another name or place.
    """
    given = load_config(file, changes) if file else None
    if resume is None:
        if given is None:
            raise ValueError("--config is missing: training/ppo/cfgs/sd3_512.yaml, say")
        return given, None
    asked = dict(change.split("=", 1) for change in changes if "=" in change)
    root = given.run.output_root if given else asked.get("run.output_root", "exps")
    name = given.run.run_name if given else asked.get("run.run_name", "*").strip('"')
    pattern = "checkpoints/checkpoint-*.pt"
    folder = find_run(resume, Path(root), settings=SETTINGS, name=name, checkpoints=pattern)
    if resume != LATEST and {"run.run_name", "run.output_root"} & asked.keys():
        said = f"--resume {resume} goes on in its own folder"
        raise ValueError(f"{said}: leave out --run-name and run.output_root")
    return given or load_config(folder / SETTINGS, changes), folder


def prompts_of(config: Config) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """What is trained on, and what is held out: ppo.eval_prompts, evenly from their file, or all.

    Without a file of their own they are drawn from the others by the seed, and taken out. Models
    of classes have their numbers, one a line, and may hold out the same ones on other noises.
    Raises ValueError for too few prompts, a text that is in both, and a class that is no number.
    """
    data, wanted = config.data, config.ppo.eval_prompts
    prompts = tuple(dict.fromkeys(read_prompts(str(data.prompt_csv))))
    if data.heldout_prompts:
        others = tuple(dict.fromkeys(read_prompts(data.heldout_prompts)))
        both = set(prompts) & set(others)
        if both and config.model.backend not in CLASSES:
            said = f"{min(both)!r} is in {data.prompt_csv} and in {data.heldout_prompts}"
            raise ValueError(f"{said}: held-out prompts are not trained on, drop it from one")
        if len(others) < 2:
            raise ValueError(f"{data.heldout_prompts} has {len(others)} prompt: 2 or more")
        count = min(wanted, len(others))
        held_out = tuple(others[i * len(others) // count] for i in range(count))
    elif wanted < len(prompts):
        drawn = random.Random(f"{config.run.seed} held out").sample(prompts, wanted)
        prompts, held_out = tuple(p for p in prompts if p not in set(drawn)), tuple(drawn)
    else:
        said = f"ppo.eval_prompts {wanted} leaves none of {data.prompt_csv}, which has"
        raise ValueError(f"{said} {len(prompts)}: lower it, or give data.heldout_prompts")
    if config.model.backend not in CLASSES:
        return prompts, held_out
    wrong = [text for text in (*prompts, *held_out) if not text.isdecimal()]
    if wrong:
        said = f"model.backend {config.model.backend} takes class numbers for prompts"
        raise ValueError(f"{said}, not {wrong[0]!r}: mend {data.prompt_csv}")
    return tuple(map(int, prompts)), tuple(map(int, held_out))


def lacking(config: Config, recipe: Recipe, prompts: Sequence[Prompt]) -> Iterator[str]:
    """What stands in the way, as far as can be seen without loading anything."""
    rewards = [config.reward.name, *config.reward.judges]
    if (readers := reads_texts(rewards)) and not all(isinstance(p, str) for p in prompts):
        yield f"{readers[0]} judges images by their prompts: this model takes none"
    own = [single for single in singles(rewards) if single not in ADAPTERS]
    checks = (
        lambda: files_of(rewards, weight_paths(config)),
        *(partial(own_function, single) for single in own),
        lambda: model_of(config, recipe),
        lambda: features_of(config),
    )
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def model_of(config: Config, recipe: Recipe) -> str:
    """The model, where it is on this machine; ValueError where it is not, or not whole."""
    name = config.model.model or backbone_of(recipe)
    ours = [key for key, weight in BACKBONES.items() if weight.repo == name]
    if ours and not Path(name).exists():
        name = str(require(ours[:1])[ours[0]])
    path = find_model(name)
    exact = (path / "config.json").is_file() and kind(path) == "analytic"  # it has no weights
    wrong = broken(path) if path.exists() and not exact else ""
    if wrong:
        raise ValueError(f"model.model {path}: {wrong}")
    if config.model.backend_options.model_config:
        find_model(config.model.backend_options.model_config)
    return name


def features_of(config: Config) -> Callable[[Tensor], Tensor]:
    """The features of ppo.features; ValueError where they cannot be imported."""
    return own_function(config.ppo.features) if config.ppo.features else thumbnails


def weight_paths(config: Config) -> dict[str, str]:
    """reward.weights_path by the names of the table of weights; one path is the reward's own.

    Raises ValueError for one path where the reward has no weights.
    """
    paths, name = config.reward.weights_path, config.reward.type
    if isinstance(paths, dict):
        return paths
    if not paths:
        return {}
    adapter = ADAPTERS.get(name)
    if adapter is None or not adapter.weights:
        raise ValueError(f"reward.weights_path {paths!r} does nothing for {name}: leave it out")
    weights = adapter.weights  # of an aesthetic score CLIP's stand before its own
    return {name if name in weights else weights[0]: paths}


def make_task(
    config: Config,
    predictor: Predictor,
    prompts: tuple[tuple[Prompt, ...], tuple[Prompt, ...]],
    device: torch.device,
) -> Task:
    """The rewards, the model, and the predictor's sampler on it, loaded.

    Raises ValueError where files are missing, settings, model and table do not fit, or a reward
    or judge fails.
    """
    reward, options = config.reward, config.model.backend_options

    def say(notice: str) -> None:
        if ranks.is_first():
            click.echo(notice, err=True)

    if reward.multi.weights and reward.type != MULTI:
        say(f"reward.multi.weights do nothing for reward.type {reward.type}")
    names = [reward.name, *reward.judges]
    setup = Setup(device, reward.enable_amp, weight_paths(config))
    loaded = load_rewards(names, setup)
    files = files_of(names, setup.paths)
    trained = {reward.name: loaded[reward.name]}
    judges = {
        name: partial(score_all, {name: loaded[name]}, batch=reward.batch_size)
        for name in reward.judges
        if name not in names_of(trained)
    }
    backend = open_backend(config, predictor.recipe, prompts, device)
    check_fit(predictor.recipe, backend)
    check_rewards(loaded, backend.size, str(prompts[0][0]), device)
    sampler = predictor.sampler(backend.levels)
    numbers = sorted({p for part in prompts for p in part if isinstance(p, int)})
    rates = (*sampler.extreme_rates, *([2.0] * config.ppo.train_guidance))
    backend.check_rates(rates, backend.encode(numbers or prompts[0][:1]))
    begun = start_of(sampler, config.ppo, lambda _said: None)  # refuses before there is a folder
    if config.ppo.method == "cma" and config.ppo.learning_rate != Ppo.learning_rate:
        say("ppo.learning_rate does nothing for ppo.method cma")
    if config.ppo.train_scale_dir and isinstance(begun.table, MultistepTable):
        say("ppo.train_scale_dir does nothing: multistep weights are free")
    return Task(
        backend,
        sampler,
        predictor.recipe,
        partial(score_all, trained, batch=reward.batch_size),
        reward.name,
        *prompts,
        judges=judges,
        features=features_of(config),
        seed=config.run.seed,
        batch=options.max_batch_size,
        decode_batch=options.decode_batch,
        points_chunk=options.points_chunk,
        about={
            "model.model": Path(config.model.model or "").name,  # its folder may be elsewhere now
            "model.resolution": list(backend.size),
            "model.backend_options.dtype": str(backend.dtype).removeprefix("torch."),
            "model.backend_options.negative_prompt": options.negative_prompt,
            "reward.enable_amp": reward.enable_amp,
            **{f"the weights of {n}": fingerprint(p)[:16] for n, p in sorted(files.items())},
        },
    )


def open_backend(
    config: Config,
    recipe: Recipe,
    prompts: tuple[tuple[Prompt, ...], ...],
    device: torch.device,
) -> Backend:
    """The model; ValueError where it is of another family than the settings say."""
    texts = tuple(text for part in prompts for text in part if isinstance(text, str))
    given, side = config.model.backend_options, config.model.resolution
    options = ModelOptions(
        size=(side, side) if side else usual_size(recipe),
        negative_prompt=given.negative_prompt,
        config=given.model_config,
        cpu_offload=given.cpu_offload,
        vae_tiling=given.vae_tiling,
        vae_slicing=given.vae_slicing,
        encode_first=texts if given.release_encoders else (),
    )
    name, dtype = model_of(config, recipe), DTYPES.get(given.dtype)
    if dtype == torch.float16 and device.type == "cpu":
        click.echo("float16 is slow on a CPU: model.backend_options.dtype=float32, say", err=True)
    backend = load_backend(name, device=device, dtype=dtype, options=options)
    if backend.family != config.model.backend:
        said = f"model.backend {config.model.backend} is not that of {name}"
        raise ValueError(f"{said}, which is {backend.family}: choose another model or backend")
    return backend


if __name__ == "__main__":
    main()
