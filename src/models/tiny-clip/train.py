"""Train tiny-clip, a small CLIP on captioned emoji, and its vocabulary; open_clip's format.

Loss: the symmetric contrastive one of Radford et al. 2021, arXiv:2103.00020. Run again to go on.
"""

import sys
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.tiny import build_clip, build_tokenizer, save_clip, tokenise
from src.emoji import captions, drawing_weights, load_emoji, load_pictures, shifted
from src.files import write_json
from src.fitting import Plan, Run, fit, initialise

LENGTH = 20
VOCABULARY = 2048
VISION = {"image_size": 64, "layers": 4, "width": 192, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": LENGTH, "width": 128, "heads": 4, "layers": 3}
EMBEDDING = 128
MEAN, STD = (0.75, 0.71, 0.66), (0.32, 0.33, 0.37)
CAPTIONS = 16
LR = 1e-3


def model_config(vocabulary: int) -> dict[str, Any]:
    """What open_clip_config.json holds."""
    text = {**TEXT, "vocab_size": vocabulary, "hf_tokenizer_name": "."}
    return {
        "model_cfg": {"embed_dim": EMBEDDING, "vision_cfg": VISION, "text_cfg": text},
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }


def vary(pictures: Tensor, g: Generator) -> Tensor:
    """uint8 -> what the network sees: shifted, some rescaled or blurred, with a little noise."""
    images = shifted(pictures, 4, g).float() / 255
    side = int(torch.randint(36, 72, (), generator=g))
    few = len(images) // 3
    images[:few] = F.interpolate(
        F.interpolate(images[:few], size=side, mode="bilinear", antialias=True),
        size=64,
        mode="bilinear",
    )
    return normal(images + 0.02 * torch.randn(images.shape, generator=g))


def normal(images: Tensor) -> Tensor:
    """Images in [0, 1] -> the network's range."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def clip_loss(clip: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """The contrastive loss of pairs, both ways; a caption that is there twice is right twice."""
    with torch.autocast(images.device.type, torch.bfloat16):
        seen = clip.encode_image(images)
        read = clip.encode_text(tokens)
    seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
    scores = clip.logit_scale.exp().clamp(max=100) * seen @ read.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


@torch.no_grad()
def recall(clip: Any, pictures: Tensor, tokens: Tensor) -> dict[str, float]:
    """How often a name finds its own picture among these, first or among ten."""
    images = [
        F.normalize(clip.encode_image(normal(p.float() / 255)), dim=-1) for p in pictures.split(64)
    ]
    texts = F.normalize(clip.encode_text(tokens), dim=-1)
    scores = texts @ torch.cat(images).T
    own = scores.diagonal()[:, None]
    rank = (scores > own).sum(1)
    return {"pictures": len(rank), "first": mean(rank < 1), "ten": mean(rank < 10)}


def mean(true: Tensor) -> float:
    """The share that is true."""
    return round(float(true.float().mean()), 4)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--runs", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(1), default=2500, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=15.0, show_default=True)
@click.option("--batch", type=click.IntRange(2), default=128, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    data: Path, runs: Path, steps: int, minutes: float, batch: int, seed: int, device: str
) -> None:
    """Train, then write RUNS/clip/clip and RUNS/clip/scores.json.

    Example: python src/models/tiny-clip/train.py --data runs/emoji --runs runs/tiny
    """
    outdir = runs / "clip"
    torch.set_num_threads(1)
    emoji = load_emoji(data)
    pictures = load_pictures(data, emoji)
    trained = [i for i, e in enumerate(emoji) if not e.held_out]
    told = [captions(e, CAPTIONS, seed) for e in emoji]
    tokenizer = build_tokenizer([text for i in trained for text in told[i]], VOCABULARY, LENGTH)
    tokens = tokenise(tokenizer, [text for texts in told for text in texts]).reshape(
        len(emoji), CAPTIONS, LENGTH
    )
    weights = drawing_weights(emoji) * torch.tensor([not e.held_out for e in emoji])
    clip = build_clip(EMBEDDING, VISION, {**TEXT, "vocab_size": len(tokenizer)})
    initialise(clip, seed)

    def draw(_: int, g: Generator) -> tuple[Tensor, ...]:
        rows = torch.multinomial(weights, batch, generator=g)
        said = torch.randint(CAPTIONS, (batch,), generator=g)
        return vary(pictures[rows], g), tokens[rows, said]

    def save(run: Run) -> None:
        clip, scores = run.averaged(), {}
        for name, held_out in (("train", False), ("held_out", True)):
            some = [i for i, e in enumerate(emoji) if e.held_out == held_out and not e.tone]
            some = some[:: max(1, len(some) // 190)]
            scores[name] = recall(clip, pictures[some], tokens[some, 0])
        save_clip(outdir / "clip", clip, tokenizer, model_config(len(tokenizer)))
        write_json(
            outdir / "scores.json", {"steps": run.step, "minutes": run.seconds / 60, **scores}
        )

    plan = Plan(steps, minutes, LR, seed, part=batch, weight_decay=0.05)
    fit(clip.to(device), draw, clip_loss, plan, outdir, save)


if __name__ == "__main__":
    main()
