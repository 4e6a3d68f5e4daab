"""Distillation for anyone's own network: a denoiser in, a predictor out.

    def denoiser(x, sigma, cond):          # x [B, *], sigma [B] -> the clean estimate [B, *]
        return network(x, sigma)

    predictor = distill(denoiser, "ve", shape=(4, 64, 64), settings=Settings(nfe=5))
    x = sample(predictor, denoiser, noise)  # standard normal noise [B, 4, 64, 64]

Nothing is back-propagated, so any network that can be sampled can be distilled, and latents may
have any shape: vectors, audio [C, T], images, video [C, T, H, W].
"""

from training.distill import distill, sample
from training.settings import Settings

__all__ = ["Settings", "distill", "sample"]
