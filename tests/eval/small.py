"""An exact backend, a study on it, and a cheap stand-in for the feature network."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from click.testing import CliRunner
from torch import Tensor

from backends.base import Backend, NoiseLevels
from backends.generate import Job
from backends.mixture import Mixture, mixture_backend
from eval.candidates import fine_solution
from eval.frechet import Reference
from eval.measure import Judge, Study
from eval.scripts import last_line
from sample import main as sample
from solvers.process import FLOW, VE
from src.files import write_json
from train_distill import main as distil

FEATURES = 5


def mixture() -> Mixture:
    """Three components in R^(1x4x4)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.5
    return Mixture(means, torch.tensor([0.2, 0.3, 0.1]).double(), torch.full((3,), 1 / 3).double())


def exact() -> Backend:
    """The mixture under the VE process."""
    return mixture_backend(mixture(), NoiseLevels(VE, 0.002, 80.0))


def exact_flow() -> Backend:
    """The mixture under flow matching."""
    return mixture_backend(mixture(), NoiseLevels(FLOW, 0.001, 1.0))


def study(images: int = 8, batch: int = 4, steps: int = 200) -> Study:
    """A study on the exact backend."""
    backend = exact()
    jobs = tuple(Job(seed) for seed in range(images))
    return Study(backend, jobs, fine_solution(backend.levels, steps), batch)


def rebatched(given: Study, batch: int) -> Study:
    """The same study in other batches."""
    return replace(given, batch=batch)


def cheap_features(images: Tensor) -> Tensor:
    """Five numbers of an image: [N, C, H, W] -> [N, 5]."""
    flat = images.flatten(1)
    extremes = [flat.amax(1), flat.amin(1), flat.median(1).values]
    return torch.stack([flat.mean(1), flat.std(1), *extremes], 1)


def reference() -> Reference:
    """A standard normal one in the space of the cheap features."""
    d = FEATURES
    return Reference(100, torch.zeros(d).double(), torch.eye(d).double(), {"images": "none"})


def judge() -> Judge:
    """Distances by the cheap features."""
    return Judge(cheap_features, reference())


def save_mixture(folder: Path) -> Path:
    """The mixture as a model's folder."""
    m = mixture()
    about = {"backend": "analytic", "process": "ve", "shape": list(m.means.shape[1:])}
    about |= {"means": m.means.flatten(1).tolist(), "std": m.std.tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**about, "weight": m.weight.tolist()})
    return folder


def here(script: str, options: Sequence[str]) -> None:
    """A command of the root in this process; ValueError with its last line where it fails."""
    done = CliRunner().invoke({"train_distill.py": distil, "sample.py": sample}[script], options)
    if done.exit_code:
        raise ValueError(last_line(done.output))
