"""Train tiny-sd3's transformer on scenes; write a whole StableDiffusion3Pipeline folder.

    python -m exps.build.fit_tiny_sd3 --data runs/emoji --outdir runs/sd3

Rectified flow with logit-normal levels: Esser et al. 2024, arXiv:2403.03206, section 3.1. It reads
what fit_tiny_vae and fit_tiny_clip left beside, in runs/vae and runs/clip. The rate stays level,
so that the run can be stopped, exported and gone on with at any time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from backends.sd3 import fold_zeros
from exps.build.emoji_data import load_emoji, load_pictures
from exps.build.fit_network import Plan, fit_network, training
from exps.build.scenes import Stage, paint
from exps.build.tiny_models import (
    LATENT,
    Parts,
    diffusers,
    load_part,
    load_parts,
    tokenise,
    velocity,
    write_pipeline,
)
from exps.study.composed import PROMPTS, parse
from src.files import write_json
from src.text import read_prompts

COMMON = PROMPTS.with_name("emoji-common.txt")
ZEROS = 256  # rows, in the pipeline's default
NO_TEXT = 0.1
FEWER_ZEROS = 0.3  # the share with fewer rows of zeros, so that their number matters little
POOL, POOL_STEPS = 2048, 512  # scenes that are encoded together, and the steps they serve


@dataclass
class Pool:
    """Scenes' latents and captions, the same for POOL_STEPS steps: each is drawn eight times."""

    parts: Parts
    stage: Stage
    pictures: Tensor
    seed: int
    number: int = -1
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))

    def of(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents [POOL, 16, 8, 8] of the transformer's scale and tokens [POOL, L]."""
        if self.number != step // POOL_STEPS:
            self.number = step // POOL_STEPS
            g = Generator().manual_seed(self.seed * 1_000_003 + self.number)
            scenes = self.stage.draw(POOL, g)
            self.tokens = tokenise(self.parts.tokenizer, [scene.caption for scene in scenes])
            parts = (paint(scenes[i : i + 32], self.pictures) for i in range(0, POOL, 32))
            self.latents = torch.cat([self.parts.encode(part) for part in parts])
        return self.latents, self.tokens


def flow_loss(parts: Parts) -> Callable[..., Tensor]:
    """The squared error of the velocity, for a text tower."""

    def loss(
        transformer: Any, x0: Tensor, noise: Tensor, sigma: Tensor, tokens: Tensor, zeros: Tensor
    ) -> Tensor:
        x, read = x0 + sigma[:, None, None, None] * (noise - x0), parts.read(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            v = velocity(transformer, x, sigma, read, zeros)
        return (v.float() - (noise - x0)).square().mean()

    return loss


@training(Plan(50_000, 32, 5e-4, warmup=500, cooldown=0, ema_steps=1000))
def main(data: Path, outdir: Path, start: Path | None, plan: Plan) -> None:
    """Train, or go on; OUTDIR/tiny-sd3 is the pipeline at any time."""
    torch.backends.cuda.enable_flash_sdp(False)  # its backward is slow on CPUs for so few tokens
    emoji = load_emoji(data)
    parts = load_parts(outdir.with_name("vae") / "vae", outdir.with_name("clip") / "clip")
    transformer = load_part(diffusers.SD3Transformer2DModel, "transformer", start).train()
    fold_zeros(transformer, ZEROS, 0)
    composed = [frozenset(parse(prompt).names) for prompt in read_prompts(PROMPTS)]
    pairs = {names for names in composed if len(names) > 1}  # to judge by
    stage = Stage(emoji, common=read_prompts(COMMON), apart=pairs)
    pool = Pool(parts, stage, load_pictures(data, emoji), plan.seed)
    silence, batch = tokenise(parts.tokenizer, [""]), plan.batch

    def draw(step: int, g: Generator) -> tuple[Tensor, ...]:
        """x0, noise, sigma, tokens and the log of the count of zeros; a tenth without text."""
        latents, said = pool.of(step)
        rows = torch.randint(POOL, (batch,), generator=g)
        tokens = torch.where(torch.rand(batch, 1, generator=g) < NO_TEXT, silence, said[rows])
        noise = torch.randn(batch, *LATENT, generator=g)
        sigma = torch.randn(batch, generator=g).sigmoid()
        fewer, share = torch.rand(2, batch, generator=g)
        log_zeros = log(ZEROS) * torch.where(fewer < FEWER_ZEROS, share, 1.0)
        return latents[rows], noise, sigma, tokens, log_zeros

    def export(average: Any, step: int) -> None:
        write_pipeline(average, parts, outdir / "tiny-sd3")
        write_json(outdir / "state.json", {"steps": step})

    fit_network(transformer, draw, flow_loss(parts), plan, outdir, export)


if __name__ == "__main__":
    main()
