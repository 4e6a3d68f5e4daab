"""Features by an ONNX file, such as DINOv2 (Oquab et al. 2023, arXiv:2304.07193).

Its Frechet distance follows people's judgement more closely than Inception's (Stein et al. 2023,
arXiv:2306.04675). Shapes: N images, D features, S pixels a side, T tokens.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.intact import sha256
from rewards.pixels import one_pass
from src.images import to_bytes

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, which DINOv2 takes."""
SIDE = 224
"""Where the file leaves it open."""
CHUNK = 16
PACKAGE = "onnxruntime"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class OnnxFeatures:
    """A network of onnxruntime; call it with images."""

    path: Path
    session: Any
    entry: str
    kind: type[np.floating[Any]]
    side: int
    batch: int | None  # images that it takes at once, where the file says so

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 1 or 3, H, W] in [0, 1], rounded to bytes -> features [N, D] on the CPU.

        N > 0. Raises ValueError for other channels, and where the network fails or gives
        something else.
        """
        pixels = prepared(images, self.side)
        parts = [self.chunk(part) for part in pixels.split(self.batch or CHUNK)]
        return torch.cat(parts)

    def chunk(self, pixels: Tensor) -> Tensor:
        """As many [n, 3, S, S] as go through the network at once; a fixed batch is filled up."""
        count = len(pixels)
        if self.batch and count < self.batch:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch - count, -1, -1, -1)])
        try:
            found = self.session.run(None, {self.entry: pixels.numpy().astype(self.kind)})[0]
        except onnx_errors() as error:
            raise ValueError(f"{self.path}: {' '.join(str(error).split())}") from error
        features = torch.from_numpy(np.asarray(found, np.float32))[:count]
        if features.ndim == 3:
            features = features[:, 0]
        if features.ndim != 2 or len(features) != count:
            raise ValueError(f"{self.path} gives {list(found.shape)}, not [N, D] or [N, T, D]")
        return features


def prepared(images: Tensor, side: int) -> Tensor:
    """Images [N, 1 or 3, H, W] in [0, 1] -> [N, 3, S, S], by Pillow's bicubic, normalised.

    The whole image becomes a square, along its rows first.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"features need images [N, 1 or 3, H, W], not {list(images.shape)}")
    levels = to_bytes(images).cpu().float().expand(-1, 3, -1, -1)
    square = one_pass(one_pass(levels, (levels.shape[2], side)), (side, side)) / 255
    middle, spread = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (square - middle) / spread


def load_onnx(path: Path, device: torch.device | str = "cpu") -> OnnxFeatures:
    """The network of a file with one input [N, 3, S, S]; its first output is what counts.

    On a GPU where onnxruntime has a provider for it. Raises ValueError, in one line, for a file
    that is missing, broken or of another kind, and where onnxruntime is not installed.
    """
    if not path.is_file():
        raise ValueError(f"no ONNX file at {path}: export the network, or get its model.onnx")
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise ValueError(f"no {error.name}: for --features onnx, pip install {PACKAGE}") from error
    wanted = ["CPUExecutionProvider"]
    if torch.device(device).type == "cuda":
        wanted.insert(0, "CUDAExecutionProvider")
    there = [name for name in wanted if name in runtime.get_available_providers()]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong is told once, as an error
    try:
        session = runtime.InferenceSession(str(path), options, providers=there)
    except onnx_errors() as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return entered(path, session)


def entered(path: Path, session: Any) -> OnnxFeatures:
    """The network with what its input says; ValueError for another input."""
    inputs = session.get_inputs()
    told = [f"{one.name} {one.type} {one.shape}" for one in inputs]
    shape = list(inputs[0].shape) if len(inputs) == 1 else []
    sides = {side for side in shape[2:] if isinstance(side, int)}
    fits = len(shape) == 4 and (shape[1] == 3 or not isinstance(shape[1], int))
    if not fits or len(sides) > 1 or inputs[0].type not in TYPES:
        raise ValueError(f"{path} takes {', '.join(told)}, not images [N, 3, S, S] alone")
    batch = shape[0] if isinstance(shape[0], int) else None
    side = sides.pop() if sides else SIDE
    return OnnxFeatures(path, session, inputs[0].name, TYPES[inputs[0].type], side, batch)


def about(features: OnnxFeatures) -> str:
    """What the features are, by the file's own hash: wherever it lies, they compare."""
    output = features.session.get_outputs()[0]
    first = "token 0 of " if len(output.shape or []) == 3 else ""
    return (
        f"ONNX {sha256(features.path)[:16]}, {first}{output.name}; input resized to "
        f"{features.side}x{features.side} (Pillow's bicubic), ImageNet's mean and spread"
    )


def onnx_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises on a file or an input that it cannot take."""
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return tuple(getattr(state, name) for name in (*names, "RuntimeException"))
