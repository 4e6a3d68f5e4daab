"""The one way from seeds and prompts to batches of images.

Shapes: B images of a batch, * one latent, [B, C, H, W] images in [0, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from backends.base import Backend, Prompt
from solvers.classic import EDM
from solvers.field import Condition, Denoiser, Field, Tally
from solvers.sampler import Sampler
from src.seeds import randn


@dataclass(frozen=True)
class Job:
    """One image to make."""

    seed: int
    prompt: Prompt = None


@dataclass(frozen=True)
class Batch:
    """What a batch of jobs became, and what it cost."""

    jobs: tuple[Job, ...]
    latents: Tensor  # [B, *]
    images: Tensor  # [B, C, H, W] in [0, 1]
    states: tuple[Tensor, ...]  # every x on the way, if asked for; else empty
    tally: Tally


def generate(
    backend: Backend,
    sampler: Sampler,
    jobs: Sequence[Job],
    *,
    batch: int,
    trajectory: bool = False,
    points_chunk: int | None = None,
) -> Iterator[Batch]:
    """The jobs' images, `batch` of them at a time; an image depends on its own job alone.

    `trajectory` keeps every state on the way; `points_chunk` bounds how many of the K points go
    to the network at once, where memory is short. Raises ValueError for a prompt that the
    backend cannot take, or guidance without prompts.
    """
    rest = iter(jobs)
    while part := tuple(islice(rest, batch)):
        yield sample(backend, sampler, part, trajectory, points_chunk)


@torch.no_grad()
def sample(
    backend: Backend,
    sampler: Sampler,
    jobs: tuple[Job, ...],
    trajectory: bool,
    points_chunk: int | None,
) -> Batch:
    """One batch of images."""
    seeds = [job.seed for job in jobs]
    cond = backend.encode([job.prompt for job in jobs])
    field = Field(guided(backend, sampler, cond), cond, points_chunk)
    dtype = torch.promote_types(backend.dtype, torch.float32)
    noise = randn(seeds, backend.shape, device=backend.device, dtype=dtype)
    x = noise * sampler.sigmas[0]
    states: list[Tensor] = []
    for state in churned(sampler, seeds).states(field, x):
        x = state
        if trajectory:
            states.append(x)
    return Batch(jobs, x, backend.decode(x), tuple(states), field.tally)


def guided(backend: Backend, sampler: Sampler, cond: Condition | None) -> Denoiser:
    """The denoiser under the sampler's guidance; ValueError where a rate cannot be had."""
    backend.guided(sampler.strongest, cond)
    return backend.guided(sampler.guidance_rate, cond)


def churned(sampler: Sampler, seeds: Sequence[int]) -> Sampler:
    """The sampler whose churn, if it is EDM's, draws each image's noise by its own seed."""
    if not isinstance(sampler.solver, EDM):
        return sampler

    def noise(index: int, x: Tensor) -> Tensor:
        drawn = randn(seeds, tuple(x.shape[2:]), stream=f"churn/{index}", device=x.device)
        return drawn.to(x).unsqueeze(1)

    return replace(sampler, solver=replace(sampler.solver, noise=noise))
