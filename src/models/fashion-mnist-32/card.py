"""Make the pictures and numbers of the model card, beside this file.

grid.png: ten samples of each class, 64 steps of Heun; loss.png: the training log; card.json: the
Frechet distances of generated and of real images to the test images.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.base import Backend
from backends.generate import Job, Method, sample
from backends.load import load_backend
from eval.frechet import SHIPPED, all_moments, load_reference
from eval.machine import provenance
from rewards.efficientnet import load_features
from src.files import write_json
from src.images import grid, save_png

HERE = Path(__file__).resolve().parent
BATCH = 50


def method(backend: Backend, solver: str, steps: int) -> Method:
    """A solver with so many steps on EDM's schedule, the last of them to 0."""
    sigmas = backend.levels.grid("polynomial", steps)
    return Method(sigmas, solver, denoise_to_zero=True)


def images_of(backend: Backend, way: Method, jobs: list[Job]) -> Tensor:
    """Images [N, 1, 32, 32] in [0, 1], one-threaded workers sharing the batches."""

    def batch(start: int) -> Tensor:
        torch.set_num_threads(1)
        return sample(backend, way, tuple(jobs[start : start + BATCH]), False).images

    starts = range(0, len(jobs), BATCH)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.cat(list(tqdm(pool.map(batch, starts), total=len(starts))))


def plot_loss(log: Path, out: Path) -> None:
    """The loss over the images seen, as it was logged."""
    lines = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    steps = sorted(lines)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [lines[s]["loss"] for s in steps])
    axes.set(xlabel="step (64 images each)", ylabel="EDM loss, mean of 100 steps", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(out, dpi=120)


@click.command()
@click.option("--log", type=click.Path(path_type=Path, exists=True), help="A metrics.jsonl.")
@click.option("--solver", default="ipndm-3", show_default=True)
@click.option("--steps", type=click.IntRange(2), default=16, show_default=True)
@click.option("--count", type=click.IntRange(2), default=10_000, show_default=True)
def main(log: Path | None, solver: str, steps: int, count: int) -> None:
    """Write grid.png, loss.png and card.json.

    The distance is that of --count images by --solver in --steps steps; card.json says how far
    those are from 64 steps of Heun, which the grid shows.

    Example: python src/models/fashion-mnist-32/card.py --log runs/fashion/metrics.jsonl
    """
    if log:
        plot_loss(log, HERE / "loss.png")
    backend = load_backend(str(HERE))
    fine, cheap = method(backend, "heun", 64), method(backend, solver, steps)
    jobs = [Job(seed, seed // 10) for seed in range(100)]
    shown = images_of(backend, fine, jobs)
    save_png(HERE / "grid.png", grid(shown, columns=10))
    error = (images_of(backend, cheap, jobs) - shown).square().mean().sqrt()

    started = time.monotonic()
    made = images_of(backend, cheap, [Job(seed, seed % 10) for seed in range(count)])
    seconds = time.monotonic() - started
    features, reference = load_features(), load_reference(SHIPPED)
    distance = reference.distance(all_moments(features(part) for part in tqdm(made.split(BATCH))))
    report = {
        "images": count,
        "generated": f"seeds 0-{count - 1}, class = seed mod 10, {solver}, {steps} steps",
        "rmse_to_64_steps_of_heun": round(error.item(), 4),
        "seconds_to_generate": round(seconds),
        "frechet_generated_to_test": distance,
        "frechet_train_to_test": reference.about["real_images"].get(str(count)),
        **provenance(torch.device("cpu")),
    }
    write_json(HERE / "card.json", report)
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
