"""Train the autoencoder of tiny-sd3: 64x64 emoji <-> latents 8x8x16, then cache all latents.

Loss: L1 + squared error, the same on the pictures' differences between neighbouring pixels, and a
small Kullback-Leibler term (Kingma and Welling 2013, arXiv:1312.6114). Run it again to go on.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.tiny import build_vae
from src.emoji import Emoji, drawing_weights, load_emoji, load_pictures, shifted
from src.files import write_atomically, write_json
from src.fitting import Plan, Run, fit, initialise, part_of
from src.images import grid, save_png

CHANNELS, LATENT = (32, 64, 96, 128), 16
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 1.0
LR = 1.5e-3


def as_input(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> floats in [-1, 1], channels last in memory."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def vary(pictures: Tensor, g: Generator) -> Tensor:
    """Mirrored or not, and shifted by up to 4 pixels."""
    mirrored = torch.rand(len(pictures), 1, 1, 1, generator=g) < 0.5
    return shifted(torch.where(mirrored, pictures.flip(-1), pictures), 4, g)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """The two errors and those of the pictures' gradients."""
    error = a - b
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    plain = error.abs().mean() + 2 * error.square().mean()
    return plain + EDGE_WEIGHT * (across.abs().mean() + down.abs().mean())


def vae_loss(vae: Any, pictures: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction from a drawn latent, and the mean KL of a latent's number."""
    target = as_input(pictures)
    with torch.autocast(target.device.type, torch.bfloat16):
        told = vae.encode(target).latent_dist
        latents = told.mean + told.std * noise
        drawn = vae.decode(latents).sample
    mean, logvar = told.mean.float(), told.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return difference(drawn.float(), target) + KL_WEIGHT * kl


@torch.no_grad()
def encode_all(vae: Any, pictures: Tensor) -> Tensor:
    """-> the mean latents [N, 16, 8, 8]."""
    parts = [vae.encode(as_input(part)).latent_dist.mean for part in pictures.split(64)]
    return torch.cat(parts).contiguous()


@torch.no_grad()
def decode_some(vae: Any, latents: Tensor) -> Tensor:
    """-> images in [0, 1]."""
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--runs", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(1), default=8000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=25.0, show_default=True)
@click.option("--batch", type=click.IntRange(2), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    data: Path, runs: Path, steps: int, minutes: float, batch: int, seed: int, device: str
) -> None:
    """Train, then write RUNS/vae/vae (fp16) and RUNS/vae/latents.pt.

    Example: python src/models/tiny-sd3/train_vae.py --data runs/emoji --runs runs/tiny
    """
    torch.set_num_threads(1)
    outdir = runs / "vae"
    emoji = load_emoji(data)
    pictures = load_pictures(data, emoji)
    weights = drawing_weights(emoji) * torch.tensor([not e.held_out for e in emoji])
    vae = build_vae(CHANNELS, LATENT).to(memory_format=torch.channels_last)
    initialise(vae, seed)

    def draw(_: int, g: Generator) -> tuple[Tensor, ...]:
        rows = torch.multinomial(weights, batch, replacement=True, generator=g)
        return vary(pictures[rows], g), torch.randn(batch, LATENT, 8, 8, generator=g)

    plan = Plan(steps, minutes, LR, seed, part_of(batch, device))
    show = partial(export, outdir=outdir, pictures=pictures, emoji=emoji)
    run = fit(vae.to(device), draw, vae_loss, plan, outdir, show)
    finish(run, outdir, pictures, emoji)


def export(run: Run, outdir: Path, pictures: Tensor, emoji: list[Emoji]) -> None:
    """The average as it would be shipped, and a picture: originals above their copies."""
    bases = [i for i, e in enumerate(emoji) if not e.tone]
    some = bases[:: -(-len(bases) // 32)]
    seen = pictures[some]
    vae = run.averaged()
    copies = decode_some(vae, encode_all(vae, seen))
    rows = torch.stack([seen.float() / 255, copies], 1)
    pairs = torch.cat([torch.cat([r[:, 0], r[:, 1]]) for r in rows.split(16)])
    save_png(outdir / "reconstructions.png", grid(pairs, columns=16))


def finish(run: Run, outdir: Path, pictures: Tensor, emoji: list[Emoji]) -> None:
    """Write the folder with the latents' shift and scale, and every picture's latent."""
    vae = run.averaged()
    latents = encode_all(vae, pictures)
    seen = torch.tensor([not e.held_out for e in emoji])
    shift, scale = float(latents[seen].mean()), 1 / float(latents[seen].std())
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.half().save_pretrained(outdir / "vae")
    with write_atomically(outdir / "latents.pt") as part:
        torch.save((latents - shift) * scale, part)
    copies = torch.cat([decode_some(vae.float(), x) for x in latents.split(64)])
    errors = (copies - pictures.float() / 255).square().mean((1, 2, 3))
    psnr = -10 * errors.log10()
    write_json(
        outdir / "scores.json",
        {
            "psnr_train": float(psnr[seen].mean()),
            "psnr_held_out": float(psnr[~seen].mean()),
            "steps": run.step,
            "minutes": run.seconds / 60,
        },
    )


if __name__ == "__main__":
    main()
