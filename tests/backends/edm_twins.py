"""Small EDM networks with weights by rule, for tests."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.edm import EDMNetwork, build_edm

TINY_SONG: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
TINY_NCSN: dict[str, Any] = {
    **TINY_SONG,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
TINY_ADM: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 9,
}


def by_rule(name: str, shape: Sequence[int]) -> Tensor:
    """A tensor of the rule that tests/data/edm_networks.json states."""
    index, line = torch.arange(torch.Size(shape).numel(), dtype=torch.float64), len(shape) == 1
    base, scale = float(line and name.endswith("weight")), 0.1 if line else 0.05
    values = base + scale * torch.sin(0.37 * index + zlib.crc32(name.encode()) % 1000)
    return values.float().reshape(shape)


def fill_by_rule(network: EDMNetwork) -> EDMNetwork:
    """A network with weights of that rule, in place."""
    for name, p in network.named_parameters():
        p.data.copy_(by_rule(name, p.shape))
    freqs = network.state_dict().get("model.map_noise.freqs")
    if freqs is not None:
        freqs.copy_(torch.linspace(-16, 16, len(freqs)))
    return network


def twin(precond: str, arguments: dict[str, Any]) -> EDMNetwork:
    """A network with weights by rule, that asks for no gradients."""
    return fill_by_rule(build_edm(precond, arguments)).requires_grad_(False)


def wave(*shape: int) -> Tensor:
    """3 sin(0.11 k) over the flat index k."""
    numel = torch.Size(shape).numel()
    return (3 * torch.sin(0.11 * torch.arange(numel, dtype=torch.float64))).float().reshape(shape)
