"""Train tiny-sd3's transformer on cached latents; write a whole StableDiffusion3Pipeline folder.

Rectified flow with logit-normal levels: Esser et al. 2024, arXiv:2403.03206, section 3.1. Needs
what train_vae.py and tiny-clip's train.py wrote. Run it again to go on.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import click
import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.tiny import (
    OneForAllZeros,
    Parts,
    build_transformer,
    load_parts,
    tokenise,
    velocity,
    write_pipeline,
)
from src.emoji import Emoji, captions, drawing_weights, load_emoji
from src.files import write_json
from src.fitting import Plan, Run, fit, initialise
from src.images import grid, save_png

WIDTH, LAYERS = 192, 6
BATCH, LR = 32, 1e-3
ZERO = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
ZEROS = 256  # rows, in the pipeline's default
CAPTIONS = 16  # of each picture
NO_TEXT = 0.1
FEWER_ZEROS = (
    0.3  # the share trained with fewer rows of zeros, so that their number matters little
)
SHOWN = (
    *("red apple", "smiling face", "rocket", "dog face", "pizza", "red heart", "cat face", "sun"),
    *("banana", "tree", "fire", "automobile", "soccer ball", "house", "thumbs up", "octopus"),
)


def flow_loss(
    transformer: Any,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    log_zeros: Tensor,
) -> Tensor:
    """The squared error of the velocity."""
    x = x0 + sigma[:, None, None, None] * (noise - x0)
    with torch.autocast("cpu", torch.bfloat16):
        told = velocity(transformer, x, sigma, (tokens, pooled), log_zeros)
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
    write_pipeline(run.ema, parts, outdir / "tiny-sd3")
    images = sample(run.ema, parts, list(SHOWN), 0)
    save_png(outdir / "samples.png", grid(images, columns=8))
    write_json(outdir / "state.json", {"steps": run.step, "minutes": run.seconds / 60})


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--vae", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--clip", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(1), default=12_000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=120.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    data: Path, vae: Path, clip: Path, outdir: Path, steps: int, minutes: float, seed: int
) -> None:
    """Train, or go on; OUTDIR/tiny-sd3 is the pipeline at any time.

    --vae is the folder that train_vae.py wrote to, --clip the one that tiny-clip's did.

    Example: python src/models/tiny-sd3/train_transformer.py --data runs/emoji
    --vae runs/tiny-vae --clip runs/tiny-clip --outdir runs/tiny-sd3
    """
    torch.set_num_threads(1)
    emoji = load_emoji(data)
    latents = torch.load(vae / "latents.pt", weights_only=True)
    parts = load_parts(vae / "vae", clip / "clip")
    said = tokenise(parts.tokenizer, [t for e in emoji for t in captions(e, CAPTIONS, seed)])
    transformer = build_transformer(WIDTH, LAYERS, parts.tower.config.hidden_size, (16, 8))
    initialise(transformer, seed, ZERO)
    transformer.set_attn_processor(OneForAllZeros())
    plan = Plan(steps, minutes, LR, seed, part=BATCH // 2)
    draw = Drawing(latents, said.reshape(len(emoji), CAPTIONS, -1), trained_weights(emoji), parts)
    fit(transformer, draw, flow_loss, plan, outdir, lambda run: export(run, parts, outdir))


def trained_weights(emoji: list[Emoji]) -> Tensor:
    """How often each is drawn; those held out, never."""
    return drawing_weights(emoji) * torch.tensor([not e.held_out for e in emoji])


@dataclass(frozen=True)
class Drawing:
    """Draws what a step trains on from latents [N, 16, 8, 8] and tokens [N, CAPTIONS, L]."""

    latents: Tensor
    said: Tensor
    weights: Tensor
    parts: Parts

    def __call__(self, _: int, g: Generator) -> tuple[Tensor, ...]:
        """-> x0, noise, sigma, tokens, pooled, log of the count of zeros; some without text."""
        rows = torch.multinomial(self.weights, BATCH, replacement=True, generator=g)
        which = torch.randint(CAPTIONS, (BATCH,), generator=g)
        silent = torch.rand(BATCH, 1, generator=g) < NO_TEXT
        tokens = torch.where(silent, tokenise(self.parts.tokenizer, [""]), self.said[rows, which])
        noise = torch.randn(BATCH, 16, 8, 8, generator=g)
        sigma = torch.randn(BATCH, generator=g).sigmoid()
        fewer, share = torch.rand(2, BATCH, generator=g)
        log_zeros = log(ZEROS) * torch.where(fewer < FEWER_ZEROS, share, 1.0)
        return self.latents[rows], noise, sigma, *self.parts.read(tokens), log_zeros


if __name__ == "__main__":
    main()
