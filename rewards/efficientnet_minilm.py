"""Does the picture show what the prompt says? Without CLIP, and without any training of ours.

A ridge regression (Hoerl and Kennard 1970, Technometrics 12(1)) takes the features of
EfficientNet-lite0 to the sentence embeddings of all-MiniLM-L6-v2 (Wang et al. 2020,
arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084); both networks are as they were
published, and one matrix, fitted on emoji in closed form, is all that is ours. B images,
P prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.clip import TextCache, autocast, config_in, half_for, transformers
from rewards.efficientnet import SIZE, load_features
from rewards.registry import Setup
from rewards.state_dicts import fill, read_state, renamed

MATRIX = Path(__file__).parents[1] / "src/models/efficientnet-minilm/model.safetensors"
SCENES = MATRIX.with_name("scenes.safetensors")
"""The same, fitted on scenes too: one or two objects on any ground, under captions."""
WIDTH = 384
SIDE = 64
UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "position_ids")
LENGTH = 256  # tokens that are read


@dataclass(frozen=True)
class EmojiScore:
    """cos(features * matrix + bias, sentence), about 0.1 to 0.8: a Reward."""

    features: Callable[[Tensor], Tensor]  # [B, 3, H, W] in [0, 1] -> [B, 1280]
    matrix: nn.Linear
    texts: TextCache  # B prompts -> [B, 384] of length 1
    device: torch.device
    amp: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with autocast(self.device, self.amp):
            features = self.features(images).float()
        guess = F.normalize(self.matrix(features.to(self.device)), dim=-1)
        return (guess * self.texts(prompts)).sum(-1).to(images.device)


def load(setup: Setup, path: Path = MATRIX) -> EmojiScore:
    """The reward `efficientnet-minilm`, with a file's matrix; ValueError for other weights."""
    device, amp = setup.device, setup.amp
    features = load_features(device, side=SIDE, path=setup.path("efficientnet"))
    matrix = fill(lambda: nn.Linear(SIZE, WIDTH), read_state(path), str(path), device)
    texts = TextCache(load_minilm(setup.path("minilm"), device, amp))
    return EmojiScore(features, matrix, texts, device, amp)


def load_scenes(setup: Setup) -> EmojiScore:
    """The reward `efficientnet-minilm-scenes`."""
    return load(setup, SCENES)


def load_minilm(
    folder: Path, device: torch.device, amp: bool = False
) -> Callable[[Sequence[str]], Tensor]:
    """P prompts -> embeddings [P, 384] of length 1: the mean over a sentence's tokens.

    ValueError, in one line, for a folder of another model.
    """
    config = config_in(folder, "bert", transformers.BertConfig.from_dict)
    path, half = folder / "model.safetensors", half_for(device, amp)

    def build() -> Any:
        return transformers.BertModel(config, add_pooling_layer=False)

    network = fill(build, renamed(read_state(path), {}, UNUSED), str(path), device, half)
    own = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"padding": True, "truncation": True, "max_length": LENGTH}

    @torch.no_grad()
    def read(prompts: Sequence[str]) -> Tensor:
        tokens = own(list(prompts), return_tensors="pt", **options).to(device)
        with autocast(device, amp):
            last = network(**tokens).last_hidden_state.float()
        present = tokens["attention_mask"][..., None]
        return F.normalize((last * present).sum(1) / present.sum(1), dim=-1)

    return read
