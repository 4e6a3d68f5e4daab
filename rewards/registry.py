"""Rewards by name: `hps`, `multi`, `multi:hps=1,imagereward=0.5`, or your own `module:function`.

A reward's model is imported when it is asked for, and loaded once: rewards that are asked for
together share what they have in common.
"""

import importlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rewards.base import SCALES, Reward, WeightedSum
from rewards.weights import require
from src.files import nearest, read_json
from src.functions import own_function

MULTI = "multi"
BY_CLASS = ("fashion-judge",)  # rewards that take the number of a class for a prompt


@dataclass(frozen=True)
class Setup:
    """How rewards are loaded, and the models by their files that several of them share.

    paths: where the weights are, by the names of `rewards.weights`; they go before the
    environment's variables and the default places. amp: weights and products in half precision;
    not on a CPU, where it is many times slower.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: bool = False
    paths: Mapping[str, str | Path] = field(default_factory=dict)
    models: dict[Path, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where the weights of that name are; ValueError where they are not."""
        return require([name], self.paths)[name]


@dataclass(frozen=True)
class Adapter:
    """Where a reward's function `load(setup) -> Reward` is, and the weights that it reads.

    about: what its number is; by_prompt: whether it looks at the prompt; shipped: its own
    weights, that come with the repository.
    """

    load: str  # module:function
    weights: tuple[str, ...]
    about: str
    by_prompt: bool = True
    shipped: str = ""


ADAPTERS = {
    name: Adapter(**{**row, "weights": tuple(row["weights"])})
    for name, row in read_json(Path(__file__).with_name("adapters.json")).items()
}


def load_reward(name: str, setup: Setup | None = None) -> Reward:
    """The reward of that name; see load_rewards."""
    return load_rewards([name], setup)[name]


def load_rewards(names: Iterable[str], setup: Setup | None = None) -> dict[str, Reward]:
    """The rewards by name. All weights are checked before the first is loaded.

    Raises ValueError, in one line, for an unknown name, a missing or wrong file of weights, and
    a library that is not installed.
    """
    wanted = {name: parse(name) for name in names}
    setup = setup or Setup()
    if setup.amp and setup.device.type == "cpu":
        logger = logging.getLogger(__name__)
        logger.warning("rewards: half precision is off on a CPU: slower there")
        setup = replace(setup, amp=False)
    files_of(wanted, setup.paths)
    loaded = {single: _load(single, setup) for single in singles(wanted)}
    for name, weights in wanted.items():
        if name not in loaded:
            parts = {single: loaded[single] for single in weights}
            loaded[name] = WeightedSum(parts, weights, SCALES)
    return {name: loaded[name] for name in wanted}


def singles(names: Iterable[str]) -> list[str]:
    """The rewards that these are made of, each once, sorted; ValueError as `parse`."""
    return sorted({single for name in names for single in parse(name)})


def reads_texts(names: Iterable[str]) -> list[str]:
    """Those of the single rewards in these that judge by a text, and not by a class as well."""
    texts = (n for n in singles(names) if n in ADAPTERS and ADAPTERS[n].by_prompt)
    return [name for name in texts if name not in BY_CLASS]


def files_of(names: Iterable[str], paths: Mapping[str, str | Path]) -> dict[str, Path]:
    """Where the weights of these rewards are, by their names; all are checked.

    ValueError, in one line, for an unknown reward and for weights that are missing or wrong.
    """
    adapters = [ADAPTERS[single] for single in singles(names) if single in ADAPTERS]
    return require([weights for adapter in adapters for weights in adapter.weights], paths)


def parse(name: str) -> dict[str, float]:
    """The single rewards of a name, with their weights; those of weight zero are left out.

    ValueError for an unknown name, or weights that are negative, all zero or no numbers.
    """
    if name == MULTI:
        return dict.fromkeys(SCALES, 1.0)
    weights = {name: 1.0}
    if name.startswith(MULTI + ":"):
        parts = [part.rpartition("=") for part in name.removeprefix(MULTI + ":").split(",")]
        weights = {single: _weight(value, name) for single, _, value in parts}
        if len(weights) < len(parts) or not any(weights.values()):
            raise ValueError(f"{name!r} must name each reward once, with a weight above zero")
    names = [*ADAPTERS, MULTI]
    for single in weights:
        if single not in ADAPTERS and ":" not in single:
            raise ValueError(
                f"no reward {single!r}: did you mean {nearest(single, names)}? "
                f"There are {', '.join(names)}, and your own as module:function"
            )
    return {single: weight for single, weight in weights.items() if weight}


def _weight(value: str, name: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name!r} has the weight {value!r}: write multi:hps=1,clip=0.5")
    return weight


def _load(name: str, setup: Setup) -> Reward:
    """The reward of one name; one's own is importable from the current folder too."""
    if name not in ADAPTERS:
        own = own_function(name)
        try:
            inspect.signature(own).bind("images", "prompts")
        except TypeError as error:
            raise ValueError(f"{name!r} must take (images, prompts): {error}") from error
        return own
    module, _, function = ADAPTERS[name].load.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(setup)
    except ModuleNotFoundError as error:
        fix = "pip install -r requirements.txt"
        raise ValueError(f"{name} needs the package {error.name}: {fix}") from error
