"""`mps`: its stack against recorded numbers, its pickled file, its mask."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import mps
from rewards.mps import Stack
from rewards.state_dicts import read_state
from tests.rewards.networks import PublishedMPS, by_rule

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "mps_block.json").read_text())["cases"]


@pytest.mark.parametrize("case", GOLDEN)
def test_the_stack_gives_the_recorded_numbers_under_the_recorded_names(
    case: dict[str, Any],
) -> None:
    stack = Stack(**{k: case[k] for k in ("dim", "layer_num", "dim_head", "heads", "ff_mult")})
    state = {name: by_rule(name, v.shape) for name, v in stack.state_dict().items()}
    assert {name: list(v.shape) for name, v in state.items()} == dict(case["names"])
    stack.double().load_state_dict(state)
    sizes = [2 * case[key] * case["dim"] for key in ("queries", "context")]
    queries, context = (torch.arange(n, dtype=torch.float64) for n in sizes)
    mask = torch.zeros(2, case["context"])
    mask[:, case["masked_context"]] = float("-inf")
    x = stack(
        (0.13 * queries).sin().reshape(2, -1, case["dim"]),
        (0.07 * context).cos().reshape(2, -1, case["dim"]),
        mask,
    )
    assert x[:, 0].flatten().tolist() == pytest.approx(case["output_row0"], rel=1e-6)


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
