"""The arithmetic of PPO with RLOO, as pure functions (arXiv:2512.22796; docs in the functions).

G groups of k images each, B images in all.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.ppo.policy import Distribution, Draws

SMALLEST_SPREAD = 1e-12


def groups(count: int, k: int, grouping: str) -> Tensor:
    """Which of `count` images, laid out prompt by prompt, are a group: indices [G, k].

    `crn` and `prompt`: the k images of one prompt. `mixed`, as published: the rewards taken as
    [k, G], so that a group has images of several prompts.
    """
    index = torch.arange(count)
    return index.reshape(k, -1).t() if grouping == "mixed" else index.reshape(-1, k)


def rloo(rewards: Tensor) -> Tensor:
    """Rewards [G, k] -> A_i = R_i - mean of the other rewards of its group, [G, k].

    REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740). A reward
    that is not finite is no part of its group; its advantage, and that of an image left alone, is
    NaN.
    """
    valid = rewards.isfinite()
    known = rewards.where(valid, 0)
    others = valid.sum(-1, keepdim=True) - 1
    mean = (known.sum(-1, keepdim=True) - known) / others.clamp(min=1)
    return (known - mean).where(valid & (others > 0), torch.nan)


def standardised(advantages: Tensor) -> Tensor:
    """Less their mean, over their standard deviation (of a population), but for NaN.

    Zeros where they do not differ.
    """
    valid = advantages.isfinite()
    if not bool(valid.any()):
        return advantages
    known = advantages[valid]
    spread = known.std(correction=0)
    scale = 1 / spread if spread > SMALLEST_SPREAD else torch.zeros_like(spread)
    return ((advantages - known.mean()) * scale).where(valid, torch.nan)


def advantages(rewards: Tensor, k: int, grouping: str) -> Tensor:
    """Rewards [B], prompt by prompt -> standardised advantages [B], NaN where there is none."""
    index = groups(len(rewards), k, grouping)
    found = torch.full_like(rewards, torch.nan)
    found[index.flatten()] = rloo(rewards[index]).flatten()
    return standardised(found)


def surrogate(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7): a number, to lessen.

    -mean min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i), ratio and advantages [B].
    """
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@dataclass(frozen=True)
class Coefficients:
    """What the loss is made of."""

    clip: float = 0.2
    kl: float = 0.0
    entropy: float = 0.0


@dataclass(frozen=True)
class Loss:
    """A loss that carries a gradient, and what is told of it."""

    value: Tensor
    measured: dict[str, float]


@dataclass(frozen=True)
class Taken:
    """B draws, how likely they were when they were drawn, and what they gained."""

    draws: Draws
    log_prob: Tensor  # [B]
    advantages: Tensor  # [B], finite

    def rows(self, index: Tensor) -> "Taken":
        """Those of these numbers."""
        return Taken(self.draws.rows(index), self.log_prob[index], self.advantages[index])


def loss(now: Distribution, first: Distribution, taken: Taken, weights: Coefficients) -> Loss:
    """-mean min(rho A, clip(rho) A) + kl KL(pi || pi_0) - entropy H(pi).

    The approximate KL to the policy that drew is mean(rho - 1 - log rho), which is never negative
    (Schulman 2020, "Approximating KL divergence").
    """
    log_ratio = now.log_prob(taken.draws) - taken.log_prob
    ratio = log_ratio.exp()
    kl, entropy = now.kl(first), now.entropy()
    value = surrogate(ratio, taken.advantages, weights.clip)
    value = value + weights.kl * kl - weights.entropy * entropy
    with torch.no_grad():
        measured = {
            "loss": value.item(),
            "ratio": ratio.mean().item(),
            "ratio_max": ratio.max().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_fraction": ((ratio - 1).abs() > weights.clip).double().mean().item(),
            "kl_start": kl.item(),
            "entropy": entropy.item(),
        }
    if not all(math.isfinite(v) for v in measured.values()):
        raise ValueError(f"the loss is {value.item()}: lower ppo.learning_rate")
    return Loss(value, measured)
