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

import torch
from torch import Tensor

from eval.inception_network import Inception
from rewards.states import fill
from src.images import to_bytes

SIDE = 299
SIZE = 2048
CLASSES = 1008
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
    state = features_alone(read_tensors(path), path)
    network = fill(Inception, state, str(path), device).to(memory_format=torch.channels_last)

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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, of either format of torch; ValueError for one that holds others."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).strip().splitlines() or ["it is empty"]
        raise ValueError(f"{path} is no file of weights: {reason[0]}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(t, Tensor) for t in content.values()
    ):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, not tensors by name: get {GET}")
    return dict(content)


def features_alone(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without the classifier, and with the counters of training that some files lack.

    ValueError for the classifier of another network, such as torchvision's.
    """
    classes = state.get("fc.weight")
    if classes is not None and len(classes) != CLASSES:
        raise ValueError(f"{path} knows {len(classes)} classes, not {CLASSES}: get {GET}")
    unused = ("fc.weight", "fc.bias", "num_batches_tracked")
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(unused)}
    norms = (name.removesuffix("weight") for name in kept if name.endswith("bn.weight"))
    return kept | {norm + "num_batches_tracked": torch.tensor(0) for norm in norms}
