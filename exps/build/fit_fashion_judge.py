"""Train the judge of Fashion-MNIST that scores and compares pictures: rewards/fashion.py.

python -m exps.build.fit_fashion_judge --outdir runs/fashion-judge
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor

from exps.build.fashion_data import FOLDER, load_split, rows_of
from exps.build.fit_network import Plan, fit_network, training
from rewards.fashion import ClothesClassifier, load_judge
from src.files import write_atomically, write_json


def vary(images: Tensor, g: Generator) -> Tensor:
    """Images in [-1, 1] -> [0, 1], some mirrored, moved by up to 2 pixels, some a little noisy."""
    b = len(images)
    mirrored = torch.where(torch.rand(b, 1, 1, 1, generator=g) < 0.5, images.flip(-1), images)
    wide = F.pad(mirrored, (2, 2, 2, 2), value=-1.0)
    corners = torch.randint(0, 5, (b, 2), generator=g).tolist()
    moved = torch.stack(
        [image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(wide, corners, strict=True)]
    )
    noise = 0.05 * torch.rand(b, 1, 1, 1, generator=g) * torch.randn(moved.shape, generator=g)
    return (moved / 2 + 0.5 + noise).clamp(0, 1)


def classifier_loss(network: ClothesClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, a twentieth of each label shared out to all classes."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images.contiguous(memory_format=torch.channels_last))
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.05)


@torch.no_grad()
def scores(network: ClothesClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The share that is right, and the mean log-probability of the label."""
    logits = torch.cat([network(part) for part in (images / 2 + 0.5).split(200)])
    return {
        "images": len(labels),
        "accuracy": round(float((logits.argmax(1) == labels).float().mean()), 4),
        "log_probability": round(-float(F.cross_entropy(logits, labels)), 4),
    }


@training(
    Plan(6000, 128, 2e-3, part=32, weight_decay=0.02, ema_steps=200, save_every=1000), FOLDER
)
def main(data: Path, outdir: Path, start: Path | None, plan: Plan) -> None:
    """Write model.safetensors (fp16) and card.json to OUTDIR/export; 20 minutes of one core."""
    splits = {split: load_split(data, split) for split in ("train", "t10k")}
    images, labels = splits["train"]
    network = load_judge(start).network if start else ClothesClassifier()
    network = network.requires_grad_(True).to(memory_format=torch.channels_last)

    def draw(step: int, g: Generator) -> tuple[Tensor, ...]:
        rows = rows_of(step, len(images), plan.batch, plan.seed)
        return vary(images[rows], g), labels[rows]

    def export(average: ClothesClassifier, step: int) -> None:
        half = average.half().state_dict()
        with write_atomically(outdir / "export" / "model.safetensors") as part:
            save_file({name: value.contiguous() for name, value in half.items()}, part)
        first = {split: (x[:10_000], y[:10_000]) for split, (x, y) in splits.items()}
        card = {split: scores(average.float(), *rows) for split, rows in first.items()}
        size = sum(p.numel() for p in average.parameters())
        about = {"parameters": size, "steps": step, "batch": plan.batch, "seed": plan.seed}
        write_json(outdir / "export" / "card.json", about | card)

    fit_network(network, draw, classifier_loss, plan, outdir, export)


if __name__ == "__main__":
    main()
