"""Small students, and where a fine solution of a smooth denoiser goes; an exact mixture."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels
from backends.mixture import Mixture, mixture_backend
from solvers.classic import DPM2, IPNDM, Euler
from solvers.field import Condition, Field
from solvers.process import VE
from tests.solvers.gauss import integrate
from training.student import Student, Trajectories
from training.table import EPDForm, MultistepForm, TimeScales

SHAPE = (1, 3, 3)
SIGMAS = (10.0, 3.0, 0.8, 0.1)
FREE = Student(SIGMAS, EPDForm(3, 2), Euler(), afs=True)
PUBLISHED = Student(SIGMAS, EPDForm(3, 2, 0.05, TimeScales(0.2, 0.25)), IPNDM(2))
MULTISTEP = Student(SIGMAS, MultistepForm(3, 2))


def model() -> Backend:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    quarter = torch.full((4,), 0.25).double()
    return mixture_backend(Mixture(means, quarter, quarter), NoiseLevels(VE, 0.002, 80.0))


def curved(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    """A smooth denoiser that is not linear."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) * 0.9 + 0.05 * x / (1 + sigma**2)


def data(*shape: int, seed: int = 0, sigmas: tuple[float, ...] = SIGMAS) -> Trajectories:
    """Noise, and where a fine solution takes it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * sigmas[0]
    logs = torch.tensor(sigmas, dtype=torch.float64).log()
    parts = [torch.linspace(a, b, 17)[:-1] for a, b in pairwise(logs.tolist())]
    fine = torch.cat([*parts, logs[-1:]]).exp()
    fine[0] = sigmas[0]
    trajectory = tuple(integrate(DPM2(), Field(curved), x, fine))
    return Trajectories(Field(curved), x, trajectory[15::16])


def with_points(student: Student, points: int) -> Student:
    return replace(student, form=replace(student.form, points=points))
