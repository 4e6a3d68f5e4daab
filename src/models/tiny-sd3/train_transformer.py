"""Train tiny-sd3's transformer on cached latents; write a whole StableDiffusion3Pipeline folder.

Rectified flow with logit-normal levels: Esser et al. 2024, arXiv:2403.03206, section 3.1. Needs
what train_vae.py and tiny-clip's train.py wrote. Run it again to go on.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import click
import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.tiny import (
    Parts,
    build_transformer,
    load_parts,
    tokenise,
    velocity,
    write_pipeline,
)
from backends.zeros import fold_zeros
from src.emoji import Emoji, captions, drawing_weights, load_emoji
from src.files import write_json
from src.fitting import Plan, Run, fit, initialise, part_of
from src.images import grid, save_png

WIDTH, LAYERS = 192, 6
LR = 1e-3
ZERO = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
ZEROS = 256  # rows, in the pipeline's default
CAPTIONS = 16  # of each picture
NO_TEXT = 0.1
FEWER_ZEROS = 0.3  # the share with fewer rows of zeros, so that their number matters little
SHOWN = (
    *("red apple", "smiling face", "rocket", "dog face", "pizza", "red heart", "cat face", "sun"),
    *("banana", "tree", "fire", "automobile", "soccer ball", "house", "thumbs up", "octopus"),
)


@dataclass(frozen=True)
class FlowLoss:
    """The squared error of the velocity; the texts are read here, where the network is."""

    parts: Parts

    def __call__(
        self, transformer: Any, x0: Tensor, noise: Tensor, sigma: Tensor, *text: Tensor
    ) -> Tensor:
        """x0, noise [B, 16, 8, 8]; sigma [B]; tokens [B, L] and the log of how many zeros [B]."""
        tokens, log_zeros = text
        x, read = x0 + sigma[:, None, None, None] * (noise - x0), self.parts.read(tokens)
        with torch.autocast(x.device.type, torch.bfloat16):
            told = velocity(transformer, x, sigma, read, log_zeros)
        return (told.float() - (noise - x0)).square().mean()


@torch.no_grad()
def sample(transformer: Any, parts: Parts, prompts: list[str], seed: int) -> Tensor:
    """28 Euler steps with guidance 4 -> images in [0, 1]."""
    given = parts.read(tokenise(parts.tokenizer, [*prompts, *[""] * len(prompts)]))
    g = Generator().manual_seed(seed)
    x = torch.randn(len(prompts), 16, 8, 8, generator=g)
    zeros = torch.full((2 * len(x),), log(ZEROS))
    sigmas = torch.linspace(1, 0, 29)
    for sigma, following in pairwise(sigmas):
        with torch.autocast("cpu", torch.bfloat16):
            both = velocity(
                transformer, x.repeat(2, 1, 1, 1), sigma.expand(len(zeros)), given, zeros
            )
        told, free = both.float().chunk(2)
        x = x + (following - sigma) * (free + 4 * (told - free))
    return parts.decode(x)


def export(run: Run, parts: Parts, outdir: Path) -> None:
    """The pipeline's folder, a picture of the usual prompts, and how far it has come."""
    transformer = run.averaged()
    write_pipeline(transformer, parts, outdir / "tiny-sd3")
    images = sample(transformer, parts, list(SHOWN), 0)
    save_png(outdir / "samples.png", grid(images, columns=8))
    write_json(outdir / "state.json", {"steps": run.step, "minutes": run.seconds / 60})


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--runs", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--steps", type=click.IntRange(1), default=12_000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=120.0, show_default=True)
@click.option("--batch", type=click.IntRange(2), default=32, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    data: Path, runs: Path, steps: int, minutes: float, batch: int, seed: int, device: str
) -> None:
    """Train, or go on; RUNS/sd3/tiny-sd3 is the pipeline at any time.

    Example: python src/models/tiny-sd3/train_transformer.py --data runs/emoji --runs runs/tiny
    """
    torch.set_num_threads(1)
    emoji = load_emoji(data)
    latents = torch.load(runs / "vae" / "latents.pt", weights_only=True)
    parts = load_parts(runs / "vae" / "vae", runs / "clip" / "clip")
    said = tokenise(parts.tokenizer, [t for e in emoji for t in captions(e, CAPTIONS, seed)])
    silence = tokenise(parts.tokenizer, [""])
    transformer = build_transformer(WIDTH, LAYERS, parts.tower.config.hidden_size, (16, 8))
    initialise(transformer, seed, ZERO)
    fold_zeros(transformer, ZEROS, 0)
    plan = Plan(steps, minutes, LR, seed, part_of(batch, device))
    said = said.reshape(len(emoji), CAPTIONS, -1)
    draw = Drawing(latents, said, silence, trained_weights(emoji), batch)
    loss = FlowLoss(replace(parts, tower=deepcopy(parts.tower).to(device)))
    show = partial(export, parts=parts, outdir=runs / "sd3")
    fit(transformer.to(device), draw, loss, plan, runs / "sd3", show)


def trained_weights(emoji: list[Emoji]) -> Tensor:
    """How often each is drawn; those held out, never."""
    return drawing_weights(emoji) * torch.tensor([not e.held_out for e in emoji])


@dataclass(frozen=True)
class Drawing:
    """Draws what a step trains on from latents [N, 16, 8, 8] and tokens [N, CAPTIONS, L]."""

    latents: Tensor
    said: Tensor
    silence: Tensor
    weights: Tensor
    batch: int

    def __call__(self, _: int, g: Generator) -> tuple[Tensor, ...]:
        """-> x0, noise, sigma, tokens, the log of the count of zeros; some without text."""
        many = self.batch
        rows = torch.multinomial(self.weights, many, replacement=True, generator=g)
        which = torch.randint(CAPTIONS, (many,), generator=g)
        silent = torch.rand(many, 1, generator=g) < NO_TEXT
        tokens = torch.where(silent, self.silence, self.said[rows, which])
        x0 = self.latents[rows]
        noise = torch.randn(x0.shape, generator=g)
        sigma = torch.randn(many, generator=g).sigmoid()
        fewer, share = torch.rand(2, many, generator=g)
        log_zeros = log(ZEROS) * torch.where(fewer < FEWER_ZEROS, share, 1.0)
        return x0, noise, sigma, tokens, log_zeros


if __name__ == "__main__":
    main()
