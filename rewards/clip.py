"""CLIP score (arXiv:2104.08718, without its factor 2.5): the cosine in ViT-L/14 of OpenAI.

Any other model of open_clip or transformers serves as well, from its folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewards.open_clip_towers import CONFIG, known_config, load_folder, load_state
from rewards.registry import Shelf
from rewards.states import read_state
from rewards.towers import Cosine, Towers
from rewards.transformers_towers import load_clip_folder

MODEL = "ViT-L-14-quickgelu"


def load(shelf: Shelf) -> Cosine:
    """-> the reward, a cosine."""
    return Cosine(shared(shelf))


def shared(shelf: Shelf) -> Towers:
    """-> the one model of `clip` and `aesthetic`."""
    path, setup = shelf.path("clip"), shelf.setup
    return shelf.get(("clip", path), lambda: load_towers(path, setup.device, setup.amp))


def load_towers(
    path: Path, device: torch.device, amp: bool, config: Mapping[str, Any] | None = None
) -> Towers:
    """-> the towers of an open_clip folder, a transformers folder, or a file of weights.

    config: sections of the open_clip model that a file is of; ViT-L/14 with OpenAI's activation.
    """
    if (path / CONFIG).is_file():
        return load_folder(path, device, amp)
    if path.is_dir():
        return load_clip_folder(path, device, amp)
    state = read_state(path, inside="state_dict")
    return load_state(state, config or known_config(MODEL), str(path), device, amp)
