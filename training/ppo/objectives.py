"""The arithmetic of stage 2, as pure functions: baselines, advantages, PPO's loss.

G groups of k images each, B images in all. A reward that is not finite is no part of anything.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.ppo.policy import Draws, Law

SMALLEST_SPREAD = 1e-12


def groups(count: int, k: int, baseline: str) -> Tensor:
    """Which of `count` images, laid out prompt by prompt, are a group: indices [G, k].

    The k images of one prompt; with `mixed`, as published, the rewards are taken as [k, G], so
    that a group has images of several prompts.
    """
    index = torch.arange(count)
    return index.reshape(k, -1).t() if baseline == "mixed" else index.reshape(-1, k)


def rloo(rewards: Tensor) -> Tensor:
    """Rewards [G, k] -> the mean of the other rewards of its group for each, [G, k].

    REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740). NaN for an
    image that is alone, or has no finite reward itself.
    """
    valid = rewards.isfinite()
    finite = rewards.where(valid, 0)
    others = valid.sum(-1, keepdim=True) - 1
    mean = (finite.sum(-1, keepdim=True) - finite) / others.clamp(min=1)
    return mean.where(valid & (others > 0), torch.nan)


def james_stein(rewards: Tensor) -> Tensor:
    """Rewards [G, k] -> (1 - a) rloo + a (mean of all rewards), [G, k].

    a = (s2 / (k - 1)) / (s2 / (k - 1) + d2), with s2 the variance within groups and d2 that of
    their means: the noisier a group's own mean, the more it leans on all (arXiv:2511.22177).
    """
    valid = rewards.isfinite()
    count = valid.sum(-1, keepdim=True)
    finite = rewards.where(valid, 0)
    mean = finite.sum(-1, keepdim=True) / count.clamp(min=1)
    within = ((finite - mean).where(valid, 0) ** 2).sum() / (count - 1).clamp(min=0).sum().clamp(
        min=1
    )
    means = mean[count > 0]
    between = means.var(correction=1) if len(means) > 1 else rewards.new_zeros(())
    noise = within / (rewards.shape[1] - 1)
    share = noise / (noise + between).clamp(min=SMALLEST_SPREAD)
    overall = finite.sum() / count.sum().clamp(min=1)
    return (1 - share) * rloo(rewards) + share * overall


def advantages(rewards: Tensor, k: int, baseline: str) -> Tensor:
    """Rewards [B], prompt by prompt -> reward less baseline [B], NaN where there is none."""
    index = groups(len(rewards), k, baseline)
    of_group = rewards[index]
    base = james_stein(of_group) if baseline == "james-stein" else rloo(of_group)
    result = torch.full_like(rewards, torch.nan)
    result[index.flatten()] = (of_group - base).flatten()
    return result


def standardised(values: Tensor) -> Tensor:
    """Less their mean, over their standard deviation (of a population), but for NaN.

    Zeros where they do not differ.
    """
    valid = values.isfinite()
    if not bool(valid.any()):
        return values
    finite = values[valid]
    spread = finite.std(correction=0)
    scale = 1 / spread if spread > SMALLEST_SPREAD else torch.zeros_like(spread)
    return ((values - finite.mean()) * scale).where(valid, torch.nan)


def surrogate(ratio: Tensor, gains: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7): a number, to lessen.

    -mean min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i), ratio and advantages [B].
    """
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * gains, clipped * gains).mean()


@dataclass(frozen=True)
class Taken:
    """B draws, how likely they were when they were drawn, and what they gained."""

    draws: Draws
    log_prob: Tensor  # [B]
    gains: Tensor  # [B], finite

    def rows(self, index: Tensor) -> "Taken":
        """Those of these numbers."""
        return Taken(self.draws.rows(index), self.log_prob[index], self.gains[index])


def loss(
    now: Law, first: Law, taken: Taken, clip: float, kl_coef: float, entropy: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """-mean min(rho A, clip(rho) A) + kl_coef KL(pi || pi_0) - sum_n entropy_n H_n.

    -> the loss, which carries a gradient, and what was measured on the way. `entropy` [N] are the
    coefficients of the intervals.
    """
    log_ratio = now.log_prob(taken.draws) - taken.log_prob
    kl, entropies = now.kl(first), now.entropy()
    value = surrogate(log_ratio.exp(), taken.gains, clip) + kl_coef * kl
    value = value - (entropy * entropies).sum()
    measured = {"loss": value, "kl_start": kl, "entropy": entropies.sum()}
    numbers = {name: number.item() for name, number in measured.items()}
    return value, numbers | movement(log_ratio.detach(), clip)


def movement(log_ratio: Tensor, clip: float) -> dict[str, float]:
    """How far a policy is from the one that drew, by log rho [B] of its draws.

    The approximate KL to the one that drew is mean(rho - 1 - log rho), which is never negative
    (Schulman 2020, "Approximating KL divergence").
    """
    ratio = log_ratio.exp()
    measured = {
        "ratio": ratio.mean(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": ((ratio - 1).abs() > clip).double().mean(),
    }
    return {name: number.item() for name, number in measured.items()}


# --- sets of images -----------------------------------------------------------------------


def frechet(one: Tensor, other: Tensor) -> Tensor:
    """The Frechet distance of the Gaussians of two sets of features [n, F] and [m, F].

    tr sqrt(C1 C2) is the nuclear norm of the product of the centred features: n x m, however
    many F are.
    """
    one, other = (x[x.isfinite().all(1)] for x in (one, other))
    a, b = ((x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5 for x in (one, other))
    cross = torch.linalg.matrix_norm(a @ b.t(), "nuc")
    return (one.mean(0) - other.mean(0)).square().sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def diversity(features: Tensor, labels: Sequence[Hashable]) -> Tensor:
    """How far each image is from the others of its label in features [E, F], the mean, [E]."""
    distance = torch.cdist(features, features)
    same = torch.tensor([[a == b for b in labels] for a in labels])
    same = same & distance.isfinite() & ~torch.eye(len(labels), dtype=torch.bool)
    return distance.where(same, 0).sum(1) / same.sum(1)
