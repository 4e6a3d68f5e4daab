"""What the section `data` names: the predictor to start from, and the prompts of both kinds."""

import random
from collections.abc import Iterable

from backends.base import Prompt
from solvers.predictor import Predictor, find_predictor, load_predictor
from src.text import read_prompts
from training.ppo.config import Config, check_against

CLASSES = ("edm", "analytic")
"""Backends whose prompts are class numbers."""


def predictor_of(config: Config) -> Predictor:
    """Where training starts; ValueError where it is not there, or of another recipe."""
    predictor = load_predictor(find_predictor(config.data.predictor_snapshot))
    check_against(config, predictor.recipe)
    return predictor


def prompts_of(config: Config) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """What is trained on, and what is held out: ppo.eval_prompts, evenly from their file, or all.

    Without a file of their own they are drawn from the others by the seed, and taken out. Models
    of classes have their numbers, one a line.
    """
    trained, held_out = texts_of(config)
    if config.model.backend in CLASSES:
        return numbers(trained, config), numbers(held_out, config)
    return trained, held_out


def numbers(texts: Iterable[str], config: Config) -> tuple[int, ...]:
    """Class numbers; ValueError for what is none."""
    for text in texts:
        if not text.isdecimal():
            said = f"model.backend {config.model.backend} takes class numbers for prompts"
            raise ValueError(f"{said}, not {text!r}: mend {config.data.prompt_csv}")
    return tuple(int(text) for text in texts)


def texts_of(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same as texts."""
    data, wanted = config.data, config.ppo.eval_prompts
    prompts = tuple(dict.fromkeys(read_prompts(data.prompt_csv)))
    if data.heldout_prompts:
        others = tuple(dict.fromkeys(read_prompts(data.heldout_prompts)))
        both = set(prompts) & set(others)
        if both:
            said = f"{min(both)!r} is in {data.prompt_csv} and in {data.heldout_prompts}"
            raise ValueError(f"{said}: held-out prompts are not trained on, drop it from one")
        count = min(wanted, len(others))
        return prompts, tuple(others[i * len(others) // count] for i in range(count))
    if wanted >= len(prompts):
        said = f"ppo.eval_prompts {wanted} leaves none of {data.prompt_csv}, which has"
        raise ValueError(f"{said} {len(prompts)}: lower it, or give data.heldout_prompts")
    held_out = random.Random(f"{config.run.seed} held out").sample(prompts, wanted)
    return tuple(p for p in prompts if p not in set(held_out)), tuple(held_out)
