"""Which prompts and which noise a step uses: pure functions of the seed and the position.

The stream of prompts is the list shuffled anew for every round. Nothing depends on the number of
ranks, so that a run goes on under another one. A position is the place of a prompt in the stream.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backends.base import Prompt
from backends.generate import Job
from src.seeds import generator


@dataclass(frozen=True)
class Shot:
    """One image of a rollout: what to make, and what its table hangs on."""

    job: Job
    stream: str  # of the table's generator


def prompt_at(prompts: Sequence[Prompt], seed: int, position: int) -> Prompt:
    """The prompt at a position of the endless stream."""
    around, place = divmod(position, len(prompts))
    order = torch.randperm(len(prompts), generator=generator(seed, f"prompts/{around}"))
    return prompts[int(order[place])]


def noise_seed(seed: int, purpose: str) -> int:
    """A seed in 0, ..., 2^63 - 1 for the first noise of a purpose."""
    digest = hashlib.blake2b(f"{seed}/noise/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shots(
    prompts: Sequence[Prompt], seed: int, step: int, *, count: int, k: int, grouping: str
) -> list[Shot]:
    """The `count` images of step `step` (from 0), prompt by prompt, k of each.

    With `crn` the k images of a prompt share their first noise; else each has its own.
    """
    made = []
    for position in range(step * (count // k), (step + 1) * (count // k)):
        prompt = prompt_at(prompts, seed, position)
        for sample in range(k):
            noise = f"{position}" if grouping == "crn" else f"{position}/{sample}"
            job = Job(noise_seed(seed, noise), prompt)
            made.append(Shot(job, f"table/{step}/{position}/{sample}"))
    return made


def fixed_jobs(prompts: Sequence[Prompt], seed: int, count: int) -> list[Job]:
    """The images that evaluations make: prompts in their order, again with other noise.

    Their noise is apart from that of training.
    """
    return [
        Job(noise_seed(seed, f"held-out/{i}"), prompts[i % len(prompts)]) for i in range(count)
    ]
