"""The Inception network of FID, from a local file.

A state dict, `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid, torch-fidelity), or NVIDIA's
TorchScript `inception-2015-12-05.pt`. Shapes: N images.
"""

import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from eval.inception_network import Inception, published_name
from src.images import to_bytes

SIDE = 299
SIZE = 2048
CHUNK = {"cpu": 8}  # images at once; a GPU takes more
GPU_CHUNK = 128
ABOUT = "Inception-v3 of 2015-12-05, pooled features [2048]: the features of FID"
GET = "pt_inception-2015-12-05-6726825d.pth (pytorch-fid's release) or NVIDIA's TorchScript"


def resized(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] -> [N, 3, 299, 299], bilinear as in TensorFlow 1.

    Its pixel i lies at i H / 299, not at the middles, and nothing is smoothed.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        at = torch.arange(SIDE, device=images.device, dtype=torch.float32) * (length / SIDE)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        shape = (SIDE, 1) if axis == 2 else (SIDE,)
        part = (at - low).reshape(shape)
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = below + (above - below) * part
    return images


@dataclass(frozen=True)
class InceptionFeatures:
    """The network on its device; call it with images."""

    network: Callable[[Tensor], Tensor]  # bytes as floats [N, 3, H, W], 0 to 255 -> [N, 2048]
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 1 or 3, H, W] in [0, 1], rounded to bytes -> features [N, 2048] on the CPU.

        Raises ValueError for other channels, and for a network with other features.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"features need images [N, 1 or 3, H, W], not {list(images.shape)}")
        parts = [self.chunk(part) for part in images.split(CHUNK.get(self.device.type, GPU_CHUNK))]
        return torch.cat(parts) if parts else torch.empty(0, SIZE)

    @torch.inference_mode()
    def chunk(self, images: Tensor) -> Tensor:
        """As many images as go through the network at once."""
        bytes_ = to_bytes(images.to(self.device)).expand(-1, 3, -1, -1)
        found = self.network(bytes_)
        if found.shape != (len(images), SIZE):
            raise ValueError(f"the network gives {list(found.shape)}, not features [N, {SIZE}]")
        return found.float().cpu()


def load_inception(path: Path, device: torch.device | str = "cpu") -> InceptionFeatures:
    """The network of a state dict or a TorchScript file.

    Raises ValueError, in one line, for a file that is missing, neither, or of other tensors.
    """
    device = torch.device(device)
    if not path.is_file():
        raise ValueError(f"no Inception weights at {path}: get {GET}")
    if is_script(path):
        return InceptionFeatures(scripted(path, device), device)
    network = filled(read_state(path), path).to(device)

    def features(images: Tensor) -> Tensor:
        return network((resized(images.float()) - 128) / 128)

    return InceptionFeatures(features, device)


def is_script(path: Path) -> bool:
    """Whether a file is TorchScript: a zip with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def scripted(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """NVIDIA's TorchScript, which resizes by itself and takes bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is what the network is published as
        try:
            network = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no whole TorchScript file") from error

    def features(images: Tensor) -> Tensor:
        try:
            return network(images, return_features=True)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} is not the Inception network of FID: {reason}") from error

    return features


def read_state(path: Path) -> Mapping[str, Any]:
    """The tensors of a file; ValueError for one that holds none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).strip().splitlines() or ["it is empty"]
        raise ValueError(f"{path} is no file of weights: {reason[0]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not tensors by name: get {GET}"
        )
    return content


def filled(state: Mapping[str, Any], path: Path) -> Inception:
    """The network with these tensors, without its classifier, ready to use."""
    with torch.device("meta"):
        network = Inception()
    own = {n: published_name(n) for n in network.state_dict() if "num_batches" not in n}
    missing = [theirs for theirs in own.values() if theirs not in state]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more: get {GET}")
    tensors = {n: torch.as_tensor(state[theirs]).float() for n, theirs in own.items()}
    for n, shape in ((n, t.shape) for n, t in network.state_dict().items() if n in tensors):
        if tensors[n].shape != shape:
            got = list(tensors[n].shape)
            raise ValueError(f"{path}: {own[n]} is {got}, not {list(shape)}: get {GET}")
    counters = {n: torch.tensor(0) for n in network.state_dict() if "num_batches" in n}
    network.load_state_dict(tensors | counters, assign=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
