"""What a batch size changes is measured, and small."""

import torch

from backends.base import NoiseLevels
from backends.generate import Job
from backends.methods import HandMade
from backends.pixels import pixel_backend
from eval.batches import differences
from solvers.process import VE
from tests.tiny import tiny_edm


def test_smaller_batches_differ_by_rounding_alone() -> None:
    levels = NoiseLevels(VE, 0.002, 80.0)
    backend = pixel_backend(tiny_edm(), torch.device("cpu"))
    jobs = [Job(seed, seed % 3) for seed in range(8)]
    whole, half, single = differences(
        backend, HandMade("ipndm", 5).method(levels), jobs, (8, 4, 1)
    )
    assert (whole.latents, whole.levels, whole.pixels) == (0.0, 0, 0.0)
    assert half.levels <= 1
    assert single.levels <= 1
    assert single.pixels < 0.01
