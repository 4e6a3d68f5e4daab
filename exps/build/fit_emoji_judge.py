"""Fit efficientnet-minilm's matrix: features of emoji and scenes -> embeddings of their captions.

    python -m exps.build.fit_emoji_judge --data runs/emoji --outdir runs/emoji-judge

Ridge regression in closed form. The concepts that tiny-sd3 and tiny-clip hold out are held out
here too, and judge the judge.
"""

from collections.abc import Sequence
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor

from exps.build.emoji_data import load_emoji, load_pictures, on_white
from exps.build.scenes import Stage, paint
from rewards.efficientnet import Features, load_features
from rewards.efficientnet_minilm import SIDE, load_minilm
from rewards.weights import require
from src.files import write_atomically, write_json

AT_ONCE = 32
PLAIN = 4  # how often each plain picture counts beside a scene


def ridge(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weight [E, D] and bias [E] of least error plus n * penalty * |weight|^2.

    features [n, D], targets [n, E]; the bias has no penalty.
    """
    x, y = features.double(), targets.double()
    middle, aim = x.mean(0), y.mean(0)
    x, y = x - middle, y - aim
    gram = x.T @ x + len(x) * penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, aim - weight @ middle


def retrieval(cosines: Tensor) -> dict[str, float]:
    """How often the own one is found, first or among ten, of n; and how the cosines [n, n] lie."""
    own, n = cosines.diagonal(), len(cosines)
    name, picture = (cosines > own[:, None]).sum(1), (cosines > own[None]).sum(0)
    others = cosines[~torch.eye(n, dtype=torch.bool)]
    return {
        "pictures": n,
        "name_of_picture_first": (name < 1).double().mean().item(),
        "name_of_picture_ten": (name < 10).double().mean().item(),
        "picture_of_name_first": (picture < 1).double().mean().item(),
        "picture_of_name_ten": (picture < 10).double().mean().item(),
        "own_above_other": (own[:, None] > cosines).double().mean().item() * n / (n - 1),
        "cosine_own": own.mean().item(),
        "cosine_other": others.mean().item(),
    }


def seen(features: Features, images: Tensor) -> Tensor:
    """Features [N, D] of images [N, 3, 64, 64], rounded to bytes as a picture's file is."""
    return torch.cat([features((x * 255).round() / 255) for x in images.split(AT_ONCE)])


def read(texts: Sequence[str]) -> Tensor:
    """Embeddings [n, E] of texts."""
    encoder = load_minilm(require(["minilm"])["minilm"], torch.device("cpu"))
    parts = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
    return torch.cat([encoder(part) for part in parts])


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
@click.option("--scenes", type=click.IntRange(1), default=6000, help="Beside all plain pictures.")
@click.option("--penalty", type=click.FloatRange(0, min_open=True), default=0.3)
@click.option("--seed", type=click.IntRange(0), default=0)
def main(data: Path, outdir: Path, scenes: int, penalty: float, seed: int) -> None:
    """Write model.safetensors and card.json to OUTDIR; two minutes of one core."""
    torch.set_num_threads(1)
    emoji, features, g = load_emoji(data), load_features(side=SIDE), Generator().manual_seed(seed)
    pictures = load_pictures(data, emoji)
    pairs = {}
    for name, held_out in (("train", False), ("held_out", True)):
        rows = [i for i, e in enumerate(emoji) if e.held_out == held_out and not e.tone]
        plain = seen(features, on_white(pictures[rows]))
        pairs[name] = plain, read([emoji[i].names[0] for i in rows])
        shown = Stage(emoji, held_out=held_out).draw(190 if held_out else scenes, g)
        parts = [
            seen(features, paint(shown[i : i + 64], pictures)) for i in range(0, len(shown), 64)
        ]
        said = read([scene.caption for scene in shown])
        pairs[f"{name}_scenes"] = torch.cat(parts), said
    plain, drawn = pairs["train"], pairs["train_scenes"]
    x, y = (torch.cat([a.repeat(PLAIN, 1), b]) for a, b in zip(plain, drawn, strict=True))
    weight, bias = ridge(x, y, penalty)
    card: dict[str, object] = {"penalty": penalty, "side": SIDE, "scenes": scenes, "seed": seed}
    for name in ("held_out", "held_out_scenes"):
        guessed = F.normalize(pairs[name][0].double() @ weight.T + bias, dim=-1)
        card[name] = retrieval(guessed @ pairs[name][1].double().T)
    outdir.mkdir(parents=True, exist_ok=True)
    with write_atomically(outdir / "model.safetensors") as part:
        save_file({"weight": weight.float().contiguous(), "bias": bias.float()}, part)
    write_json(outdir / "card.json", card | {"trained_on": len(x)})


if __name__ == "__main__":
    main()
