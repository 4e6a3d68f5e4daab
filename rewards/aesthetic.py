"""LAION's aesthetic predictor v2: linear layers on the image embedding of CLIP ViT-L/14."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.clip import shared
from rewards.heads import LinearStack
from rewards.registry import Shelf
from rewards.states import fill, read_state
from rewards.towers import Towers


@dataclass(frozen=True)
class Aesthetic:
    """1 to 10, whatever the prompt: a Reward."""

    towers: Towers
    head: LinearStack

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As Reward."""
        return self.head(self.towers.images(images)).to(images.device)


def load(shelf: Shelf) -> Aesthetic:
    """-> the reward, on the model that `clip` uses too."""
    path = shelf.path("aesthetic")
    towers = shared(shelf)
    head = fill(lambda: LinearStack(towers.width), read_state(path), str(path), shelf.setup.device)
    return Aesthetic(towers, head)
