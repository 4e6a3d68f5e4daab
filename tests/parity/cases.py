"""What the references and we are asked about: small random models and pictures, on disk.

`write` makes the files, `ours` reads them by the code that everybody uses. Nothing here needs
the references.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features import load_space
from eval.fid import frechet_distance, kernel_distance, statistics_of
from rewards import aesthetic, clip, hps, imagereward, mps, pickscore
from rewards.base import Reward, score
from rewards.mps_block import Stack
from rewards.registry import Setup, Shelf
from rewards.towers import Cosine
from src.files import write_json
from src.images import read_png, save_png, to_bytes
from tests.eval.test_features import drawn
from tests.rewards.test_imagereward import TINY, WORDS, published_state
from tests.rewards.test_mps import TINY as TINY_MPS
from tests.rewards.test_mps import Published, by_rule
from tests.rewards.test_pickscore import TEXT, VISION, twin
from tests.rewards.twins import OPEN_CLIP, PROMPTS, head_state, images, open_clip_state

Numbers = list[float]

OPENAI: dict[str, Any] = {
    "embed_dim": 768,  # the aesthetic package knows no other
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "head_width": 64,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 2,
    },
}
"""OpenAI's code reads the sizes off the tensors: heads of 64 channels."""
IMAGEREWARD = replace(TINY, tokens=35)
BERT: dict[str, Any] = {
    "hidden_size": TINY.text_width,
    "intermediate_size": 4 * TINY.text_width,
    "num_hidden_layers": TINY.text_layers,
    "num_attention_heads": TINY.text_heads,
    "vocab_size": TINY.vocabulary,
    "max_position_embeddings": TINY.positions,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "add_cross_attention": True,
}
STACKS: tuple[dict[str, int], ...] = (
    {"dim": 16, "layer_num": 2, "dim_head": 8, "heads": 2, "ff_mult": 2},
    {"dim": 24, "layer_num": 3, "dim_head": 6, "heads": 4, "ff_mult": 4},
)
"""The first is that of mps_block.json."""
MASKED = [5, 6]  # of 7 text tokens; 5 image tokens ask


def pictures() -> list[Tensor]:
    """Four of 32 pixels, as the models take them, four larger squares, and four that are none."""
    coarse = images(8, 6, 5, seed=4)
    parts = [F.interpolate(coarse[:4], (48, 48), mode="bicubic")]
    parts += [F.interpolate(coarse[4:], (40, 36), mode="bicubic")]
    return [*images(4, 32, 32, seed=3), *(image.clamp(0, 1) for part in parts for image in part)]


def features() -> tuple[Tensor, Tensor]:
    """Two sets of features [200, 24] in float64."""
    g = np.random.default_rng(0)
    a = g.normal(size=(200, 24)) @ g.normal(size=(24, 24))
    b = g.normal(size=(200, 24)) @ g.normal(size=(24, 24)) + 0.2
    return torch.from_numpy(a), torch.from_numpy(b)


def seen() -> tuple[Tensor, Tensor]:
    """What Inception looks at: a picture that it resizes, and one of its own size."""
    return images(1, 32, 32), images(1, 299, 299)


def waves(case: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Image tokens [2, 5, D] and text tokens [2, 7, D], as in mps_block.json."""
    k, n = torch.arange(2 * 5 * case["dim"]).double(), torch.arange(2 * 7 * case["dim"]).double()
    return (0.13 * k).sin().reshape(2, 5, -1), (0.07 * n).cos().reshape(2, 7, -1)


def write(folder: Path) -> None:
    """Write all that is asked about, in the layouts of the published files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures()):
        save_png(folder / f"{i}.png", picture)
    write_json(folder / "prompts.json", PROMPTS * 3)
    torch.save({"epoch": 1, "state_dict": open_clip_state()}, folder / "hps.pt")
    write_json(folder / "ViT-H-14.json", OPEN_CLIP)
    half = {k: v.half().float() for k, v in open_clip_state(OPENAI).items()}
    torch.save(half, folder / "clip.pt")  # whole in float16, to which OpenAI's code rounds
    write_json(folder / "clip.json", OPENAI)
    torch.save(head_state(OPENAI["embed_dim"]), folder / "aesthetic.pth")
    torch.save(published_state(IMAGEREWARD), folder / "imagereward.pt")
    write_json(folder / "imagereward.json", asdict(IMAGEREWARD))
    write_json(folder / "med_config.json", BERT)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "pickscore").mkdir(exist_ok=True)
    state = twin(folder / "pickscore").state_dict()
    torch.save(state, folder / "pickscore.pt")
    write_json(folder / "clip_model.json", {"text_config": TEXT, "vision_config": VISION})
    module = Published(None)
    torch.save(module, folder / "mps.pth")
    torch.save(module.state_dict(), folder / "mps.pt")
    write_json(folder / "mps.json", {**TINY_MPS.stack, "condition": mps.CONDITION})
    write_json(folder / "vit_h.json", mps.CLIP_H)
    write_stacks(folder)
    torch.save(drawn(), folder / "inception.pth")
    a, b = features()
    np.savez(folder / "features.npz", a=a.numpy(), b=b.numpy())
    np.savez(folder / "seen.npz", *(to_bytes(image).numpy() for image in seen()))


def write_stacks(folder: Path) -> None:
    """The stacks of MPS, with their tensors by the rule of mps_block.json."""
    told = []
    for case in STACKS:
        state = stack(case).state_dict()
        told.append({"case": case, "masked": MASKED, "waves": waves(case), "state": state})
    torch.save(told, folder / "stacks.pt")


def stack(case: Mapping[str, int]) -> Stack:
    """Of these sizes, in float64."""
    made = Stack(**case).double()
    made.load_state_dict({name: by_rule(name, v.shape) for name, v in made.state_dict().items()})
    return made


def scores(reward: Reward, folder: Path) -> Numbers:
    """Of all pictures, in batches of one size."""
    shown = [read_png(folder / f"{i}.png")[0] for i in range(12)]
    prompts = json.loads((folder / "prompts.json").read_text())
    parts = [score(reward, torch.stack(shown[i : i + 4]), prompts[i : i + 4]) for i in (0, 4, 8)]
    return torch.cat(parts).tolist()


def our_clip(folder: Path) -> tuple[Shelf, Cosine]:
    """A shelf with the twin of OpenAI's model, and the cosine in it."""
    path, setup = folder / "clip.pt", Setup(paths={"clip": folder / "clip.pt"})
    towers = clip.load_towers(path, setup.device, False, OPENAI)
    paths = {"clip": path, "aesthetic": folder / "aesthetic.pth"}
    return Shelf(Setup(paths=paths), {("clip", path): towers}), Cosine(towers)


def our_hps(folder: Path) -> Numbers:
    """As `hps` does."""
    return scores(hps.load(Shelf(Setup(paths={"hps": folder / "hps.pt"})), OPEN_CLIP), folder)


def our_imagereward(folder: Path) -> Numbers:
    """As `imagereward` does."""
    setup = Setup(paths={"imagereward": folder / "imagereward.pt", "bert": folder / "vocab.txt"})
    return scores(imagereward.load(Shelf(setup), IMAGEREWARD), folder)


def our_mps(folder: Path) -> Numbers:
    """As `mps` does."""
    return scores(mps.load(Shelf(Setup(paths={"mps": folder / "mps.pth"})), TINY_MPS), folder)


def our_pickscore(folder: Path) -> Numbers:
    """As `pickscore` does."""
    return scores(pickscore.load(Shelf(Setup(paths={"pickscore": folder / "pickscore"}))), folder)


def our_stacks(_: Path) -> Numbers:
    """The first image token of each stack."""
    mask = torch.zeros(2, 7, dtype=torch.float64)
    mask[:, MASKED] = float("-inf")
    rows = [stack(case)(*waves(case), mask)[:, 0].flatten() for case in STACKS]
    return torch.cat(rows).tolist()


def our_inception(folder: Path) -> Numbers:
    """Every 128th feature of each."""
    network = load_space("inception", torch.device("cpu"), folder / "inception.pth")
    return torch.cat([network(image)[0, ::128] for image in seen()]).tolist()


def our_frechet(_: Path) -> Numbers:
    """The distance of two sets of features."""
    a, b = (statistics_of(t) for t in features())
    return [frechet_distance(a.mean, a.covariance, b.mean, b.covariance)]


def our_kernel(_: Path) -> Numbers:
    """The kernel distance of two sets of features."""
    return [kernel_distance(*features()).value]


OURS: dict[str, Callable[[Path], Numbers]] = {
    "hps": our_hps,
    "clip": lambda folder: scores(our_clip(folder)[1], folder),
    "aesthetic": lambda folder: scores(aesthetic.load(our_clip(folder)[0]), folder),
    "imagereward": our_imagereward,
    "pickscore": our_pickscore,
    "mps": our_mps,
    "mps_stack": our_stacks,
    "inception": our_inception,
    "frechet": our_frechet,
    "kernel": our_kernel,
}
