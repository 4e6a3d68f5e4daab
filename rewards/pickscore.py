"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): the logit of a fine-tuned CLIP ViT-H/14."""

from rewards.registry import Shelf
from rewards.towers import Cosine
from rewards.transformers_towers import load_clip_folder


def load(shelf: Shelf) -> Cosine:
    """-> the reward exp(logit_scale) * cosine, about 15 to 26."""
    towers = load_clip_folder(shelf.path("pickscore"), shelf.setup.device, shelf.setup.amp)
    return Cosine(towers, towers.logit_scale)
