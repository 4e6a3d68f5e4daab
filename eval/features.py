"""Features of images: the spaces in which sets of images are compared, and fits may look.

Inception is FID's, from a local file; EfficientNet and a judge of clothes ship; CLIP and DINOv2
come from local folders, any other network as `module:function`. Shapes: N images, D features.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.base import looking
from rewards.efficientnet import PACKAGES, prepared
from rewards.efficientnet import load_features as load_efficientnet
from rewards.fashion import WEIGHTS as JUDGE
from rewards.fashion import load_judge
from rewards.fingerprint import source_hash
from rewards.registry import MULTI, parse
from rewards.state_dicts import fill, read_state
from rewards.weights import require, sha256
from src.files import nearest
from src.functions import name_of, own_function
from src.images import to_bytes
from src.torchscript import load_script

SPACES = ("inception", "efficientnet", "clip", "dinov2", "fashion-judge")
EFFICIENTNET = (
    "EfficientNet-lite0, pooled features [1280]; input resized to 224x224 (bicubic, antialiased, "
    "half-pixel centres), grey repeated to 3 channels, (255 x - 127) / 128"
)
FASHION = "the last layer's input [128] of src/models/fashion-mnist-judge, a classifier"
INCEPTION = "Inception-v3 of 2015-12-05, pooled features [2048]: the features of FID"
GET_INCEPTION = (
    "pt_inception-2015-12-05-6726825d.pth (pytorch-fid's release) or NVIDIA's TorchScript"
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
CPU_CHUNK = {"efficientnet": 4, "inception": 8, "clip": 16, "dinov2": 16}
GPU_CHUNK = 128
"""Images at once; on a CPU a small chunk stays in the cache."""

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeatureSpace:
    """A way to see images: two sets compare only if `about` and `version` are the same."""

    name: str
    about: str
    network: Network
    """Images [N, 3, H, W], floats in [0, 1] on `device` -> [N, D], as they are, with gradients
    where the network has them."""
    device: torch.device
    version: str = ""  # of the weights or the source, where `about` leaves them open

    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, D], float32 on the CPU, of images [N, 1 or 3, H, W], floats in [0, 1].

        Images are rounded to bytes first, so that they have the features of their PNGs. N >= 1.
        Raises ValueError for other channels, and where the network fails or returns another
        shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"features need images [N, 1 or 3, H, W], not {list(images.shape)}")
        at_once = CPU_CHUNK.get(self.name, 64) if self.device.type == "cpu" else GPU_CHUNK
        parts = []
        for part in images.split(at_once):
            levels = to_bytes(part.to(self.device)).float().expand(-1, 3, -1, -1)
            with torch.no_grad(), looking(self.name, levels):
                features = self.network(levels / 255)
            shape = list(features.shape) if isinstance(features, Tensor) else type(features)
            fits = isinstance(features, Tensor) and features.shape[:-1] == part.shape[:1]
            if not fits or not features.numel():
                raise ValueError(f"{self.name} must return [{len(part)}, D], not {shape}")
            parts.append(features.float().cpu())
        return torch.cat(parts)


RIDES_ON = {"aesthetic": "clip"}
"""Rewards that see an image by the features of another."""
OF_NETWORKS = {
    **dict.fromkeys(("efficientnet-lite0", "efficientnet-minilm"), "efficientnet"),
    **dict.fromkeys(("rewards.efficientnet:", f"{__name__}:load_space."), "efficientnet"),
    "rewards.fashion:": "fashion-judge",
    **dict.fromkeys((f"{__name__}:_fidelity", f"{__name__}:_scripted"), "inception"),
    **{f"{__name__}:_dinov2": "dinov2", "rewards.clip:": "clip"},
}
"""Spaces by how the names of their networks begin."""


def spaces_of(names: Sequence[str]) -> tuple[str, ...]:
    """The feature spaces of networks and rewards, by train_distill.py's names of them."""
    spaces = []
    for name in names:
        for single in parse(name) if name.partition(":")[0] == MULTI else [name]:
            kind = single.partition("=")[0]  # of dinov2=FOLDER
            file = Path(kind).name.lower() if ":" not in kind and Path(kind).suffix else ""
            space = next((s for mark, s in OF_NETWORKS.items() if kind.startswith(mark)), kind)
            space = "inception" if "inception" in file else space
            spaces.append(RIDES_ON.get(space, space))
    return tuple(spaces)


def synonyms(name: str) -> set[str]:
    """The names that recipes may have for a space: as it is typed, and that of what it wraps."""
    return {name, name_of(own_function(name))} if ":" in name else {name}


def load_space(name: str, device: torch.device, weights: Path | None = None) -> FeatureSpace:
    """The space of a name in SPACES, or of a callable `module:function`.

    weights: the file of inception, the file or folder of clip, the folder of dinov2, where they
    are not where `rewards.weights` looks. Raises ValueError, in one line, for an unknown name,
    for weights that are missing, wrong or of no use, and for a function that cannot be imported.
    """
    load = {"inception": _inception, "clip": _clip, "dinov2": _dinov2}.get(name)
    if load:
        return load(require([name], {name: weights} if weights else {})[name], device)
    if weights and name != "efficientnet":
        raise ValueError(f"--weights {weights} is of no use to the features {name}")
    if name == "fashion-judge":
        judge = load_judge(device=device)
        return FeatureSpace(name, FASHION, judge.features, device, sha256(JUDGE)[:16])
    if ":" in name:  # importable from the current folder
        version = source_hash(name.partition(":")[0])[:16]
        return FeatureSpace(name, name, own_function(name), device, version)
    if name != "efficientnet":
        choice = f"there are {', '.join(SPACES)}, and your own as module:function"
        raise ValueError(f"no features {name!r}: did you mean {nearest(name, SPACES)}? {choice}")
    features = load_efficientnet(device, path=weights)

    def efficientnet(images: Tensor) -> Tensor:
        return features.maps(prepared(images, features.side)).mean((2, 3))

    version = sha256(weights)[:16] if weights else PACKAGES
    return FeatureSpace(name, EFFICIENTNET, efficientnet, device, version)


def _inception(path: Path, device: torch.device) -> FeatureSpace:
    """Of a state dict (pytorch-fid, torch-fidelity), or of NVIDIA's TorchScript."""
    scripted = False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any("/code/" in name for name in archive.namelist())
    network = _scripted(path, device) if scripted else _fidelity(path, device)
    return FeatureSpace("inception", INCEPTION, network, device)


def _fidelity(path: Path, device: torch.device) -> Network:
    """torch-fidelity's network; its own reader, which would run a pickle, is not let near."""
    from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
        FeatureExtractorInceptionV3,
    )
    from torch_fidelity.interpolate_compat_tensorflow import (  # noqa: PLC0415
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    if not path.is_file():
        raise ValueError(f"no Inception weights at {path}: get {GET_INCEPTION}")
    state = io.BytesIO()
    torch.save(read_state(path), state)
    state.seek(0)
    try:
        whole = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=state
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is not FID's Inception ({reason}): get {GET_INCEPTION}"
        ) from error
    parts = [part for name, part in whole.named_children() if name != "fc"]
    network = nn.Sequential(*parts, nn.Flatten()).to(device).to(memory_format=torch.channels_last)

    def features(images: Tensor) -> Tensor:
        large = interpolate_bilinear_2d_like_tensorflow1x(
            images * 255, size=(299, 299), align_corners=False
        )
        return network((large - 128) / 128)

    return features


def _scripted(path: Path, device: torch.device) -> Network:
    """NVIDIA's TorchScript, which resizes by itself and takes levels from 0 to 255."""
    network = load_script(path, device)

    def features(images: Tensor) -> Tensor:
        try:
            return network(images * 255, return_features=True)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} is not the Inception network of FID: {reason}") from error

    return features


def _clip(path: Path, device: torch.device) -> FeatureSpace:
    """The image tower of a CLIP, from an open_clip or transformers folder or file."""
    from rewards.clip import load_towers  # noqa: PLC0415 (its libraries take seconds)

    towers = load_towers(path, device, False)
    size = towers.preprocess.size
    about = f"CLIP image embeddings of length 1 [{towers.width}], input {size}x{size}"
    return FeatureSpace("clip", about, towers.images, device, _content(path))


def _dinov2(folder: Path, device: torch.device) -> FeatureSpace:
    """The class token of a DINOv2, as Stein et al. 2023 (arXiv:2306.04675) take it."""
    from rewards.clip import WEIGHTS, config_in, transformers, weights_in  # noqa: PLC0415

    config = config_in(folder, "dinov2", transformers.Dinov2Config.from_dict)
    path = weights_in(folder, WEIGHTS)
    network = fill(lambda: transformers.Dinov2Model(config), read_state(path), str(path), device)
    middle, spread = (torch.tensor(v, device=device)[:, None, None] for v in IMAGENET)

    def features(images: Tensor) -> Tensor:
        size = (SIDE, SIDE)
        square = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return network((square - middle) / spread).last_hidden_state[:, 0]

    size = config.hidden_size
    about = f"DINOv2, class token [{size}], input resized to {SIDE}x{SIDE} (bicubic)"
    return FeatureSpace("dinov2", about, features, device, _content(folder))


def _content(path: Path) -> str:
    """A hash of a file, or of the weights in a folder."""
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return " ".join(sha256(file)[:16] for file in (files if path.is_dir() else [path]))
