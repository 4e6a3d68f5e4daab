"""The one way from seeds and prompts to batches of images.

Shapes: B images of a batch, * one latent, [B, C, H, W] images in [0, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from backends.base import Backend, Prompt
from solvers.catalog import SolverOptions, make_solver
from solvers.epd import EPD
from solvers.exponential import UniPC
from solvers.field import Field, Tally
from solvers.integrate import Solver, integrate
from solvers.multistep import MultistepTable, ParallelMultistep
from solvers.predictor import Table
from src.seeds import randn


@dataclass(frozen=True)
class Method:
    """All that decides how noise becomes a sample: the grid, the solver and its table."""

    sigmas: Tensor  # [num_steps], falling, float64
    solver: str = "euler"
    options: SolverOptions = field(default_factory=SolverOptions)
    table: Table | None = None  # Directions: EPD over `solver`; else parallel multistep
    afs: bool = False
    denoise_to_zero: bool = False
    guidance_rate: float = 1.0
    points_chunk: int | None = None  # how many of the K points at once, where memory is short

    def build(self, seeds: Sequence[int], like: Tensor) -> Solver:
        """The solver for these samples, its table on their device."""
        base = make_solver(self.solver, replace(self.options, noise=partial(churn_noise, seeds)))
        if isinstance(self.table, MultistepTable):
            return ParallelMultistep(self.table.to(like), self.options.process)
        return EPD(self.table.to(like), base) if self.table else base

    def states(self, slope: Field, x: Tensor, seeds: Sequence[int]) -> Iterator[Tensor]:
        """The states x [B, *] after each step, from x at sigmas[0]."""
        solver = self.build(seeds, x)
        zero = [self.sigmas.new_zeros(1)] if self.denoise_to_zero else []
        return integrate(
            solver,
            slope,
            x,
            torch.cat([self.sigmas, *zero]),
            first_slope=self.options.process.first_slope if self.afs else None,
            correct=solver.correct if isinstance(solver, UniPC) else None,
        )


def churn_noise(seeds: Sequence[int], index: int, x: Tensor) -> Tensor:
    """Noise like x [B, 1, *] for step `index`, from each sample's own generator."""
    noise = randn(seeds, tuple(x.shape[2:]), stream=f"churn/{index}", device=x.device)
    return noise.to(x).unsqueeze(1)


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
    method: Method,
    jobs: Sequence[Job],
    *,
    batch: int,
    trajectory: bool = False,
) -> Iterator[Batch]:
    """Yield the jobs' images, `batch` at a time; an image depends on its own job alone.

    Raises ValueError for a prompt that the backend cannot take, or guidance without prompts.
    """
    rest = iter(jobs)
    while part := tuple(islice(rest, batch)):
        yield sample(backend, method, part, trajectory)


@torch.no_grad()
def sample(backend: Backend, method: Method, jobs: tuple[Job, ...], trajectory: bool) -> Batch:
    """One batch."""
    seeds = [job.seed for job in jobs]
    cond = backend.encode([job.prompt for job in jobs])
    guided = backend.guided(method.guidance_rate, cond)
    dtype = torch.promote_types(backend.dtype, torch.float32)
    noise = randn(seeds, backend.latent_shape, device=backend.device, dtype=dtype)
    x = noise * method.sigmas[0].item()
    slope = Field(guided, cond, method.points_chunk)
    kept: list[Tensor] = []
    for state in method.states(slope, x, seeds):
        x = state
        if trajectory:
            kept.append(x)
    return Batch(jobs, x, backend.decode(x), tuple(kept), slope.tally)
