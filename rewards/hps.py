"""HPS v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341): the cosine in a fine-tuned ViT-H/14."""

from collections.abc import Mapping
from typing import Any

from rewards.open_clip_towers import known_config, load_state
from rewards.registry import Shelf
from rewards.states import read_state
from rewards.towers import Cosine

MODEL = "ViT-H-14"


def load(shelf: Shelf, config: Mapping[str, Any] | None = None) -> Cosine:
    """-> the reward, about 0.2 to 0.35. config: sections of another open_clip model."""
    path = shelf.path("hps")
    state = read_state(path, inside="state_dict")
    towers = load_state(
        state, config or known_config(MODEL), str(path), shelf.setup.device, shelf.setup.amp
    )
    return Cosine(towers)
