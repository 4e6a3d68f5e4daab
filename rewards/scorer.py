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
    parts: dict[str, Tensor] = {}
    for name, reward in single_rewards(rewards).items():
        ends = [(i, i + batch) for i in range(0, max(len(images), 1), batch)]
        parts[name] = torch.cat([score(reward, images[i:j], prompts[i:j], name) for i, j in ends])
    return parts | {n: r.mean(parts) for n, r in rewards.items() if isinstance(r, WeightedSum)}


def check_rewards(
    rewards: Mapping[str, Reward], size: tuple[int, int], prompt: str, device: torch.device
) -> None:
    """Try every reward on two images of noise, of a size (height, width), before long work.

    Raises ValueError, with its name, where one fails or gives other than two numbers; NaN is one
    here, as it may be of the noise.
    """
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    for name, reward in single_rewards(rewards).items():

        def tried(images: Tensor, prompts: Sequence[str], reward: Reward = reward) -> Tensor:
            scores = reward(images, prompts)
            return scores.nan_to_num() if isinstance(scores, Tensor) else scores

        try:
            score(tried, noise, [prompt] * 2, name)
        except ValueError as error:  # of a function of one's own, which may not name itself
            said = str(error)
            raise ValueError(said if name in said else f"{name}: {said}") from error


def single_rewards(rewards: Mapping[str, Reward]) -> dict[str, Reward]:
    """The rewards by name, each WeightedSum replaced by its parts."""
    singles: dict[str, Reward] = {}
    for name, reward in rewards.items():
        singles |= reward.rewards if isinstance(reward, WeightedSum) else {name: reward}
    return singles


def names_of(rewards: Mapping[str, Reward]) -> list[str]:
    """The names that `score_all` gives scores of, what was asked for first."""
    return list(dict.fromkeys((*rewards, *single_rewards(rewards))))
