"""How far --batch changes an image: kernels choose their order of summation by the batch.

python -m eval.batches
"""

import dataclasses
from collections.abc import Sequence

import click
import torch
from torch import Tensor

from backends.base import Backend
from backends.generate import Job, Method, generate
from backends.load import load_backend
from backends.methods import HandMade, predictor_method
from solvers.predictor import find_predictor, load_predictor
from src.images import to_bytes
from src.options import Device, OneLineCommand, one_line_errors

WHOLE = 64


@dataclasses.dataclass(frozen=True)
class Difference:
    """The images of one batch size against those of the whole batch."""

    batch: int
    latents: float  # largest difference of the last state
    levels: int  # largest difference in grey levels, of 255
    pixels: float  # share of pixels that differ at all


def images_of(
    backend: Backend, method: Method, jobs: Sequence[Job], batch: int
) -> tuple[Tensor, Tensor]:
    """The last states [N, *] and the images [N, C, H, W] as bytes."""
    made = list(generate(backend, method, jobs, batch=batch))
    return torch.cat([b.latents for b in made]), to_bytes(torch.cat([b.images for b in made]))


def differences(
    backend: Backend, method: Method, jobs: Sequence[Job], batches: Sequence[int]
) -> list[Difference]:
    """Each batch size against all jobs in one batch."""
    latents, images = images_of(backend, method, jobs, len(jobs))
    found = []
    for batch in batches:
        other, others = images_of(backend, method, jobs, batch)
        apart = (others.int() - images.int()).abs()
        largest = (other - latents).abs().max().item()
        found.append(
            Difference(batch, largest, int(apart.max()), (apart > 0).float().mean().item())
        )
    return found


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(model: str, device: torch.device) -> None:
    """Print the largest differences between one batch of 64 and smaller ones.

    Example: python -m eval.batches
    """
    backend = load_backend(model, device=device)
    predictor = load_predictor(find_predictor("cifar10-5nfe"))
    methods = {
        "dpmpp-3, 9 calls": HandMade("dpmpp-3", 10).method(backend.levels),
        "cifar10-5nfe, 5 calls": predictor_method(predictor, backend.levels),
    }
    jobs = [Job(seed, backend.usual_prompt(seed)) for seed in range(WHOLE)]
    click.echo(f"{model}: {WHOLE} images at once against smaller batches\n")
    click.echo(f"{'method':24}{'batch':>6}{'latents':>12}{'grey levels':>13}{'pixels':>10}")
    for name, method in methods.items():
        for d in differences(backend, method, jobs, (1, 3, 8, 16, 32)):
            line = f"{d.batch:6}{d.latents:12.1e}{d.levels:13}{d.pixels:10.4%}"
            click.echo(f"{name:24}{line}")


if __name__ == "__main__":
    main()
