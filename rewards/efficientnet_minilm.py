"""Does the picture show what the prompt says? Without CLIP, and without any training of ours.

A ridge regression (Hoerl and Kennard 1970, Technometrics 12(1)) takes the features of
EfficientNet-lite0 to the sentence embeddings of MiniLM; both networks are as they were
published, and one matrix, fitted on emoji in closed form, is all that is ours. B images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.efficientnet import SIZE, Features, load_features
from rewards.minilm import load_minilm
from rewards.registry import Shelf
from rewards.states import fill, read_state
from rewards.towers import TextCache, half

MATRIX = Path(__file__).parents[1] / "src/models/efficientnet-minilm/model.safetensors"
WIDTH = 384
SIDE = 64


@dataclass(frozen=True)
class Judge:
    """cos(features * matrix + bias, sentence), about 0.1 to 0.8: a Reward."""

    features: Callable[[Tensor], Tensor]  # [B, 3, H, W] in [0, 1] -> [B, 1280]
    matrix: nn.Linear
    texts: TextCache  # B prompts -> [B, 384] of length 1
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As Reward."""
        seen = F.normalize(self.matrix(self.features(images).to(self.device)), dim=-1)
        return (seen * self.texts(prompts)).sum(-1).to(images.device)


@dataclass(frozen=True)
class Halved:
    """Features in half precision where asked for."""

    features: Features
    amp: bool

    def __call__(self, images: Tensor) -> Tensor:
        """As Features."""
        with half(self.features.device, self.amp):
            return self.features(images).float()


def load(shelf: Shelf) -> Judge:
    """-> the reward."""
    setup = shelf.setup
    features = load_features(setup.device, side=SIDE, path=shelf.path("efficientnet"))
    matrix = fill(lambda: nn.Linear(SIZE, WIDTH), read_state(MATRIX), str(MATRIX), setup.device)
    texts = TextCache(load_minilm(shelf.path("minilm"), setup.device, setup.amp))
    return Judge(Halved(features, setup.amp), matrix, texts, setup.device)
