"""Ours beside what the packages that we follow say of the same models and pictures.

Their numbers stand in tests/data/parity.json; references.py says how they were asked.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features import load_space
from eval.fid import frechet_distance, kernel_distance, statistics_of
from rewards import clip, imagereward, mps
from rewards.base import Reward, score
from rewards.clip import clip_model, config_named, open_clip_towers
from rewards.mps import Stack
from rewards.registry import Setup
from rewards.state_dicts import fill
from src.files import read_json, write_json
from src.images import read_png, save_png
from tests.eval.test_features import drawn
from tests.rewards.networks import (
    BLIP,
    BLIP_TEXT,
    BLIP_VISION,
    MPS_SIZES,
    MPS_STACK,
    OPEN_CLIP,
    PROMPTS,
    TEXT,
    VISION,
    WORDS,
    PublishedMPS,
    by_rule,
    head_state,
    imagereward_state,
    images,
    open_clip_state,
    transformers,
    write_clip_folder,
)

DATA = Path(__file__).parents[1] / "data" / "parity.json"
GOLDEN: dict[str, Any] = read_json(DATA)
META = torch.device("meta")
SAME = 1e-4  # relative, in float32
EXACT = 1e-6  # in float64
BARS = 0.05  # hpsv2 resizes floats, not bytes, with whatever its torchvision holds to be right
OPENAI: dict[str, Any] = {
    "embed_dim": 768,  # the aesthetic package knows no other
    "quick_gelu": True,
    # OpenAI's code reads the sizes off the tensors: heads of 64 channels
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
STACKS: tuple[dict[str, int], ...] = (
    {"dim": 16, "layer_num": 2, "dim_head": 8, "heads": 2, "ff_mult": 2},
    {"dim": 24, "layer_num": 3, "dim_head": 6, "heads": 4, "ff_mult": 4},
)
MASKED = [5, 6]  # of 7 text tokens; 5 image tokens ask
Numbers = list[float]


# --- what is asked about ----------------------------------------------------------------------


def shown() -> list[Tensor]:
    """Four of 32 pixels, as the models take them, four larger squares, and four that are none."""
    coarse = images(8, 6, 5, seed=4)
    parts = [F.interpolate(coarse[:4], (48, 48), mode="bicubic")]
    parts += [F.interpolate(coarse[4:], (40, 36), mode="bicubic")]
    return [*images(4, 32, 32, seed=3), *(image.clamp(0, 1) for part in parts for image in part)]


def waves(case: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Image tokens [2, 5, D] and text tokens [2, 7, D]."""
    k, n = torch.arange(2 * 5 * case["dim"]).double(), torch.arange(2 * 7 * case["dim"]).double()
    return (0.13 * k).sin().reshape(2, 5, -1), (0.07 * n).cos().reshape(2, 7, -1)


def stack(case: Mapping[str, int]) -> Stack:
    """Of these sizes, in float64, with tensors by the rule."""
    network = Stack(**case).double()
    state = network.state_dict()
    network.load_state_dict({name: by_rule(name, v.shape) for name, v in state.items()})
    return network


def features() -> tuple[Tensor, Tensor]:
    """Two sets of features [200, 24] in float64."""
    g = np.random.default_rng(0)
    a = g.normal(size=(200, 24)) @ g.normal(size=(24, 24))
    b = g.normal(size=(200, 24)) @ g.normal(size=(24, 24)) + 0.2
    return torch.from_numpy(a), torch.from_numpy(b)


def write(folder: Path) -> None:
    """Write all that references.py asks about, in the layouts of the published files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(shown()):
        save_png(folder / f"{i}.png", picture)
    write_json(folder / "prompts.json", PROMPTS * 3)
    torch.save({"epoch": 1, "state_dict": open_clip_state()}, folder / "hps.pt")
    write_json(folder / "ViT-H-14.json", OPEN_CLIP)
    half = {k: v.half().float() for k, v in open_clip_state(OPENAI).items()}
    torch.save(half, folder / "clip.pt")  # whole in float16, to which OpenAI's code rounds
    torch.save(head_state(OPENAI["embed_dim"]), folder / "aesthetic.pth")
    torch.save(imagereward_state(), folder / "imagereward.pt")
    write_json(folder / "imagereward.json", {"vision": BLIP_VISION, "text": BLIP_TEXT})
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.save(write_clip_folder(folder / "pickscore").state_dict(), folder / "pickscore.pt")
    write_json(folder / "clip_model.json", {"text_config": TEXT, "vision_config": VISION})
    module = PublishedMPS(None)
    torch.save(module, folder / "mps.pth")
    torch.save(module.state_dict(), folder / "mps.pt")
    write_json(folder / "mps.json", {**MPS_STACK, "condition": mps.CONDITION})
    rows = [{"case": c, "waves": waves(c), "state": stack(c).state_dict()} for c in STACKS]
    torch.save([{**row, "masked": MASKED} for row in rows], folder / "stacks.pt")
    torch.save(drawn(), folder / "inception.pth")


# --- what we say ------------------------------------------------------------------------------


def scores(reward: Reward, folder: Path) -> Numbers:
    """Of all pictures, in batches of one size."""
    seen = [read_png(folder / f"{i}.png")[0] for i in range(12)]
    prompts = json.loads((folder / "prompts.json").read_text())
    parts = [score(reward, torch.stack(seen[i : i + 4]), prompts[i : i + 4]) for i in (0, 4, 8)]
    return torch.cat(parts).tolist()


def setup_for(folder: Path, **files: str) -> Setup:
    return Setup(paths={name: folder / file for name, file in files.items()})


def with_clip(folder: Path) -> Setup:
    """With the twin of OpenAI's model."""
    setup = setup_for(folder, clip="clip.pt", aesthetic="aesthetic.pth")
    path = folder / "clip.pt"
    setup.models[path] = clip.load_towers(path, setup.device, False, OPENAI)
    return setup


def ask_stacks(_: Path) -> Numbers:
    """The first image token of each stack."""
    mask = torch.zeros(2, 7, dtype=torch.float64)
    mask[:, MASKED] = float("-inf")
    rows = [stack(case)(*waves(case), mask)[:, 0].flatten() for case in STACKS]
    return torch.cat(rows).tolist()


def ask_inception(folder: Path) -> Numbers:
    """Every 128th feature of a picture that it resizes, and of one of its own size."""
    network = load_space("inception", torch.device("cpu"), folder / "inception.pth")
    seen = images(1, 32, 32), images(1, 299, 299)
    return torch.cat([network(image)[0, ::128] for image in seen]).tolist()


def ask_frechet(_: Path) -> Numbers:
    a, b = (statistics_of(t) for t in features())
    return [frechet_distance(a.mean, a.covariance, b.mean, b.covariance)]


OURS: dict[str, Callable[[Path], Numbers]] = {
    "hps": lambda f: scores(clip.load_hps(setup_for(f, hps="hps.pt"), OPEN_CLIP), f),
    "clip": lambda f: scores(clip.load_clip(with_clip(f)), f),
    "aesthetic": lambda f: scores(clip.load_aesthetic(with_clip(f)), f),
    "imagereward": lambda f: scores(
        imagereward.load(setup_for(f, imagereward="imagereward.pt", bert="vocab.txt"), BLIP), f
    ),
    "pickscore": lambda f: scores(clip.load_pickscore(setup_for(f, pickscore="pickscore")), f),
    "mps": lambda f: scores(mps.load(setup_for(f, mps="mps.pth"), MPS_SIZES), f),
    "mps_stack": ask_stacks,
    "inception": ask_inception,
    "frechet": ask_frechet,
    "kernel": lambda _: [kernel_distance(*features()).value],
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Numbers]:
    files = tmp_path_factory.mktemp("parity")
    write(files)
    return cache(lambda name: OURS[name](files))


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("names.")])
def test_our_numbers_are_the_references(name: str, ours: Callable[[str], Numbers]) -> None:
    """Where a reference gives fewer, they are our first (hpsv2), or our last (pytorch-fid)."""
    theirs, mine = GOLDEN[name]["numbers"], ours(name.partition(".")[0])
    mine = mine[-len(theirs) :] if name.startswith("inception") else mine[: len(theirs)]
    limit = EXACT if name.startswith(("frechet", "kernel", "mps_stack")) else SAME
    limits = [limit] * 4 + [BARS if name == "hps" else limit] * len(theirs)
    for a, b, most in zip(mine, theirs, limits, strict=False):
        assert abs(a - b) <= most * max(abs(b), 0.01)
    assert len(theirs) == 1 or max(theirs) - min(theirs) > 0.01


# --- names and shapes of the published sizes --------------------------------------------------

State = dict[str, Tensor]
LOADERS: dict[str, Callable[[State], object]] = {
    "hps": lambda s: open_clip_towers(s, config_named(clip.VIT_H), "full", META),
    "clip": lambda s: open_clip_towers(s, config_named(clip.VIT_L), "full", META),
    "aesthetic": lambda s: fill(lambda: clip.LinearStack(768), s, "full", META),
    "imagereward": lambda s: imagereward.load_state(s, imagereward.PUBLISHED, "full", META),
    "pickscore": lambda s: clip_model(s, transformers.CLIPConfig(**mps.CLIP_H), "full", META),
    "mps": lambda s: mps.load_state(s, mps.PUBLISHED, "full", META),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_references_own_state_dict_loads_strictly_at_full_size(name: str) -> None:
    """Recorded as {name: [layers, shape]}, with {} where the layer's number goes."""
    state = {
        key.replace("{}", str(n)): torch.empty(shape, device=META)
        for key, (count, shape) in GOLDEN[f"names.{name}"]["names"].items()
        for n in range(count)
    }
    LOADERS[name](state)
    weight = max(state, key=lambda key: state[key].numel())
    for other, words in (
        ({k: v for k, v in state.items() if k != weight}, "Missing key"),
        ({**state, "more": torch.empty(1, device=META)}, 'Unexpected key.* "more"'),
        ({**state, weight: torch.empty(7, device=META)}, r"size mismatch.*torch.Size\(\[7\]\)"),
    ):
        with pytest.raises(ValueError, match=f"^full: these are other weights: {words}"):
            LOADERS[name](other)
