"""Train a predictor's table by PPO on image rewards.

python -m training.ppo.launch --config training/ppo/cfgs/sd3_512.yaml
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

from backends.base import Backend, ModelOptions, Prompt
from backends.load import family, find_model, load_backend
from backends.methods import check_fit, predictor_method
from rewards.registry import ADAPTERS, Setup, load_rewards, parse
from rewards.scorer import names_of, score_all
from rewards.weights import BACKBONES, broken, require
from solvers.predictor import Predictor
from src import ranks
from src.files import to_json
from src.options import DTYPES, Device, OneLineCommand, one_line_errors
from training.ppo.config import Config, check_ranks, load_config
from training.ppo.data import predictor_of, prompts_of
from training.ppo.runs import RESOLVED, check_same, find_run, keep_settings, new_folder, to_yaml
from training.ppo.task import Task
from training.ppo.trainer import Outcome, train
from training.stop import Stop, Stopped


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--config", "file", help="A file of training/ppo/cfgs; else that of --resume.")
@click.option("--override", multiple=True, help="section.key=value; again for another.")
@click.option("--run-name", "--run_name", help="Instead of run.run_name.")
@click.option("--max-steps", "--max_steps", type=click.IntRange(1), help="Stop there this time.")
@click.option("--resume", help="A checkpoint, a run's folder, or latest.")
@click.option("--device", type=Device(), default="auto")
@click.option("--dry-run", is_flag=True, help="Check, print the settings, and do nothing.")
@one_line_errors
def main(
    file: str | None,
    override: tuple[str, ...],
    run_name: str | None,
    max_steps: int | None,
    resume: str | None,
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
    check_ranks(config.ppo, int(os.environ.get("WORLD_SIZE", "1")))
    predictor = predictor_of(config)
    prompts, held_out = prompts_of(config)
    if dry_run:
        click.echo(to_yaml(config), nl=False)
        for line in lacking(config):
            click.echo(f"before it can run: {line}", err=True)
        return
    check_weights(config)
    device = ranks.init(device)
    task = make_task(config, predictor, (prompts, held_out), device)
    folder = folder or new_folder(config)
    keep_settings(config, folder)
    steps = min(max_steps or config.ppo.steps, config.ppo.steps)
    here = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, steps=steps))
    outcome = run(here, task, folder, resume)
    if ranks.is_first():
        click.echo(f"{outcome.steps} steps in {folder}; best: {outcome.best or 'not evaluated'}")
    ranks.close()


def settings(
    file: str | None, changes: Sequence[str], resume: str | None
) -> tuple[Config, Path | None]:
    """The settings, and the folder of the run that goes on, if one does.

    Raises ValueError where neither a file nor a run tells them, or the two disagree.
    """
    given = load_config(file, changes) if file else None
    if resume is None:
        if given is None:
            raise ValueError("--config is missing: training/ppo/cfgs/sd3_512.yaml, say")
        return given, None
    folder = find_run(resume, given)
    config = given or load_config(folder / RESOLVED, changes)
    check_same(config, folder)
    return config, folder


# --- weights ------------------------------------------------------------------------------


def check_weights(config: Config) -> None:
    """ValueError for the first thing that is not there, or plainly not whole."""
    for line in lacking(config):
        raise ValueError(line)


def lacking(config: Config) -> Iterator[str]:
    """What stands in the way, as far as can be seen without loading anything."""
    for check in (check_rewards, check_model):
        try:
            check(config)
        except ValueError as error:
            yield str(error)


def check_rewards(config: Config) -> None:
    """ValueError for an unknown reward, and weights that are missing or not whole."""
    singles = {one for name in (config.reward.name, *config.reward.judges) for one in parse(name)}
    needed = [w for one in sorted(singles) if one in ADAPTERS for w in ADAPTERS[one].weights]
    require(needed, weight_paths(config))


def check_model(config: Config) -> None:
    """ValueError for a model that is not here, or plainly not whole."""
    path = find_model(local_model(config.model.model))
    wrong = broken(path) if path.exists() else ""
    if wrong:
        raise ValueError(f"model.model {path}: {wrong}")
    if config.model.backend_options.model_config:
        find_model(config.model.backend_options.model_config)


def local_model(name: str) -> str:
    """A path or shipped name as it is; one of the table of weights by its name on the hub."""
    known = [key for key, weight in BACKBONES.items() if weight.repo == name]
    if Path(name).exists() or not known:
        return name
    return str(require(known[:1])[known[0]])


def weight_paths(config: Config) -> dict[str, str]:
    """reward.weights_path by the names of the table of weights; one path is the reward's own."""
    told, name = config.reward.weights_path, config.reward.type
    if isinstance(told, dict):
        return {str(key): str(path) for key, path in told.items()}
    if told and name not in ADAPTERS:
        raise ValueError(f"reward.weights_path {told!r} does nothing for {name}: leave it out")
    return {ADAPTERS[name].weights[0]: told} if told else {}


# --- what is loaded -----------------------------------------------------------------------


def make_task(
    config: Config,
    predictor: Predictor,
    prompts: tuple[tuple[Prompt, ...], tuple[Prompt, ...]],
    device: torch.device,
) -> Task:
    """The rewards, the model, and its method, loaded."""
    reward, options = config.reward, config.model.backend_options
    setup = Setup(device, reward.enable_amp, weight_paths(config))
    loaded = load_rewards([reward.name, *reward.judges], setup)
    trained = {reward.name: loaded[reward.name]}
    judges = {name: loaded[name] for name in reward.judges if name not in names_of(trained)}
    backend = open_backend(config, prompts, device)
    check_fit(predictor.recipe, backend)
    method = predictor_method(predictor, backend.levels)
    backend.guided(method.guidance_rate, backend.encode(prompts[0][:1]))
    return Task(
        backend,
        dataclasses.replace(method, points_chunk=options.points_chunk),
        predictor.recipe,
        partial(score_all, trained, batch=reward.batch_size),
        reward.name,
        *prompts,
        judge=partial(score_all, judges, batch=reward.batch_size) if judges else None,
        seed=config.run.seed,
        batch=options.max_batch_size,
        decode_batch=options.decode_batch,
    )


def open_backend(
    config: Config, prompts: tuple[tuple[Prompt, ...], ...], device: torch.device
) -> Backend:
    """The model; ValueError where it is of another family than the settings say."""
    texts = tuple(text for part in prompts for text in part if isinstance(text, str))
    told = config.model.backend_options
    side = config.model.resolution
    options = ModelOptions(
        (side, side) if side else None,
        told.negative_prompt,
        told.model_config,
        told.cpu_offload,
        told.vae_tiling,
        told.vae_slicing,
        encode_first=texts if told.release_encoders else (),
    )
    name = local_model(config.model.model)
    backend = load_backend(name, device=device, dtype=DTYPES[told.dtype], options=options)
    if family(backend) != config.model.backend:
        said = f"model.backend {config.model.backend} is not that of {name}"
        raise ValueError(f"{said}, which is {family(backend)}: choose another model or backend")
    return backend


def run(config: Config, task: Task, folder: Path, resume: str | None) -> Outcome:
    """Train; a signal ends the process after a checkpoint."""
    stop = Stop()
    told = Path(resume) if resume else None
    start = told if told and told.is_file() else folder
    try:
        with stop.listening():
            return train(
                task,
                config.ppo,
                config.logging,
                folder,
                resume=start if resume else None,
                stop=stop,
                say=partial(tqdm.write, file=sys.stderr),
            )
    except Stopped:
        ranks.close()
        sys.exit(128 + (stop.signal or 15))


if __name__ == "__main__":
    main()
