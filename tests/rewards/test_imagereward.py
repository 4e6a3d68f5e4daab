"""`imagereward` on a twin of the published layout; its numbers stand in test_parity.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import imagereward
from rewards.imagereward import BlipSizes, ImageReward
from rewards.registry import Loader, Setup
from tests.rewards.twins import BLIP, WORDS, imagereward_state


def load(folder: Path, state: dict[str, Tensor], sizes: BlipSizes = BLIP) -> ImageReward:
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    paths = {"imagereward": folder / "ImageReward.pt", "bert": folder}
    return imagereward.load(Loader(Setup(paths=paths)), sizes)


def test_prompts_are_filled_and_cut_to_a_length(tmp_path: Path) -> None:
    tokens = load(tmp_path, imagereward_state()).tokens(["A red fox", "cats " * 30])
    assert tokens[0].tolist() == [[2, 5, 6, 7, 3, 0, 0, 0, 0], [1] * 5 + [0] * 4]
    assert tokens[1, 0].tolist() == [2, *[9] * 7, 3]


def test_what_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither vocab\.txt nor tokenizer\.json"):
        imagereward.tokenizer(tmp_path, BLIP)
    with pytest.raises(ValueError, match=r"ImageReward\.pt: .*1 not known \(blip\.more\)"):
        load(tmp_path, {**imagereward_state(), "blip.more": torch.zeros(2)})
    few = replace(BLIP, vocabulary=6)
    with pytest.raises(ValueError, match="12 tokens, more than the 6 known"):
        load(tmp_path, imagereward_state(few), few)
