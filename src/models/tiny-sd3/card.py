"""Make the pictures and numbers of tiny-sd3's card, beside this file.

samples.png: usual prompts; held-out.png: names that training did not see, below the real pictures;
card.json: CLIP scores by tiny-clip, which saw the same pairs, and Frechet distances.
"""

import json
import sys
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from backends.base import Backend
from backends.generate import Job, Method, generate
from backends.load import load_backend
from eval.frechet import all_moments, frechet_distance
from eval.machine import provenance
from rewards.clip import load_towers
from rewards.efficientnet import Features, load_features
from rewards.towers import Cosine
from src.emoji import Emoji, load_emoji, load_pictures
from src.files import write_json
from src.images import grid, save_png

HERE = Path(__file__).resolve().parent
STEPS, GUIDANCE, BATCH = 28, 4.0, 20
SHOWN = (
    *("red apple", "smiling face", "rocket", "dog face", "pizza", "red heart", "cat face", "sun"),
    *("banana", "tree", "fire", "automobile", "soccer ball", "house", "thumbs up", "octopus"),
)


def drawn(backend: Backend, prompts: list[str]) -> Tensor:
    """Images [N, 3, 64, 64] in [0, 1], prompt i from seed i: Euler, as the stock pipeline."""
    sigmas = backend.levels.grid("flowmatch", STEPS + 1)
    way = Method(sigmas, guidance_rate=GUIDANCE, denoise_to_zero=bool(sigmas[-1] > 0))
    jobs = [Job(seed, prompt) for seed, prompt in enumerate(prompts)]
    batches = generate(backend, way, jobs, batch=BATCH)
    return torch.cat([b.images for b in tqdm(batches, total=-(-len(jobs) // BATCH))])


def distance(features: Features, a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of images; large for few images, whatever they show."""
    one, other = (all_moments(features(part) for part in x.split(BATCH)) for x in (a, b))
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


def chosen(emoji: list[Emoji], held_out: bool, count: int) -> list[Emoji]:
    """So many base concepts, evenly from the list."""
    some = [e for e in emoji if e.held_out == held_out and not e.tone]
    return [some[i * len(some) // count] for i in range(min(count, len(some)))]


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", default=str(HERE), show_default=False, help="The pipeline's folder.")
@click.option("--clip", type=click.Path(path_type=Path), default=HERE.parent / "tiny-clip")
@click.option("--count", type=click.IntRange(2), default=190, show_default=True)
@click.option("--outdir", type=click.Path(path_type=Path), default=HERE)
def main(data: Path, model: str, clip: Path, count: int, outdir: Path) -> None:
    """Write samples.png, held-out.png and card.json: --count names each of train and held-out.

    Example: python src/models/tiny-sd3/card.py --data runs/emoji
    """
    backend = load_backend(model)
    save_png(outdir / "samples.png", grid(drawn(backend, list(SHOWN)), columns=8))
    emoji, features = load_emoji(data), load_features()
    score = Cosine(load_towers(clip, torch.device("cpu"), amp=False))
    report: dict[str, object] = {"steps": STEPS, "guidance_rate": GUIDANCE, "images": count}
    real: dict[str, Tensor] = {}
    for name, held_out in (("train", False), ("held_out", True)):
        some = chosen(emoji, held_out, count)
        prompts = [e.name for e in some]
        real[name], made = load_pictures(data, some) / 255, drawn(backend, prompts)
        report[name] = {
            "clip_made": float(score(made, prompts).mean()),
            "clip_real": float(score(real[name], prompts).mean()),
            "clip_real_of_another_prompt": float(score(real[name].roll(7, 0), prompts).mean()),
            "frechet_made_to_real": distance(features, made, real[name]),
        }
        if held_out:
            pairs = zip(real[name][:48].split(16), made[:48].split(16), strict=True)
            save_png(outdir / "held-out.png", grid(torch.cat([torch.cat(p) for p in pairs]), 16))
    report["frechet_real_train_to_real_held_out"] = distance(features, *real.values())
    report |= provenance(torch.device("cpu"))
    write_json(outdir / "card.json", report)
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
