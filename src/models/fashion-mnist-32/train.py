"""Train the shipped Fashion-MNIST network: a class-conditional SongUNet under EDM preconditioning.

Loss and noise levels: Karras et al. 2022, arXiv:2206.00364, table 1. A stopped run goes on where
its last checkpoint left it. Everything random hangs on the seed and the step.
"""

import gzip
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.edm import EDM, build_edm, save_edm
from backends.edm_networks import initialise
from backends.edm_precond import rows
from src.files import write_atomically

NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
UNET = {
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [1, 2, 2, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
    "label_dropout": 0.1,
}


CHECKPOINT = "checkpoint.pt"
SAVE_EVERY = 240.0  # seconds
PART = 16  # images that a worker takes at a time


@dataclass(frozen=True)
class Plan:
    """How to train."""

    steps: int
    minutes: float
    batch: int
    lr: float
    seed: int
    p_mean: float = -1.0
    p_std: float = 1.3
    label_dropout: float = 0.1
    warmup: int = 300
    ema_images: int = 50_000  # the half-life of the average, at most a twentieth of what was seen


def read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of bytes -> uint8 tensor of the shape that its header says."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    return torch.frombuffer(bytearray(raw[4 + 4 * ndim :]), dtype=torch.uint8).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] in [-1, 1], padded with black from 28x28, and their classes [N]."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:, None]
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()
    return F.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0), labels


def draw(images: Tensor, labels: Tensor, plan: Plan, g: Generator) -> tuple[Tensor, ...]:
    """What one step trains on: images, one-hot labels (some blanked), sigma [B] and noise."""
    b = len(images)
    sigma = (torch.randn(b, generator=g) * plan.p_std + plan.p_mean).exp()
    keep = torch.rand(b, generator=g) >= plan.label_dropout
    one_hot = F.one_hot(labels, len(NAMES)) * keep[:, None]
    return images, one_hot.float(), sigma, torch.randn(images.shape, generator=g)


def edm_loss(network: EDM, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """The EDM loss, weighted so that the raw network's target has unit variance."""
    noisy = images + sigma[:, None, None, None] * noise
    scaling = network.precond(sigma)
    skip, out, into = rows(scaling.skip), rows(scaling.out), rows(scaling.into)
    with torch.autocast("cpu", torch.bfloat16):
        raw = network.model(into * noisy, scaling.noise, labels)
    return (raw.float() - (images - skip * noisy) / out).square().mean()


def gradients(network: EDM, drawn: tuple[Tensor, ...], pool: ThreadPoolExecutor) -> Tensor:
    """Set the gradients of a step, return its loss.

    One-threaded workers take small parts from a queue, so that a core which is busy with other
    work does not hold up the rest; summed in order, so that the result does not depend on them.
    """
    parameters = list(network.parameters())

    def part(rows: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        loss = edm_loss(network, *rows) * (len(rows[0]) / len(drawn[0]))
        return loss.detach(), torch.autograd.grad(loss, parameters)

    parts = zip(*(tensor.split(PART) for tensor in drawn), strict=True)
    losses, grads = zip(*pool.map(part, parts), strict=True)
    for p, *shares in zip(parameters, *grads, strict=True):
        p.grad = torch.stack(shares).sum(0)
    return torch.stack(losses).sum()


def lr_at(progress: float, step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine down to 0 at progress 1."""
    return plan.lr * min(1.0, (step + 1) / plan.warmup) * (1 + cos(pi * min(progress, 1.0))) / 2


def update_ema(ema: EDM, network: EDM, step: int, plan: Plan) -> None:
    """Move the average towards the weights, in place."""
    halflife = min(plan.ema_images, 0.05 * (step + 1) * plan.batch)
    pull = 1 - 0.5 ** (plan.batch / halflife)
    with torch.no_grad():
        for averaged, p in zip(ema.parameters(), network.parameters(), strict=True):
            averaged.lerp_(p, pull)


@dataclass
class Run:
    """A training run as far as it has come."""

    network: EDM
    ema: EDM
    optimiser: torch.optim.Adam
    step: int = 0
    seconds: float = 0.0

    def save(self, outdir: Path) -> None:
        """Write the checkpoint and, beside it, the average in the shipped format (fp16)."""
        state = {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with write_atomically(outdir / CHECKPOINT) as part:
            torch.save(state, part)
        about = {
            "dataset": "Fashion-MNIST, 28x28 padded with black to 32x32",
            "classes": NAMES,
            "steps": self.step,
        }
        save_edm(outdir / "export", self.ema, dtype=torch.float16, about=about)

    def restore(self, outdir: Path) -> None:
        """Go on from the checkpoint in outdir, if there is one."""
        if not (outdir / CHECKPOINT).exists():
            return
        state = torch.load(outdir / CHECKPOINT, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(1), default=13_000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=1e6, help="Stop after this long.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--lr", type=click.FloatRange(0), default=1.5e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    data: Path | None, outdir: Path, steps: int, minutes: float, batch: int, lr: float, seed: int
) -> None:
    """Train on the Debian package dataset-fashion-mnist; run it again to go on after a stop.

    Example: python src/models/fashion-mnist-32/train.py --outdir runs/fashion --minutes 75
    """
    plan = Plan(steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed)
    folder = data or Path("/usr/share/datasets/fashion-mnist")
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        hint = "apt install dataset-fashion-mnist"
        raise click.ClickException(f"no Fashion-MNIST in {folder}: {hint}")
    images, labels = load_split(folder, "train")
    arguments = {
        "img_resolution": 32,
        "img_channels": 1,
        "label_dim": 10,
        "sigma_data": round(float(images.std()), 3),
        **UNET,
    }
    network = build_edm("edm", arguments).train()
    initialise(network.model, Generator().manual_seed(seed))
    outdir.mkdir(parents=True, exist_ok=True)
    train(network, images, labels, plan, outdir)


def train(network: EDM, images: Tensor, labels: Tensor, plan: Plan, outdir: Path) -> None:
    """The loop: the checkpoint, the log and the exported average go to outdir."""
    optimiser = torch.optim.Adam(network.parameters(), lr=plan.lr, betas=(0.9, 0.99))
    run = Run(network, deepcopy(network).eval(), optimiser)
    run.restore(outdir)
    saved = run.seconds
    clock = time.monotonic() - run.seconds
    losses: list[Tensor] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=plan.steps) as bar:
        bar.update(run.step)
        while (progress := max(run.step / plan.steps, run.seconds / 60 / plan.minutes)) < 1:
            rows = rows_of(run.step, len(images), plan)
            g = Generator().manual_seed(plan.seed * 1_000_000_007 + run.step)
            losses.append(gradients(network, draw(images[rows], labels[rows], plan, g), pool))
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = lr_at(progress, run.step, plan)
            optimiser.step()
            update_ema(run.ema, network, run.step, plan)
            run.step += 1
            run.seconds = time.monotonic() - clock
            bar.update()
            if run.step % 100 == 0:
                log(outdir, run, losses)
            if run.seconds - saved > SAVE_EVERY:
                run.save(outdir)
                saved = run.seconds
    run.save(outdir)


def rows_of(step: int, images: int, plan: Plan) -> Tensor:
    """Which images a step takes: every epoch all of them, in an order of its own."""
    per_epoch = images // plan.batch
    shuffle = Generator().manual_seed(plan.seed * 100_003 + step // per_epoch)
    start = step % per_epoch * plan.batch
    return torch.randperm(images, generator=shuffle)[start : start + plan.batch]


def log(outdir: Path, run: Run, losses: list[Tensor]) -> None:
    """Append the mean loss since the last line, and start anew."""
    row = {
        "step": run.step,
        "seconds": round(run.seconds, 1),
        "loss": float(torch.stack(losses).mean()),
        "lr": run.optimiser.param_groups[0]["lr"],
    }
    losses.clear()
    with (outdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
