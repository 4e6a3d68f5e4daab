"""Images scored in batches by several rewards: the one loop, of training and of evaluation.

N images, each with its prompt. Images are floats in [0, 1], [N, 3, H, W].
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewards.base import Reward, WeightedSum, score


def score_all(
    rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[str], *, batch: int = 64
) -> dict[str, Tensor]:
    """The scores [N] of every reward, by name, each in its own units.

    A WeightedSum comes with its parts, under their own names; what several sums share, or is
    asked for by itself as well, is computed once.

    Raises ValueError as `rewards.base.score` does, and for another number of prompts.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, not {len(prompts)}")
    starts = range(0, max(len(images), 1), batch)
    parts = [score_batch(rewards, images[i : i + batch], prompts[i : i + batch]) for i in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def score_batch(
    rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """The same of one batch, at once."""
    singles: dict[str, Reward] = {}
    for name, reward in rewards.items():
        singles |= reward.rewards if isinstance(reward, WeightedSum) else {name: reward}
    parts = {name: score(reward, images, prompts, name) for name, reward in singles.items()}
    sums = {n: r.mean(parts) for n, r in rewards.items() if isinstance(r, WeightedSum)}
    return parts | sums


def names_of(rewards: Mapping[str, Reward]) -> list[str]:
    """The names that `score_all` gives scores of, what was asked for first."""
    names = list(rewards)
    for reward in rewards.values():
        names += reward.rewards if isinstance(reward, WeightedSum) else []
    return list(dict.fromkeys(names))
