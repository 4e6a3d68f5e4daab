"""An exact backend, a benchmark on it, and predictors for it."""

from pathlib import Path

import torch

from backends.base import Backend, NoiseLevels
from backends.generate import Job
from backends.mixture import Mixture, mixture_backend
from eval.features import load_space
from eval.fid import Statistics
from eval.measure import Benchmark, FrechetReference, fine_solution
from solvers.epd import Directions, MultistepTable
from solvers.predictor import Predictor, save_predictor
from solvers.process import FLOW, VE
from solvers.recipe import Recipe
from tests.eval.drawings import CHEAP

D = 5


def exact(process: str = "ve") -> Backend:
    """Three components in R^(1x4x4), denoised exactly, under either process."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.5
    std, weight = torch.tensor([0.2, 0.3, 0.1]).double(), torch.full((3,), 1 / 3).double()
    levels = NoiseLevels(VE, 0.002, 80.0) if process == "ve" else NoiseLevels(FLOW, 0.001, 1.0)
    return mixture_backend(Mixture(means, std, weight), levels)


def benchmark(images: int = 8, batch: int = 4, steps: int = 200) -> Benchmark:
    """One on the exact backend."""
    backend = exact()
    jobs = tuple(Job(seed) for seed in range(images))
    return Benchmark(backend, jobs, fine_solution(backend.levels, steps), batch)


def reference() -> FrechetReference:
    """A standard normal one in the space of the cheap features."""
    eye = torch.eye(D, dtype=torch.float64)
    space = load_space(CHEAP, torch.device("cpu"))
    return FrechetReference(space, Statistics(100, 0 * eye[0], eye))


def save(folder: Path, name: str, base: str = "euler", k: int = 2, steps: int = 3) -> Path:
    """An EPD of points in the middle, fitted on the cheap features as it says."""
    ones = torch.ones(steps - 1, k, dtype=torch.float64)
    table = Directions(ones / 2, ones / k, ones, ones)
    training = {"fitted_on": [CHEAP]}
    recipe = Recipe(
        num_steps=steps, num_points=k, base=base, afs=True, max_order=2, training=training
    )
    save_predictor(Predictor(table, recipe), folder / f"{name}.pkl")
    return folder / f"{name}.pkl"


def save_multistep(path: Path, k: int = 1, process: str = "ve") -> Path:
    """Three intervals of a multistep that copies the newest slope, on levels of its own."""
    newest = torch.zeros(3, 5, dtype=torch.float64)
    newest[:, 1] = 1
    newest[0] = torch.eye(5, dtype=torch.float64)[0]
    one = torch.ones(3, k, dtype=torch.float64)
    recipe = Recipe(
        num_steps=4,
        num_points=k,
        solver="epd-multistep",
        schedule_type="custom",
        sigmas=(80.0, 3.0, 0.4, 0.002) if process == "ve" else (1.0, 0.8, 0.3, 0.001),
        process=process,
        scale_dir=0.0,
    )
    table = MultistepTable(newest, one / 2, one / k, 0 * newest, one)
    save_predictor(Predictor(table, recipe), path)
    return path
