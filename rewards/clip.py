"""The rewards of the CLIP family: `clip`, `hps`, `pickscore` and `aesthetic`.

CLIP score: arXiv:2104.08718, without its factor 2.5. HPS v2 and v2.1: Wu et al. 2023,
arXiv:2306.09341. PickScore: Kirstain et al. 2023, arXiv:2305.01569. Aesthetic predictor v2: LAION.
B images, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.registry import Loader
from rewards.states import fill, read_state, renamed
from rewards.towers import (
    OPEN_CLIP,
    Cosine,
    Towers,
    clip_folder,
    known_config,
    open_clip_folder,
    open_clip_towers,
)

VIT_L, VIT_H = "ViT-L-14-quickgelu", "ViT-H-14"
UNUSED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Beside the weights in OpenAI's own files."""


def load_clip(loader: Loader) -> Cosine:
    """The reward `clip`: the cosine in ViT-L/14 of OpenAI, or any CLIP, about 0.15 to 0.35."""
    return Cosine(_shared(loader))


def load_hps(loader: Loader, config: Mapping[str, Any] | None = None) -> Cosine:
    """The reward `hps`, about 0.2 to 0.35. config: sections of another open_clip model.

    As CLIP does, it looks at the centre square; the package hpsv2 puts a picture that is not
    square between black bars.
    """
    path, setup = loader.path("hps"), loader.setup
    state, sections = read_state(path), config or known_config(VIT_H)
    return Cosine(open_clip_towers(state, sections, str(path), setup.device, setup.amp))


def load_pickscore(loader: Loader) -> Cosine:
    """The reward `pickscore`: exp(logit_scale) * cosine, about 15 to 26."""
    towers = clip_folder(loader.path("pickscore"), loader.setup.device, loader.setup.amp)
    return Cosine(towers, towers.logit_scale)


def load_aesthetic(loader: Loader) -> "Aesthetic":
    """The reward `aesthetic`, on the model that `clip` uses too."""
    path, towers = loader.path("aesthetic"), _shared(loader)
    state = read_state(path)
    head = fill(lambda: LinearStack(towers.width), state, str(path), loader.setup.device)
    return Aesthetic(towers, head)


def _shared(loader: Loader) -> Towers:
    """The one model of `clip` and `aesthetic`."""
    path, setup = loader.path("clip"), loader.setup
    return loader.get(("clip", path), lambda: load_towers(path, setup.device, setup.amp))


def load_towers(
    path: Path, device: torch.device, amp: bool, config: Mapping[str, Any] | None = None
) -> Towers:
    """The towers of an open_clip folder, a transformers folder, or a file of weights.

    A file may be OpenAI's own, which is TorchScript: its tensors are read, its code is not.
    config: sections of the open_clip model that a file is of; ViT-L/14 with OpenAI's activation.
    """
    if path.is_dir():
        of_folder = open_clip_folder if (path / OPEN_CLIP).is_file() else clip_folder
        return of_folder(path, device, amp)
    state = renamed(read_state(path), {}, UNUSED)
    return open_clip_towers(state, config or known_config(VIT_L), str(path), device, amp)


@dataclass(frozen=True)
class Aesthetic:
    """1 to 10, whatever the prompt: a Reward."""

    towers: Towers
    head: "LinearStack"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.towers.images(images)).to(images.device)


class LinearStack(nn.Module):
    """The head of ImageReward and the aesthetic predictor: linear layers, nothing between.

    [B, D] -> [B], under the names `layers.N` of the published files, which had dropout between.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        places = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = nn.Sequential(
            *(nn.Linear(*places[i]) if i in places else nn.Identity() for i in range(8))
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(-1)
