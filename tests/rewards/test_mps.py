"""`mps`: its stack against recorded numbers, its score against the formula, its pickled file."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as library
from torch import Tensor, nn

from rewards import mps
from rewards.base import score
from rewards.mps import CONDITION, MPS, PUBLISHED, Networks, Sizes, load_state
from rewards.mps_block import Stack
from rewards.registry import Setup, Shelf
from rewards.states import read_module
from rewards.transformers_towers import padded_tokenizer
from tests.rewards.test_pickscore import TEXT, VISION, by_processor
from tests.rewards.twins import PROMPTS, images, shaken

transformers: Any = library
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "mps_block.json").read_text())["cases"]
CASE = GOLDEN[0]
TINY = Sizes(
    {"text_config": TEXT, "vision_config": VISION, "projection_dim": 12},
    {"dim": 12, "layer_num": 2, "dim_head": 4, "heads": 3, "ff_mult": 4},
)


def stack_of(case: dict[str, Any]) -> Stack:
    keys = ("dim", "layer_num", "dim_head", "heads", "ff_mult")
    return Stack(**{key: case[key] for key in keys})


def by_rule(name: str, shape: torch.Size) -> Tensor:
    """The rule of the recorded cases."""
    k = torch.arange(shape.numel(), dtype=torch.float64)
    wave = (0.37 * k + zlib.crc32(name.encode()) % 1000).sin().reshape(shape)
    return wave * 0.2 if len(shape) > 1 else 1 + wave * 0.1


@pytest.mark.parametrize("case", GOLDEN)
def test_the_stack_gives_the_recorded_numbers(case: dict[str, Any]) -> None:
    stack = stack_of(case).double()
    state = {name: by_rule(name, v.shape) for name, v in stack.state_dict().items()}
    stack.load_state_dict(state)
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


@pytest.mark.parametrize("case", GOLDEN)
def test_the_stack_has_the_recorded_names(case: dict[str, Any]) -> None:
    ours = {name: list(v.shape) for name, v in stack_of(case).state_dict().items()}
    assert ours == dict(case["names"])


class Published(nn.Module):
    """A module of the published shape, with what it carries besides parameters."""

    def __init__(self, stranger: object) -> None:
        super().__init__()
        inner = Networks(TINY)
        inner.load_state_dict(shaken(inner))
        inner.model.logit_scale.data.fill_(2.0)
        inner.model.text_projection.weight.data[1:] *= 0.05  # some tokens have little in common
        self.model, self.cross_model = inner.model, inner.cross_model
        for layer in self.cross_model.layers:
            for block in (child.get_submodule("fn") for child in layer.children()):
                norm = block.get_submodule("norm")
                del norm._parameters["bias"]  # a buffer there, as in the published file
                norm.register_buffer("bias", torch.zeros(12))
                block.register_buffer("pos_emb", None)
        self.stranger = stranger


class Stranger:
    """Makes a folder when Python unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: Any) -> None:
        state["path"].mkdir()


def written(folder: Path) -> tuple[Path, Published]:
    path, module = folder / "MPS.pth", Published(Stranger(folder / "ran"))
    torch.save(module, path)
    return path, module


def test_the_module_is_read_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    path, module = written(tmp_path)
    state, expected = read_module(path), module.state_dict()
    assert not (tmp_path / "ran").exists()
    assert {name for name in state if not name.endswith("position_ids")} == set(expected)
    assert all(torch.equal(state[name], v) for name, v in expected.items())


@torch.no_grad()
def by_formula(networks: Any, pixels: Tensor, prompt: str) -> float:
    """The score of one image [1, 3, S, S]."""
    tokenise, clip = padded_tokenizer(77, 49408, ""), networks.model

    def read(text: str) -> tuple[Tensor, Tensor]:
        told = clip.text_model(tokenise([text]))
        return clip.text_projection(told[0])[0], clip.text_projection(told[1])[0]

    tokens, embedding = read(prompt)
    condition, _ = read(CONDITION)
    near = torch.stack([max(t @ c for c in condition) for t in tokens])
    mask = torch.tensor([0.0 if m / near.max() > 0.3 else -torch.inf for m in near])
    assert 0 < mask.isinf().sum() < 77
    v = clip.visual_projection(clip.vision_model(pixels)[0])
    x = networks.cross_model(v, tokens[None], mask[None])[0, 0]
    return float(clip.logit_scale.exp() * F.normalize(embedding, dim=0) @ F.normalize(x, dim=0))


def twin(folder: Path) -> MPS:
    path, _ = written(folder)
    return mps.load(Shelf(Setup(paths={"mps": path})), TINY)


def test_it_is_the_papers_formula(tmp_path: Path) -> None:
    reward, pixels = twin(tmp_path), by_processor(images())
    expected = [by_formula(reward.networks, pixels[i : i + 1], p) for i, p in enumerate(PROMPTS)]
    ours = score(reward, images(), PROMPTS)
    assert ours.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert ours.std() > 0.01


def test_a_batch_scores_as_its_images_one_by_one(tmp_path: Path) -> None:
    reward = twin(tmp_path)
    alone = [score(reward, images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    together = score(reward, images(), PROMPTS)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_half_precision_stays_near(tmp_path: Path) -> None:
    whole = score(twin(tmp_path), images(), PROMPTS)
    setup = Setup(amp=True, paths={"mps": tmp_path / "MPS.pth"})
    near = score(mps.load(Shelf(setup), TINY), images(), PROMPTS)
    assert 0 < (near - whole).abs().max() < 1  # of exp(2), about 7


def test_the_published_size_loads_strictly() -> None:
    meta = torch.device("meta")
    with meta:
        clip = transformers.CLIPModel(transformers.CLIPConfig(**PUBLISHED.clip)).state_dict()
    state = {f"model.{name}": v for name, v in clip.items()}
    for i in range(4):
        cross, own = (f"cross_model.layers.{i}.{j}.fn." for j in (0, 1))
        shapes = {
            **{cross + "norm.weight": (1024,), cross + "to_q.weight": (1024, 1024)},
            **{cross + "norm.bias": (1024,), cross + "to_kv.weight": (128, 1024)},
            **{cross + "to_out.weight": (1024, 1024), cross + "ff.0.weight": (8192, 1024)},
            **{cross + "ff.2.weight": (1024, 4096), own + "norm.weight": (1024,)},
            **{own + "norm.bias": (1024,), own + "rotary_emb.inv_freq": (32,)},
            **{own + "fused_attn_ff_proj.weight": (1024 + 128 + 8192, 1024)},
            **{own + "attn_out.weight": (1024, 1024), own + "ff_out.1.weight": (1024, 4096)},
        }
        state |= {name: torch.empty(shape, device=meta) for name, shape in shapes.items()}
    load_state(state, PUBLISHED, "full", meta)
    with pytest.raises(ValueError, match=r"full: .*1 missing \(model\.logit_scale\)"):
        load_state(
            {k: v for k, v in state.items() if k != "model.logit_scale"}, PUBLISHED, "full", meta
        )


def test_a_state_dict_in_place_of_the_module_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "MPS.pth"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"MPS\.pth: this is no pickled module, but a dict"):
        mps.load(Shelf(Setup(paths={"mps": path})), TINY)
