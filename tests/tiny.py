"""Small real networks with random weights, built in tests and loaded by the real code."""

from pathlib import Path

import torch

from backends.edm import EDMNetwork, build_edm, save_edm

ARGUMENTS = {
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
}


def tiny_edm(label_dim: int = 3, seed: int = 0, img_resolution: int = 16) -> EDMNetwork:
    """A network of a few thousand random weights for one grey channel."""
    size = {"img_resolution": img_resolution, "label_dim": label_dim}
    network = build_edm("edm", ARGUMENTS | size)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return network


def tiny_model(folder: Path, label_dim: int = 3, img_resolution: int = 16) -> Path:
    """The folder of such a network."""
    save_edm(folder, tiny_edm(label_dim, img_resolution=img_resolution))
    return folder
