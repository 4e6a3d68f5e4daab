"""Features of images: the spaces in which Frechet distances are measured.

Inception is FID's, from a local file; EfficientNet and CLIP are those of the rewards; any other
network may come as ONNX. Shapes: N images, D features.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from eval import inception, onnx_features
from rewards.efficientnet import PACKAGES, load_features
from rewards.weights import require
from src.files import nearest

ABOUT = (
    "EfficientNet-lite0, pooled features [1280]; input resized to 224x224 (bicubic, antialiased, "
    "half-pixel centres), grey repeated to 3 channels, (255 x - 127) / 128"
)
"""What a feature is, to be written beside statistics of it."""


@dataclass(frozen=True)
class Space:
    """A way to see images: two sets compare only if `about` is one."""

    name: str
    about: str
    extract: Callable[[Tensor], Tensor]  # images [N, 3, H, W] in [0, 1] -> features [N, D]
    weights: str = ""  # which file, for what is kept of it


SPACES = ("inception", "efficientnet", "clip", "onnx")
CLIP_ABOUT = "CLIP image embeddings of length 1"


def load_space(name: str, device: torch.device, weights: Path | None = None) -> Space:
    """The space of a name in SPACES, or of a callable `module:function`.

    weights: the file of `onnx`; the file of `inception`, the file or folder of `clip`, where they
    are not where `rewards.weights` looks. Raises ValueError for an unknown name, and for weights
    that are missing, wrong or of no use.
    """
    if name in ("inception", "clip"):
        path = require([name], {name: weights} if weights else {})[name]
        return inception_space(path, device) if name == "inception" else clip_space(path, device)
    if name == "onnx":
        if not weights:
            raise ValueError("the features onnx need their file: --weights dinov2.onnx")
        return onnx_space(weights, device)
    if weights:
        raise ValueError(f"--weights {weights} is of no use to the features {name}")
    if name == "efficientnet":
        return Space(name, ABOUT, load_features(device), PACKAGES)
    return Space(name, name, imported(name))


def inception_space(path: Path, device: torch.device) -> Space:
    """FID's."""
    return Space(
        "inception", inception.ABOUT, inception.load_inception(path, device), stamped(path)
    )


def clip_space(path: Path, device: torch.device) -> Space:
    """The image tower of a CLIP, from an open_clip or transformers folder or file."""
    try:
        from rewards.clip import load_towers  # noqa: PLC0415 - its libraries are met only here
    except ModuleNotFoundError as error:
        raise ValueError(f"no {error.name}: pip install open_clip_torch transformers") from error
    towers = load_towers(path, device, False)
    about = f"{CLIP_ABOUT} [{towers.width}], input {towers.look.size}x{towers.look.size}"
    return Space("clip", about, torch.no_grad()(towers.images), stamped(path))


def onnx_space(path: Path, device: torch.device) -> Space:
    """Of any network that is there as ONNX."""
    network = onnx_features.load_onnx(path, device)
    return Space("onnx", onnx_features.about(network), network, stamped(path))


def stamped(path: Path) -> str:
    """What changes when a file of weights does, or a folder's list of files."""
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"


def imported(name: str) -> Callable[[Tensor], Tensor]:
    """`module:function`, importable from the current folder; ValueError where it is not."""
    module, colon, function = name.partition(":")
    if not colon:
        near = nearest(name, SPACES)
        known = f"there are {', '.join(SPACES)}, and your own as module:function"
        raise ValueError(f"no features {name!r}: did you mean {near}? {known}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{name!r} is no function, but of type {type(found).__name__}")
    return cast(Callable[[Tensor], Tensor], found)
