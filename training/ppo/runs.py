"""The folder of a run of PPO: <output_root>/<timestamp>-<run_name>, how it is made and found.

It holds configs/resolved_config.yaml, logs/, checkpoints/, samples/ and export/.
"""

import dataclasses
import re
import time
from itertools import chain, count
from pathlib import Path

from omegaconf import OmegaConf

from src import ranks
from src.files import write_text
from training.ppo.checks import leaves
from training.ppo.config import Config, load_config

PARTS = ("configs", "logs", "checkpoints", "samples", "export")
RESOLVED = "configs/resolved_config.yaml"
LATEST = "latest"
STAMP = r"[0-9]{8}-[0-9]{6}(\.[0-9]+)?-"
FIXED = ("model.", "reward.type", "reward.multi.")
FREE = ("model.model", "model.backend_options.")
"""What decides the images and their rewards stays; files may move. Checkpoints tell the rest."""


def new_folder(config: Config) -> Path:
    """Make the folder of a new run, named by the first rank -> the same on every rank."""
    own = make_folder(config) if ranks.is_first() else None
    return Path(ranks.gather_objects(str(own))[0])


def make_folder(config: Config) -> Path:
    """An own folder, whatever else starts in the same second."""
    root = Path(config.run.output_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.output_root {root} cannot be made: {error.strerror}") from error
    stamp = time.strftime("%Y%m%d-%H%M%S")
    again = chain([""], (f".{n}" for n in count(2)))
    tries = (root / f"{stamp}{more}-{config.run.run_name}" for more in again)
    folder = next(path for path in tries if made(path))
    for part in PARTS:
        (folder / part).mkdir()
    return folder


def made(folder: Path) -> bool:
    """Whether it was not there, and is now."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def to_yaml(config: Config) -> str:
    """The settings as a file that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def find_run(resume: str, config: Config | None) -> Path:
    """The folder of the run to go on with: that of a checkpoint, of a path, or the latest.

    The latest is the newest with a checkpoint, of the settings' name if there are any.

    Raises ValueError where there is none.
    """
    if resume == LATEST:
        root = Path(config.run.output_root if config else "exps")
        name = config.run.run_name if config else "*"
        form = re.compile(STAMP + (re.escape(name) if config else ".*"))
        found = [p.parents[1] for p in sorted(root.glob(f"*/{RESOLVED}"))]
        runs = [p for p in found if form.fullmatch(p.name) and any(p.glob("checkpoints/*.pt"))]
        if not runs:
            raise ValueError(
                f"no run {name!r} with a checkpoint in {root}: start without --resume"
            )
        return runs[-1]
    path = Path(resume).resolve()
    if not path.exists():
        raise ValueError(f"no run and no checkpoint at {resume}: give its path, or {LATEST}")
    folder = path if path.is_dir() else path.parents[1]
    if not (folder / RESOLVED).is_file():
        raise ValueError(f"{folder} is no folder of a run: it has no {RESOLVED}")
    return folder


def check_same(config: Config, folder: Path) -> None:
    """ValueError, with both values, where a run would go on with other images or rewards."""
    was = dict(leaves(load_config(folder / RESOLVED)))
    for name, value in leaves(config):
        fixed = name.startswith(FIXED) and not name.startswith(FREE)
        if fixed and value != was[name]:
            said = f"{name} {value}: the run in {folder} has {was[name]}"
            raise ValueError(f"{said}: leave it as it was, or start without --resume")


def keep_settings(config: Config, folder: Path) -> None:
    """Write down what the run goes on with."""
    if ranks.is_first():
        write_text(folder / RESOLVED, to_yaml(config))
