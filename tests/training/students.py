"""A small student, its teacher and batches on an exact mixture, for the tests of training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels
from backends.mixture import Mixture, mixture_backend
from solvers.classic import Euler, Heun
from solvers.field import Field
from solvers.process import VE
from solvers.sampler import Sampler
from src.seeds import randn
from training.student import Student, Trajectories
from training.table import PublishedForm, even_table
from training.teacher import Batches, Cache, Teacher, in_parts

SHAPE = (1, 3, 3)
EVERY = 4


def model() -> Backend:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    quarter = torch.full((4,), 0.25).double()
    return mixture_backend(Mixture(means, quarter, quarter), NoiseLevels(VE, 0.002, 80.0))


def student(intervals: int = 3, points: int = 2) -> Student:
    sigmas = tuple(model().levels.grid("time_uniform", intervals + 1).tolist())
    return Student(sigmas, PublishedForm(intervals, points, 0.05, 0.05), Euler(), afs=True)


def start(intervals: int = 3, points: int = 2) -> Tensor:
    return student(intervals, points).encode(even_table(intervals, points))


def batches(seeds: Sequence[int], size: int = 8, cache: Cache | None = None) -> Batches:
    denoise = model().denoise
    grid = tuple(model().levels.grid("time_uniform", EVERY * 3 + 1).tolist())

    def begin(seeds: Sequence[int]) -> tuple[Field, Tensor]:
        return Field(denoise), randn(seeds, SHAPE, stream="train") * grid[0]

    teacher = Teacher(Sampler(Heun(), grid), grid[EVERY::EVERY])
    return Batches(begin, teacher, in_parts(seeds, size), {"teacher": "heun"}, cache)


def batch(first: int = 0, count: int = 8) -> Trajectories:
    return batches(range(first, first + count), count)[0]


def cached(folder: Path, said: list[str] | None = None, max_bytes: int = 1 << 30) -> Cache:
    return Cache(folder, max_bytes, ([] if said is None else said).append)
