"""Which image gets which prompt in a comparison, and which rewards may look at it."""

from collections.abc import Iterable, Mapping, Sequence

from backends.base import Backend
from backends.generate import Job
from rewards.base import Reward
from rewards.registry import ADAPTERS, Setup, load_rewards, singles
from src.text import meet


def jobs_for(backend: Backend, seeds: Sequence[int], prompts: Sequence[str]) -> tuple[Job, ...]:
    """Each seed with its prompt, or without any with the backend's usual one.

    The i-th prompt is for the i-th seed, again from the first. ValueError for more prompts than
    seeds, and for a model that takes none.
    """
    if not prompts:
        return tuple(Job(seed, backend.usual_prompt(seed)) for seed in seeds)
    if not isinstance(backend.usual_prompt(0), str):
        raise ValueError("--prompts: this model takes no texts: leave it out")
    return tuple(Job(seed, prompt) for seed, prompt in meet(seeds, prompts))


def rewards_for(names: Sequence[str], jobs: Sequence[Job], setup: Setup) -> dict[str, Reward]:
    """The rewards by name, loaded.

    ValueError for one that looks at prompts where the images have none, and as `load_rewards`.
    """
    blind = [n for n in singles(names) if n in ADAPTERS and ADAPTERS[n].by_prompt]
    if blind and not all(isinstance(job.prompt, str) for job in jobs):
        raise ValueError(f"{blind[0]} judges images by their prompts, and this model takes none")
    return load_rewards(names, setup)


def meanings(names: Iterable[str]) -> Mapping[str, str]:
    """What the numbers of these rewards are."""
    return {name: ADAPTERS[name].about for name in names if name in ADAPTERS}
