"""Train fashion-mnist-32, a class-conditional SongUNet under EDM preconditioning.

    python -m exps.build.fit_fashion --outdir runs/fashion --start src/models/fashion-mnist-32

Loss and noise levels: Karras et al. 2022, arXiv:2206.00364, table 1; a tenth of the labels is
blanked, so that guidance has a null class.
"""

from math import prod, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from backends.edm import EDMNetwork, build_edm, load_edm, rows, save_edm
from exps.build.fashion_data import FOLDER, load_split, rows_of
from exps.build.fit_network import Plan, fit_network, training
from rewards.fashion import CLASSES

UNET = {
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [1, 2, 2, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
    "label_dropout": 0.1,
}
P_MEAN, P_STD = -1.0, 1.3  # of ln sigma
ABOUT = {"dataset": "Fashion-MNIST, 28x28 padded with black to 32x32", "classes": CLASSES}


def edm_loss(
    network: EDMNetwork, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor
) -> Tensor:
    """The EDM loss, weighted so that the raw network's target has unit variance."""
    noisy = images + sigma[:, None, None, None] * noise
    scaling = network.precond(sigma)
    skip, out, into = rows(scaling.skip), rows(scaling.out), rows(scaling.into)
    with torch.autocast("cpu", torch.bfloat16):
        raw = network.model(into * noisy, scaling.noise, labels)
    return (raw.float() - (images - skip * noisy) / out).square().mean()


def initialise(unet: nn.Module, generator: Generator) -> None:
    """Fill the weights in place for training, every draw from `generator`.

    Xavier-uniform weights, zero biases, residual branches that start near zero, attention at a
    fifth of the variance, Fourier frequencies N(0, 16^2) (Karras et al. 2022, appendix F.5).
    """
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim < 2:
                continue
            fan_in, fan_out = p[0].numel(), p.shape[0] * prod(p.shape[2:])
            layer = name.rsplit(".", 2)[-2]
            gain = sqrt(0.2) if layer == "qkv" else 1.0
            if layer in ("conv1", "proj", "out_conv") or layer.endswith("_aux_conv"):
                gain = 1e-5
            bound = sqrt(6 / (fan_in + fan_out)) * gain
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
        for name, buffer in unet.named_buffers():
            if name.endswith("map_noise.freqs") and "map_noise.freqs" in unet.state_dict():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 16)


@training(Plan(4000, 64, 5e-4, part=32, warmup=300), FOLDER)
def main(data: Path, outdir: Path, start: Path | None, plan: Plan) -> None:
    """Write the average in the shipped format (fp16) to OUTDIR/export; 70 minutes of one core."""
    images, labels = load_split(data, "train")
    if start:
        network = load_edm(start)
    else:  # untrained, of the shipped shape
        size = {"img_resolution": 32, "img_channels": 1, "label_dim": len(CLASSES)}
        network = build_edm("edm", {**size, "sigma_data": round(float(images.std()), 3), **UNET})
        initialise(network.model, Generator().manual_seed(plan.seed))

    def draw(step: int, g: Generator) -> tuple[Tensor, ...]:
        chosen = rows_of(step, len(images), plan.batch, plan.seed)
        kept = torch.rand(plan.batch, 1, generator=g) >= UNET["label_dropout"]
        one_hot = (F.one_hot(labels[chosen], len(CLASSES)) * kept).float()
        sigma = (torch.randn(plan.batch, generator=g) * P_STD + P_MEAN).exp()
        noise = torch.randn(plan.batch, *images.shape[1:], generator=g)
        return images[chosen], one_hot, sigma, noise

    def export(average: EDMNetwork, step: int) -> None:
        about = {**ABOUT, "steps": step}
        save_edm(outdir / "export", average, dtype=torch.float16, about=about)

    network = network.float().train().requires_grad_(True)
    fit_network(network, draw, edm_loss, plan, outdir, export)


if __name__ == "__main__":
    main()
