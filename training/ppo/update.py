"""One step's update of the policy, from what all ranks gathered; each rank computes the whole."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from src.seeds import generator
from training.ppo.objectives import Coefficients, Taken, loss
from training.ppo.sections import Ppo
from training.ppo.state import State


def minibatches(count: int, size: int, seed: int, stream: str) -> Iterator[Tensor]:
    """Indices of `count` images in a shuffled order, `size` at a time."""
    yield from torch.randperm(count, generator=generator(seed, stream)).split(size)


def update(state: State, taken: Taken, ppo: Ppo, seed: int) -> dict[str, float]:
    """Take the steps of AdamW that a rollout is good for -> the means of what was measured.

    Raises ValueError for a loss or a gradient that is no number, before it reaches the policy.
    """
    policy, optimiser, step = state.policy, state.optimiser, state.progress.step
    weights = Coefficients(ppo.clip_range, ppo.kl_coef, ppo.entropy_coef)
    measured: list[dict[str, float]] = []
    for epoch in range(ppo.ppo_epochs):
        stream = f"order/{step}/{epoch}"
        for index in minibatches(len(taken.advantages), ppo.minibatch_size, seed, stream):
            found = loss(policy(), policy.initial(), taken.rows(index), weights)
            optimiser.zero_grad(set_to_none=True)
            found.value.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), ppo.max_grad_norm).item()
            if not math.isfinite(norm):
                raise ValueError(f"the gradient's norm is {norm}: lower ppo.learning_rate")
            optimiser.step()
            measured.append(found.measured | {"grad_norm": norm})
    names = measured[0] if measured else {}
    return {name: sum(m[name] for m in measured) / len(measured) for name in names}
