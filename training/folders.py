"""Settings of a run from options, presets and folders, and the folder of a run."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.files import nearest, read_text, write_text
from src.runs import NUMBERED, new_run
from training.presets import preset
from training.settings import IDLE, Config

CONFIG = "config.yaml"
PUBLISHED_STUDENTS = {"ipndm": "epd-ipndm"}


def configured(options: Mapping[str, Any], given: set[str], path: Path | None) -> Config:
    """The settings of a run that goes on, or of the preset, under those that were given.

    Raises ValueError where an explicit option is not that of the run.
    """
    names = {f.name for f in dataclasses.fields(Config)}
    chosen = {n: v for n, v in options.items() if n in names}
    chosen["solver"] = PUBLISHED_STUDENTS.get(chosen["solver"], chosen["solver"])
    if path is None:
        basis = preset(chosen["preset"]) if chosen["preset"] else {}
        idle = {*IDLE["fit"], "last_distance"} if given_fit(chosen, given) else set()
        kept = {n: v for n, v in basis.items() if n not in given | idle}
        return Config(**(chosen | kept))
    config = Config(**read_config(path / CONFIG))
    for name in given & names:
        if chosen[name] != getattr(config, name):
            was = getattr(config, name)
            raise ValueError(f"--{name} {chosen[name]}: the run in {path} has {was}, leave it out")
    return config


def given_fit(chosen: Mapping[str, Any], given: set[str]) -> bool:
    """Whether a fit is asked for in so many words, as instead of a preset's gradient."""
    return "method" in given and chosen["method"] == "fit"


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run; ValueError for a file that is missing or holds other names."""
    try:
        found = OmegaConf.to_container(OmegaConf.create(read_text(path)), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error
    names = [f.name for f in dataclasses.fields(Config)]
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings")
    for name in found:
        if name not in names:
            near = nearest(str(name), names)
            raise ValueError(f"{path}: unknown setting {name!r}, did you mean {near}?")
    for field in dataclasses.fields(Config):
        if field.default is not None and found.get(field.name, field.default) is None:
            raise ValueError(f"{path}: {field.name} is empty, it was {field.default} by default")
    return {str(name): value for name, value in found.items()}


def run_folder(resume: str) -> Path:
    """The folder of the run to go on with; ValueError where there is none."""
    if resume == "latest":
        found = [
            (NUMBERED.match(p.parent.name), p.parent) for p in Path("exps").glob(f"*/{CONFIG}")
        ]
        runs = [(int(match[1]), path) for match, path in found if match]
        if not runs:
            raise ValueError("no numbered run in exps/: start without --resume")
        return max(runs)[1]
    path = Path(resume)
    if not path.exists():
        raise ValueError(f"no run or checkpoint at {resume}")
    return path if path.is_dir() else path.parent


def new_folder(config: Config, outdir: Path | None) -> Path:
    """A folder with its config.yaml; ValueError where a run is there already."""
    what = f"{Path(config.model).stem}-{config.num_steps}-{config.solver}-k{config.num_points}"
    if outdir and (outdir / CONFIG).exists():
        raise ValueError(f"{outdir} has a run already: --resume {outdir}, or another --outdir")
    folder = outdir or new_run(re.sub(r"[^A-Za-z0-9._-]", "-", what))
    plain = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
    write_text(folder / CONFIG, plain)
    return folder
