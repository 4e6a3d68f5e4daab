"""What a run of PPO is told: a file of YAML and overrides -> `Config`, checked at once."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from solvers.predictor import typed
from src.files import nearest, read_text
from training.ppo.checks import check_against, check_ranks, checked, leaves
from training.ppo.sections import (
    BackendOptions,
    Config,
    Data,
    Logging,
    Model,
    Multi,
    Ppo,
    RewardSettings,
    Run,
)

__all__ = [
    "BackendOptions",
    "Config",
    "Data",
    "Logging",
    "Model",
    "Multi",
    "Ppo",
    "RewardSettings",
    "Run",
    "check_against",
    "check_ranks",
    "leaves",
    "load_config",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a file under `overrides`, each `section.key=value`, checked.

    Raises ValueError in one line that names the key, its value and what would do: for a file
    that cannot be read, a key that is unknown, missing or of another type, a number out of range
    or NaN, and settings that contradict each other.
    """
    layers = (parsed(read_text(path), str(path)), *(override(text) for text in overrides))
    try:
        merged = OmegaConf.merge(*layers)
        check_keys(OmegaConf.to_container(merged, resolve=True))
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: give it in {path}") from error
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{error.full_key or path}: {said}") from error
    assert isinstance(found, Config)
    return checked(found)


def parsed(text: str, name: str) -> Any:
    """YAML as a tree of OmegaConf; ValueError where it is broken or no sections."""
    try:
        tree = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{name} is not YAML that can be read: {said}") from error
    if not isinstance(OmegaConf.to_container(tree), dict):
        raise ValueError(f"{name} holds no sections: see training/ppo/cfgs/sd3_512.yaml")
    return tree


def override(text: str) -> Any:
    """`section.key=value` as a tree; ValueError for anything else."""
    key, equals, _ = text.partition("=")
    if not equals or "." not in key or not all(key.split(".")):
        raise ValueError(f"--override {text!r} is not section.key=value: ppo.steps=100, say")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"--override {text!r} cannot be read: {said}") from error


def check_keys(tree: Any, kind: type = Config, above: str = "") -> None:
    """ValueError for a key that is not there, naming the nearest, and a value of another type."""
    hints = typing.get_type_hints(kind)
    for key, value in tree.items():
        name = f"{above}{key}"
        if key not in hints:
            near = nearest(name, [above + known for known in hints])
            raise ValueError(f"unknown key {name!r}: did you mean {near}?")
        if not dataclasses.is_dataclass(hints[key]):
            check_type(name, value, hints[key])
        elif isinstance(value, Mapping):
            check_keys(value, typing.cast(type, hints[key]), f"{name}.")
        else:
            keys = ", ".join(f.name for f in dataclasses.fields(hints[key]))
            raise ValueError(f"{name} {value!r} is no section: it has the keys {keys}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """ValueError where a value, or one inside of it, is of another type."""
    if hint is Any:
        return
    typed(name, value, hint)
    inside = typing.get_args(hint)
    if isinstance(value, list):
        for part in value:
            typed(name, part, inside[0])
    elif isinstance(value, dict):
        for key, part in value.items():
            typed(f"{name}.{key}", part, inside[1])
