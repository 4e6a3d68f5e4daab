"""Train tiny-clip, a small CLIP of emoji scenes, in open_clip's format and its own vocabulary.

    python -m exps.build.fit_tiny_clip --data runs/emoji --outdir runs/clip

Loss: the symmetric contrastive one of Radford et al. 2021, arXiv:2103.00020.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from exps.build.emoji_data import load_emoji, load_pictures, on_white
from exps.build.fit_network import Plan, fit_network, training
from exps.build.scenes import Stage, paint
from exps.build.tiny_models import load_clip, save_clip, tokenise
from src.files import write_json

MEAN, STD = (0.75, 0.71, 0.66), (0.32, 0.33, 0.37)  # as in open_clip_config.json


def vary(images: Tensor, g: Generator) -> Tensor:
    """Some rescaled or blurred, all with a little noise, in the network's range."""
    side, few = int(torch.randint(36, 72, (), generator=g)), len(images) // 3
    smaller = F.interpolate(images[:few], size=side, mode="bilinear", antialias=True)
    images = torch.cat([F.interpolate(smaller, size=64, mode="bilinear"), images[few:]])
    return normal(images + 0.02 * torch.randn(images.shape, generator=g))


def normal(images: Tensor) -> Tensor:
    """Images in [0, 1] -> the network's range."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def clip_loss(clip: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """The contrastive loss of pairs, both ways; a caption that is there twice is right twice."""
    with torch.autocast("cpu", torch.bfloat16):
        seen, read = clip.encode_image(images), clip.encode_text(tokens)
    seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
    scores = clip.logit_scale.exp().clamp(max=100) * seen @ read.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


@torch.no_grad()
def recall(clip: Any, images: Tensor, tokens: Tensor) -> dict[str, float]:
    """How often a caption finds its own picture among these, first or among ten."""
    seen = torch.cat([clip.encode_image(normal(part)) for part in images.split(64)])
    texts = F.normalize(clip.encode_text(tokens), dim=-1)
    scores = texts @ F.normalize(seen, dim=-1).T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    first, ten = (round(float((rank < n).float().mean()), 4) for n in (1, 10))
    return {"pictures": len(rank), "first": first, "ten": ten}


@training(Plan(3000, 128, 1e-3, part=128, threads=1, weight_decay=0.05, save_every=250))
def main(data: Path, outdir: Path, start: Path | None, plan: Plan) -> None:
    """Write OUTDIR/clip, a folder of open_clip's, and OUTDIR/scores.json."""
    emoji = load_emoji(data)
    pictures, stage = load_pictures(data, emoji), Stage(emoji)
    clip, tokenizer = load_clip(start)
    g = Generator().manual_seed(plan.seed)
    tests: dict[str, tuple[Tensor, Tensor]] = {}
    for name, held_out in (("trained", False), ("held_out", True)):
        rows = [i for i, e in enumerate(emoji) if e.held_out == held_out and not e.tone]
        rows = rows[:: max(1, len(rows) // 190)]
        names = tokenise(tokenizer, [emoji[i].name for i in rows])
        tests[name] = on_white(pictures[rows]), names
        scenes = Stage(emoji, held_out=held_out).draw(190, g)
        said = tokenise(tokenizer, [scene.caption for scene in scenes])
        tests[f"scenes_{name}"] = paint(scenes, pictures), said

    def draw(_: int, g: Generator) -> tuple[Tensor, ...]:
        scenes = stage.draw(plan.batch, g)
        said = tokenise(tokenizer, [scene.caption for scene in scenes])
        return vary(paint(scenes, pictures), g), said

    def export(average: Any, step: int) -> None:
        save_clip(average, outdir / "clip")
        scores = {name: recall(average, *test) for name, test in tests.items()}
        write_json(outdir / "scores.json", {"steps": step, **scores})

    fit_network(clip.train(), draw, clip_loss, plan, outdir, export)


if __name__ == "__main__":
    main()
