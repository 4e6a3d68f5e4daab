"""Fit the judge's matrix: features of emoji -> sentence embeddings of their names.

Ridge regression in closed form; the penalty is chosen on trained concepts that are set aside.
The concepts that tiny-sd3 and tiny-clip hold out are held out here too, and judge the judge.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from eval.machine import provenance
from rewards.efficientnet import Features, load_features
from rewards.efficientnet_minilm import MATRIX, SIDE, load_minilm
from rewards.weights import require
from src.emoji import load_emoji, load_pictures, shifted
from src.files import write_atomically, write_json

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MOVED = 4  # pixels that a copy is moved by, at most
AT_ONCE = 32


@dataclass(frozen=True)
class Pairs:
    """Features [n, D] of pictures, and the embeddings [n, E] of their names."""

    features: Tensor
    names: Tensor

    def some(self, rows: Tensor) -> "Pairs":
        """Those of the rows [n], true or false."""
        return Pairs(self.features[rows], self.names[rows])


def ridge(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """-> weight [E, D] and bias [E] of least error plus n * penalty * |weight|^2.

    features [n, D], targets [n, E]; the bias has no penalty.
    """
    x, y = features.double(), targets.double()
    middle, aim = x.mean(0), y.mean(0)
    x, y = x - middle, y - aim
    gram = x.T @ x + len(x) * penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, aim - weight @ middle


def scores(pairs: Pairs, weight: Tensor, bias: Tensor) -> Tensor:
    """-> cosines [n, n]: picture i under name j."""
    seen = F.normalize(pairs.features.double() @ weight.T + bias, dim=-1)
    return seen @ pairs.names.double().T


def retrieval(cosines: Tensor) -> dict[str, float]:
    """How often the own one is found, first or among ten, of n; and how the cosines lie."""
    own, n = cosines.diagonal(), len(cosines)
    name, picture = (cosines > own[:, None]).sum(1), (cosines > own[None]).sum(0)
    others = cosines[~torch.eye(n, dtype=torch.bool)]
    return {
        "pictures": n,
        "name_of_picture_first": share(name < 1),
        "name_of_picture_ten": share(name < 10),
        "picture_of_name_first": share(picture < 1),
        "picture_of_name_ten": share(picture < 10),
        "own_above_other": share(own[:, None] > cosines) * n / (n - 1),
        "cosine_own": own.mean().item(),
        "cosine_other": others.mean().item(),
    }


def share(true: Tensor) -> float:
    """The share that is true."""
    return true.double().mean().item()


def choose(pairs: Pairs, aside: Tensor) -> float:
    """The penalty that finds the most of the concepts `aside` [n] with a fit of the others."""

    def found(penalty: float) -> float:
        fitted = ridge(pairs.features[~aside], pairs.names[~aside], penalty)
        said = retrieval(scores(pairs.some(aside), *fitted))
        return sum(value for name, value in said.items() if name.endswith(("first", "ten")))

    return max(PENALTIES, key=found)


def seen(features: Features, pictures: Tensor, what: str) -> Tensor:
    """-> the features [N, D] of pictures [N, 3, 64, 64] in uint8."""
    parts = tqdm(pictures.split(AT_ONCE), desc=what, disable=None)
    return torch.cat([features(part.float() / 255) for part in parts])


def read(names: Sequence[str]) -> Tensor:
    """-> the embeddings [n, E] of names."""
    texts = load_minilm(require(["minilm"])["minilm"], torch.device("cpu"))
    parts = [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]
    return torch.cat([texts(part) for part in tqdm(parts, desc="names", disable=None)])


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--outdir", type=click.Path(path_type=Path), default=MATRIX.parent)
@click.option("--copies", type=click.IntRange(0), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(data: Path, outdir: Path, copies: int, seed: int) -> None:
    """Write model.safetensors and card.json to OUTDIR; a few minutes on one core.

    Every trained picture is there once as it is and in --copies that are moved a little.
    Example: python src/models/efficientnet-minilm/fit.py --data runs/emoji
    """
    torch.set_num_threads(1)
    emoji = [e for e in load_emoji(data) if not e.tone]
    pictures, features = load_pictures(data, emoji), load_features(side=SIDE)
    plain = Pairs(seen(features, pictures, "pictures"), read([e.names[0] for e in emoji]))
    held_out = torch.tensor([e.held_out for e in emoji])
    trained = plain.some(~held_out)
    g = torch.Generator().manual_seed(seed)
    aside = torch.rand(len(trained.names), generator=g) < 0.1
    penalty = choose(trained, aside)
    moved = [
        seen(features, shifted(pictures[~held_out], MOVED, g), f"copy {i + 1}")
        for i in range(copies)
    ]
    more = torch.cat([trained.features, *moved])
    weight, bias = ridge(more, trained.names.repeat(copies + 1, 1), penalty)
    said = {
        "held_out": retrieval(scores(plain.some(held_out), weight, bias)),
        "penalty": penalty,
        "side": SIDE,
        "trained_on": len(more),
        "seed": seed,
        **provenance(torch.device("cpu")),
    }
    outdir.mkdir(parents=True, exist_ok=True)
    with write_atomically(outdir / MATRIX.name) as temp:
        save_file({"weight": weight.float().contiguous(), "bias": bias.float()}, temp)
    write_json(outdir / "card.json", said)
    click.echo(json.dumps(said, indent=2))


if __name__ == "__main__":
    main()
