"""A small student, its teacher and batches on an exact mixture, for the tests of training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels
from backends.mixture import Mixture, mixture_backend
from solvers.classic import Euler, Heun
from solvers.field import Field
from solvers.process import VE
from src.seeds import randn
from training.distill import Batch, Plan
from training.refine import Student
from training.table import PublishedForm
from training.teacher import Source, Teacher

SHAPE = (1, 3, 3)
EVERY = 4


def model() -> Backend:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    quarter = torch.full((4,), 0.25).double()
    return mixture_backend(Mixture(means, quarter, quarter), NoiseLevels(VE, 0.002, 80.0))


def student(intervals: int = 3, points: int = 2) -> Student:
    sigmas = model().levels.grid("time_uniform", intervals + 1)
    plan = Plan(tuple(sigmas.tolist()), base=Euler(), afs=True)
    return Student(plan, PublishedForm(intervals, points, 0.05, 0.05))


def start(intervals: int = 3, points: int = 2) -> Tensor:
    r = torch.tensor([(k + 1) / (points + 1) for k in range(points)]).logit()
    zero = torch.zeros(intervals, points)
    return torch.cat([r.expand(intervals, -1).flatten(), *[zero.flatten()] * 3]).double()


def source(intervals: int = 3) -> Source:
    backend = model()
    fine = backend.levels.grid("time_uniform", EVERY * intervals + 1)

    def begin(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        return Field(backend), randn(seeds, SHAPE, stream="train") * fine[0].item()

    grid = tuple(fine.tolist())
    return Source(begin, Teacher(Heun(), grid, grid[EVERY::EVERY]), {"teacher": "heun"})


def batch(first: int = 0, count: int = 8, intervals: int = 3) -> Batch:
    return source(intervals).batch(range(first, first + count))


def halves(whole: Batch) -> list[Batch]:
    parts = zip(whole.x.chunk(2), *(t.chunk(2) for t in whole.targets), strict=True)
    return [Batch(whole.field, x, tuple(targets)) for x, *targets in parts]
