"""How far a student's state is from its teacher's: one number per sample.

Shapes: B samples, * one sample, x [B, *] -> [B]. All are differentiable in the student, and
treat the teacher as constant. Features are of images, so a network of features is given what
decodes a state (`compose`).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distill import Distance, squared

Network = Callable[[Tensor], Tensor]
NAMES = ("l2", "huber", "inception", "features", "lpips-like")
HUBER = 0.00054
"""c / sqrt(numbers of a sample) of the pseudo-Huber distance (Song & Dhariwal, below)."""
WIDTHS = (16, 32, 64)
TINY = 1e-10


def huber(student: Tensor, teacher: Tensor) -> Tensor:
    """Pseudo-Huber, sqrt(|x - y|^2 + c^2) - c, c = 0.00054 sqrt(numbers of a sample).

    Song & Dhariwal 2024, arXiv:2310.14189, Sec. 3.3.
    """
    c = HUBER * math.sqrt(student[0].numel())
    return (squared(student, teacher) + c**2).sqrt() - c


@dataclass(frozen=True)
class FeatureDistance:
    """alpha |phi(student) - phi(teacher)|^2 for a network of features phi: x [B, *] -> [B, F].

    Summed over features (EPD-Solver, arXiv:2507.14797, Sec. 3.3). `as_published` is what the
    published code computes instead: the mean over features, broadcast to the numbers of a
    sample before they are summed, so it weighs numel(sample) / F times the formula.
    """

    network: Network
    alpha: float = 1.0
    as_published: bool = False

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network(teacher).flatten(1)
        difference = (self.network(student).flatten(1) - wanted).square()
        if self.as_published:
            return self.alpha * student[0].numel() * difference.mean(1)
        return self.alpha * difference.sum(1)


@dataclass(frozen=True)
class LayerDistance:
    """Differences of unit-length features at several layers, averaged over places and layers.

    The form of LPIPS (Zhang et al. 2018, arXiv:1801.03924, Eq. 1) with all channel weights 1,
    on the layers of `network`: x [B, *] -> features [B, C, *] each. It is not the metric LPIPS,
    which needs its trained networks: with `random_layers` it compares local texture and edges.
    """

    network: Callable[[Tensor], Sequence[Tensor]]

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = [unit(layer) for layer in self.network(teacher)]
        found = [unit(layer) for layer in self.network(student)]
        pairs = zip(found, wanted, strict=True)
        layers = [(a - b).square().sum(1).flatten(1).mean(1) for a, b in pairs]
        return torch.stack(layers).mean(0)


def unit(features: Tensor) -> Tensor:
    """Features [B, C, *] of length 1 over C."""
    return features * (features.square().sum(1, keepdim=True) + TINY).rsqrt()


def random_layers(x: Tensor, *, seed: int = 0) -> list[Tensor]:
    """Three layers of a fixed random convolutional network: x [B, *] -> [B, C, *] each.

    A latent of d dimensions besides its channels is convolved over all of them (d = 1 to 3;
    vectors count as one channel of places), 3 wide, stride 2 after the first, leaky ReLU.
    """
    if x.ndim == 2:
        x = x.unsqueeze(1)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}.get(x.ndim)
    if convolve is None:
        raise ValueError(f"lpips-like is for samples of 1 to 4 dimensions, not {x.ndim - 1}")
    layers = []
    for i, kernel in enumerate(random_kernels(x.shape[1], x.ndim - 2, seed)):
        x = F.leaky_relu(convolve(x, kernel.to(x), stride=1 if i == 0 else 2, padding=1), 0.2)
        layers.append(x)
    return layers


@lru_cache(maxsize=8)
def random_kernels(channels: int, dimensions: int, seed: int) -> tuple[Tensor, ...]:
    """Orthogonal-like Gaussian kernels [C_out, C_in, 3...] by a generator of their own."""
    generator, kernels = torch.Generator().manual_seed(seed), []
    for width in WIDTHS:
        shape = (width, channels, *[3] * dimensions)
        fan_in = math.prod(shape[1:])
        kernels.append(torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in))
        channels = width
    return tuple(kernels)


def load_network(path: str | Path, device: torch.device) -> Network:
    """A network of features from a TorchScript file, frozen and on its device.

    Raises ValueError naming a file that is missing or is no TorchScript.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no feature network at {path}: give a TorchScript file, --features FILE")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is what such networks are published as
        try:
            network = torch.jit.load(path, map_location=device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no TorchScript file") from error
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def compose(decode: Network, network: Network) -> Network:
    """Features of what a state decodes to."""
    return partial(decoded_features, decode, network)


def decoded_features(decode: Network, network: Network, x: Tensor) -> Tensor:
    """network(decode(x))."""
    return network(decode(x))


def distance_named(
    name: str, network: Network | None = None, *, alpha: float = 1.0, as_published: bool = False
) -> Distance:
    """A distance by name; "inception" and "features" are of `network`.

    Raises ValueError for an unknown name, and for features without a network.
    """
    match name:
        case "l2":
            return squared
        case "huber":
            return huber
        case "lpips-like":
            return LayerDistance(random_layers)
        case "inception" | "features" if network is not None:
            return FeatureDistance(network, alpha, as_published)
        case "inception" | "features":
            raise ValueError(f"the distance {name!r} needs its network: give --features FILE")
        case _:
            raise ValueError(f"unknown distance {name!r}: choose from {', '.join(NAMES)}")
