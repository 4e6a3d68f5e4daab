"""How far students are from their teacher: sample by sample, and as sets of samples.

Shapes: B samples, * one sample, x [B, *], D numbers that are looked at of a sample. All are
differentiable in the student, and treat the teacher as constant. Features are of images, so a
network of features is given what decodes a state.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.torchscript import load_script
from training.student import Distance, squared

Network = Callable[[Tensor], Tensor]
NAMES = ("l2", "huber", "inception", "features")
"""What a gradient makes small."""
FIT_NAMES = ("l2", "features", "inception", "distribution", "energy", "frechet", "reward")
"""What a fit makes small, and any weighted sum of them."""
OF_FEATURES = {"features", "inception", "distribution", "energy", "frechet"}
OF_SETS = ("distribution", "energy", "frechet")
TERM = re.compile(r"(?:(-?\d+\.?\d*(?:[eE]-?\d+)?|\.\d+) ?\* ?)?([a-z0-9]+)")
HUBER = 0.00054
"""c / sqrt(numbers of a sample) of the pseudo-Huber distance (Song & Dhariwal, below)."""


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


def load_network(path: str | Path, device: torch.device) -> Callable[..., Tensor]:
    """A network of features from a TorchScript file, frozen and on its device.

    Raises ValueError naming a file that is missing, is no TorchScript, or asks for files.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no feature network at {path}: give a TorchScript file, --features FILE")
    network = load_script(path, device)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


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
        case "inception" | "features" if network is not None:
            return FeatureDistance(network, alpha, as_published)
        case "inception" | "features":
            raise ValueError(f"the distance {name!r} needs its network: give --features FILE")
        case _:
            raise ValueError(f"unknown distance {name!r}: choose from {', '.join(NAMES)}")


# --- of sets ------------------------------------------------------------------------------


def parse_terms(text: str) -> tuple[tuple[float, str], ...]:
    """A sum of distances as its weights and names: "l2+0.1*distribution".

    Raises ValueError for an unknown name, and for a weight that is not above 0.
    """
    terms = []
    for part in text.split("+"):
        match = TERM.fullmatch(part.strip())
        if match is None or match[2] not in FIT_NAMES:
            names = ", ".join(FIT_NAMES)
            raise ValueError(f"unknown distance {part.strip()!r}: choose from {names}, or a sum")
        weight = float(match[1] or 1)
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight {weight} of {match[2]} is out of range: above 0")
        terms.append((weight, match[2]))
    return tuple(terms)


def energy(y: Tensor, t: Tensor) -> Tensor:
    """The energy distance 2 E|y - t| - E|y - y'| - E|t - t'| of two sets [n, D] (Szekely 2013)."""
    exact = "donot_use_mm_for_euclid_dist"
    own, others, across = (
        torch.cdist(a, b, compute_mode=exact).mean() for a, b in ((y, y), (t, t), (y, t))
    )
    return 2 * across - own - others


def frechet(y: Tensor, t: Tensor) -> Tensor:
    """The Frechet distance of the Gaussians that have the moments of two sets [n, D]."""
    y, t = y.double(), t.double()
    a, b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (y, t))
    values, vectors = torch.linalg.eigh(b)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ a @ root).clamp(min=1e-12).sqrt().sum()
    return (y.mean(0) - t.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
