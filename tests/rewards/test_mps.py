"""`mps` and `imagereward` beyond parity: files that must not run, tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import imagereward, mps
from rewards.states import read_state
from tests.rewards.twins import BLIP, WORDS, PublishedMPS, imagereward_state


class Stranger:
    """Makes a folder when Python unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: Any) -> None:
        state["path"].mkdir()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A whole pickled module, as published."""
    torch.save(PublishedMPS(Stranger(tmp_path / "ran")), tmp_path / "MPS.pth")
    return tmp_path / "MPS.pth"


def test_the_module_is_read_and_nothing_of_it_is_run(file: Path) -> None:
    state, expected = read_state(file), PublishedMPS(None).state_dict()
    assert not (file.parent / "ran").exists()
    assert {name for name in state if not name.endswith("position_ids")} == set(expected)
    assert all(torch.equal(state[name], v) for name, v in expected.items())


def test_text_that_has_nothing_to_do_with_the_condition_is_not_looked_at() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.2, 0.0], [0.0, 1.0], [0.31, 0.0]]])
    condition = torch.tensor([[1.0, 0.0], [0.0, 0.29]])
    assert mps.relevant(tokens, condition).isinf().tolist() == [[False, True, True, False]]


def test_prompts_of_imagereward_are_filled_and_cut_and_wrong_files_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither vocab\.txt nor tokenizer\.json"):
        imagereward.tokenizer(tmp_path, 20, 9)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokens = imagereward.tokenizer(tmp_path, 20, 9)(["A red fox", "cats " * 30])
    assert tokens[0].tolist() == [[2, 5, 6, 7, 3, 0, 0, 0, 0], [1] * 5 + [0] * 4]
    assert tokens[1, 0].tolist() == [2, *[9] * 7, 3]
    with pytest.raises(ValueError, match="12 tokens, more than the 6 of the network"):
        imagereward.tokenizer(tmp_path, 6, 9)
    more = {**imagereward_state(), "blip.more": torch.zeros(2)}
    with pytest.raises(ValueError, match=r'^file: .*Unexpected key.*"blip\.more"'):
        imagereward.load_state(more, BLIP, "file", torch.device("cpu"))
