"""Train the autoencoder of tiny-sd3 on scenes: pictures 64x64, latents [16, 8, 8].

    python -m exps.build.fit_tiny_vae --data runs/emoji --outdir runs/vae

Loss: L1 + squared error, the same on the pictures' differences between neighbouring pixels, and a
small Kullback-Leibler term (Kingma and Welling 2013, arXiv:1312.6114).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from exps.build.emoji_data import load_emoji, load_pictures, on_white
from exps.build.fit_network import Plan, fit_network, training
from exps.build.scenes import Stage, paint
from exps.build.tiny_models import LATENT, as_input, diffusers, load_part
from src.files import write_json
from src.images import grid, save_png

KL_WEIGHT = 3e-4


def vae_loss(vae: Any, images: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction from a drawn latent, and the mean KL of a latent's number."""
    target = as_input(images)
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(target).latent_dist
        drawn = vae.decode(latent.mean + latent.std * noise).sample
    mean, logvar = latent.mean.float(), latent.logvar.float()
    error = drawn.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + KL_WEIGHT * kl


@torch.no_grad()
def round_trip(vae: Any, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Latents as the encoder's mean [B, 16, 8, 8], images made of them again, and their PSNR."""
    latents = torch.cat([vae.encode(as_input(x)).latent_dist.mean for x in images.split(64)])
    copies = torch.cat([vae.decode(x).sample for x in latents.split(64)])
    copies = (copies / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (images - copies).square().flatten(1).mean(1).log10().mean()  # in dB
    return latents, copies, round(float(psnr), 2)


@training(Plan(3000, 16, 1e-3, part=8))
def main(data: Path, outdir: Path, start: Path | None, plan: Plan) -> None:
    """Write OUTDIR/vae (fp16, with the latents' shift and scale), scores and a picture."""
    emoji = load_emoji(data)
    pictures, stage = load_pictures(data, emoji), Stage(emoji)
    vae = load_part(diffusers.AutoencoderKL, "vae", start)
    g = Generator().manual_seed(plan.seed)
    tests = {
        "trained": paint(stage.draw(256, g), pictures),
        "held_out": paint(Stage(emoji, held_out=True).draw(256, g), pictures),
        "plain": on_white(pictures[:: len(pictures) // 256]),
    }

    def draw(_: int, g: Generator) -> tuple[Tensor, ...]:
        return paint(stage.draw(plan.batch, g), pictures), torch.randn(
            plan.batch, *LATENT, generator=g
        )

    def export(average: Any, step: int) -> None:
        trips = {name: round_trip(average, images) for name, images in tests.items()}
        scores = {name: psnr for name, (*_, psnr) in trips.items()}
        latents, copies, _ = trips["trained"]
        average.register_to_config(
            shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std())
        )
        average.half().save_pretrained(outdir / "vae")
        write_json(outdir / "scores.json", {"steps": step, "psnr": scores})
        both = zip(tests["trained"][:64].split(16), copies[:64].split(16), strict=True)
        rows = torch.cat([torch.cat(pair) for pair in both])
        save_png(outdir / "reconstructions.png", grid(rows, columns=16))

    vae = vae.train().to(memory_format=torch.channels_last)
    fit_network(vae, draw, vae_loss, plan, outdir, export)


if __name__ == "__main__":
    main()
