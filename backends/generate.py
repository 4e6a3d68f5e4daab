"""The one way from seeds and prompts to batches of images.

Shapes: B images of a batch, * one latent, [B, C, H, W] images in [0, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backends.base import Backend, Prompt
from solvers.classic import EDM
from solvers.field import Field, Tally
from solvers.sampler import Sampler
from src.seeds import randn


@dataclass(frozen=True)
class Job:
    """One image to make."""

    seed: int
    prompt: Prompt = None


@dataclass(frozen=True)
class ImageBatch:
    """What a batch of jobs became, and what it cost."""

    jobs: tuple[Job, ...]
    latents: Tensor  # [B, *]
    images: Tensor  # [B, C, H, W] in [0, 1]
    trajectory: tuple[Tensor, ...]  # every x on the way, if asked for; else empty
    tally: Tally


def generate(
    backend: Backend,
    sampler: Sampler,
    jobs: Sequence[Job],
    *,
    batch: int,
    trajectory: bool = False,
    points_chunk: int | None = None,
) -> Iterator[ImageBatch]:
    """The jobs' images, `batch` of them at a time; an image depends on its own job alone.

    `trajectory` keeps every state on the way; `points_chunk` bounds how many of the K points go
    to the network at once, where memory is short. Raises ValueError for a prompt that the
    backend cannot take, or guidance without prompts.
    """
    for start in range(0, len(jobs), batch):
        part = tuple(jobs[start : start + batch])
        yield sample(backend, sampler, part, trajectory, points_chunk)


@torch.no_grad()
def sample(
    backend: Backend,
    sampler: Sampler,
    jobs: tuple[Job, ...],
    trajectory: bool,
    points_chunk: int | None,
) -> ImageBatch:
    """One batch of images."""
    seeds = [job.seed for job in jobs]
    cond = backend.encode([job.prompt for job in jobs])
    backend.check_rates(sampler.extreme_rates, cond)
    field = Field(backend.guided(sampler.guidance_rate, cond), cond, points_chunk)
    dtype = torch.promote_types(backend.dtype, torch.float32)
    x = randn(seeds, backend.shape, device=backend.device, dtype=dtype) * sampler.sigmas[0]
    if isinstance(sampler.solver, EDM):  # each image's churn is drawn by its own seed

        def noise(index: int, x: Tensor) -> Tensor:
            drawn = randn(seeds, tuple(x.shape[2:]), stream=f"churn/{index}", device=x.device)
            return drawn.to(x).unsqueeze(1)

        sampler = replace(sampler, solver=replace(sampler.solver, noise=noise))
    kept: list[Tensor] = []
    for state in sampler.states(field, x):
        x = state
        if trajectory:
            kept.append(x)
    return ImageBatch(jobs, x, backend.decode(x), tuple(kept), field.tally)
