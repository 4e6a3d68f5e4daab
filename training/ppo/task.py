"""What is trained on what: the concrete objects that a script hands in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from backends.base import Backend, Prompt
from backends.generate import Method
from solvers.predictor import Recipe

Scorer: TypeAlias = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""Images [B, 3, H, W] in [0, 1] and their B prompts -> the scores [B] of every reward, by name.

`functools.partial(rewards.scorer.score_all, rewards, batch=...)` is one. A ValueError stands for
images that have no score: they are then scored one by one.
"""


@dataclass(frozen=True)
class Task:
    """A table to start from, the model that it samples with, and what is judged on what.

    Raises ValueError for no prompts, fewer than two held-out prompts, a prompt that is in both,
    and batches below 1.
    """

    backend: Backend
    method: Method  # its table, Directions, is the distilled one
    recipe: Recipe  # of that table; that of the exports
    score: Scorer
    reward: str  # the name, of those that `score` gives, that is trained on
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]  # evaluated on, never trained on
    judge: Scorer | None = None  # more rewards, at evaluations alone; names other than `score`'s
    seed: int = 0
    batch: int = 16  # images denoised at once on a rank
    decode_batch: int = 8  # latents decoded at once

    def __post_init__(self) -> None:
        if not self.prompts or len(self.held_out) < 2:
            count = f"{len(self.prompts)} and {len(self.held_out)}"
            raise ValueError(f"training needs prompts and 2 or more held-out ones, not {count}")
        both = set(self.prompts) & set(self.held_out)
        if both:
            raise ValueError(f"{sorted(map(str, both))[0]!r} is trained on and held out: drop one")
        if self.batch < 1 or self.decode_batch < 1:
            raise ValueError(f"batch {self.batch}, decode_batch {self.decode_batch}: 1 or more")
