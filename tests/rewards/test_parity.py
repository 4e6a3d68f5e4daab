"""Ours beside what the reference packages said of the same models and pictures: `make parity`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as library
from torch import Tensor

from rewards import imagereward, mps, open_clip_towers, transformers_towers
from rewards.clip import MODEL as VIT_L
from rewards.heads import LinearStack
from rewards.hps import MODEL as VIT_H
from rewards.states import fill
from src.files import read_json
from tests.parity.cases import OURS, STACKS, Numbers, write
from tests.parity.golden import DATA, furthest, limits, shapes
from tests.parity.theirs import NAMES, NUMBERS

transformers: Any = library
GOLDEN: dict[str, Any] = read_json(DATA)
META = torch.device("meta")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Numbers]:
    files = tmp_path_factory.mktemp("parity")
    write(files)
    return cache(lambda name: OURS[name](files))


def test_every_reference_is_recorded() -> None:
    assert set(GOLDEN) == {*NUMBERS, *(f"names.{name}" for name in NAMES)}


@pytest.mark.parametrize("name", NUMBERS)
def test_our_numbers_are_the_references(name: str, ours: Callable[[str], Numbers]) -> None:
    theirs = GOLDEN[name]["numbers"]
    assert furthest(ours(name.partition(".")[0]), theirs, limits(name)) <= 1
    assert len(theirs) == 1 or max(theirs) - min(theirs) > 0.01


def test_the_stack_of_mps_is_cocas_where_it_was_recorded_before() -> None:
    (case,) = read_json(DATA.parent / "mps_block.json")["cases"]
    assert STACKS[0] == {name: case[name] for name in STACKS[0]}
    before = case["output_row0"]
    assert GOLDEN["mps_stack"]["numbers"][: len(before)] == pytest.approx(before, rel=1e-6)


def load_clip(state: State, model: str) -> object:
    config = open_clip_towers.known_config(model)
    return open_clip_towers.load_state(state, config, "full", META, False)


def load_pickscore(state: State) -> object:
    config = transformers.CLIPConfig(**mps.CLIP_H)
    return transformers_towers.load_state(state, config, "full", META)


LOADERS: dict[str, Callable[[State], object]] = {
    "hps": lambda state: load_clip(state, VIT_H),
    "clip": lambda state: load_clip(state, VIT_L),
    "aesthetic": lambda state: fill(lambda: LinearStack(768), state, "full", META),
    "imagereward": lambda s: imagereward.load_state(s, imagereward.Sizes(), "full", META),
    "pickscore": load_pickscore,
    "mps": lambda state: mps.load_state(state, mps.PUBLISHED, "full", META),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_references_own_state_dict_loads_strictly_at_full_size(name: str) -> None:
    names = shapes(GOLDEN[f"names.{name}"]["names"])
    state = {name: torch.empty(shape, device=META) for name, shape in names.items()}
    LOADERS[name](state)
    weight = max(state.keys() - {"fc.weight"}, key=lambda name: state[name].numel())
    less = {name: value for name, value in state.items() if name != weight}
    with pytest.raises(ValueError, match=r"^full: these are other weights: 1 missing \("):
        LOADERS[name](less)
    with pytest.raises(ValueError, match=r"1 not known \(more\)"):
        LOADERS[name]({**state, "more": torch.empty(1, device=META)})
    with pytest.raises(ValueError, match=r"1 of another shape \(.* \[7\], not \["):
        LOADERS[name]({**state, weight: torch.empty(7, device=META)})
