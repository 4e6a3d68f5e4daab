"""`imagereward` on a twin of the published layout; its numbers stand in test_parity.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import imagereward
from rewards.base import has_gradient, score
from rewards.imagereward import BlipSizes, ImageReward
from rewards.registry import Loader, Setup
from tests.rewards.twins import BLIP, PROMPTS, WORDS, imagereward_state, images


def load(
    folder: Path, state: dict[str, Tensor], sizes: BlipSizes = BLIP, *, amp: bool = False
) -> ImageReward:
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    paths = {"imagereward": folder / "ImageReward.pt", "bert": folder}
    return imagereward.load(Loader(Setup(amp=amp, paths=paths)), sizes)


def test_a_batch_scores_as_its_images_one_by_one_and_half_precision_stays_near(
    tmp_path: Path,
) -> None:
    reward, given = load(tmp_path, imagereward_state()), images(4, 50, 33)
    together = score(reward, given, PROMPTS)
    alone = [score(reward, given[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    halved = load(tmp_path, imagereward_state(), amp=True)
    kinds = {name: p.dtype for name, p in halved.networks.named_parameters()}
    assert kinds["vision.encoder.layers.0.mlp.fc1.weight"] == torch.bfloat16
    assert kinds["head.layers.0.weight"] == torch.float32
    assert 0 < (score(halved, given, PROMPTS) - together).abs().max() < 0.1
    assert has_gradient(reward)


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
