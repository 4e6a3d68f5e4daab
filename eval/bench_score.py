"""What scoring in batches saves, and that its memory does not grow with the number of images.

Only ratios within one run: blocks of images in batches and images one by one take turns.

    python -m eval.bench_score
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from eval.machine import clock, provenance
from eval.report import aligned
from eval.score import NamedPath
from eval.scripts import peak_memory
from rewards.base import Reward
from rewards.registry import Setup, load_rewards
from rewards.scorer import score_all
from src.files import write_json
from src.options import Device, OneLineCommand, one_line_errors
from src.text import read_prompts

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("clip", "efficientnet-minilm", "brisque")
TINY_CLIP = ROOT / "src" / "models" / "tiny-clip"
PROMPTS = ROOT / "src" / "prompts" / "emoji-train.txt"
BLOCK = 100
MEGA = 1e6


@dataclass(frozen=True)
class Timing:
    """Seconds an image, in batches and one by one, and what the first is faster by."""

    name: str
    batched: float
    alone: float

    @property
    def ratio(self) -> float:
        """alone / batched."""
        return self.alone / self.batched


def pictures(count: int, size: int, seed: int) -> Tensor:
    """Images [count, 3, size, size] of noise: what they show costs nothing."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=g) / 255


def seconds(
    reward: Mapping[str, Reward], images: Tensor, prompts: Sequence[str], batch: int
) -> float:
    """The time of scoring all of them."""
    device = images.device
    started = clock(device)
    score_all(reward, images, prompts, batch=batch)
    return clock(device) - started


def turns(
    rewards: Mapping[str, Reward], counts: tuple[int, int], size: int, batch: int
) -> tuple[list[Timing], list[int]]:
    """-> the timing of each reward and of all together, and the peak of memory after each block.

    counts: images in batches, and those of them one by one. Every image has a prompt of its own,
    which no cache knows. ValueError for more images than prompts.
    """
    many, few = counts
    prompts = read_prompts(PROMPTS)
    if many + few > len(prompts):
        raise ValueError(f"{many} + {few} images need as many prompts, not {len(prompts)}")
    blocks = -(-many // BLOCK)
    spent = {name: [0.0, 0.0] for name in rewards}
    peaks = []
    warm = pictures(batch, size, blocks)
    score_all(rewards, warm, ["warm"] * batch, batch=batch)
    for block in tqdm(range(blocks), unit="block", disable=None):
        start, stop = block * BLOCK, min(many, (block + 1) * BLOCK)
        first, last = (many + few * b // blocks for b in (block, block + 1))
        images = pictures(stop - start, size, block)
        for name, reward in rewards.items():
            one = {name: reward}
            spent[name][0] += seconds(one, images, prompts[start:stop], batch)
            spent[name][1] += seconds(one, images[: last - first], prompts[first:last], 1)
        peaks.append(peak_memory())
    timings = [Timing(name, a / many, b / few) for name, (a, b) in spent.items()]
    whole = (sum(getattr(t, side) for t in timings) for side in ("batched", "alone"))
    return [*timings, Timing("all of them", *whole)], peaks


def as_row(timing: Timing) -> tuple[str, ...]:
    """A line of the table."""
    times = (f"{1e3 * value:.2f}" for value in (timing.batched, timing.alone))
    return timing.name, *times, f"{timing.ratio:.1f}"


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--reward", "names", multiple=True, default=SHIPPED, help="Repeatable.")
@click.option(
    "--weights",
    type=NamedPath(),
    multiple=True,
    default=[("clip", str(TINY_CLIP))],
    show_default="clip=tiny-clip",
    help="Where they are; repeatable.",
)
@click.option("--images", type=click.IntRange(1), default=1000, help="In batches.")
@click.option("--alone", type=click.IntRange(1), default=100, help="One by one.")
@click.option("--size", type=click.IntRange(1), default=64, help="Pixels a side.")
@click.option("--batch", type=click.IntRange(1), default=64)
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench_score.json")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(  # noqa: PLR0913 - one parameter an option
    names: tuple[str, ...],
    weights: tuple[tuple[str, str], ...],
    images: int,
    alone: int,
    size: int,
    batch: int,
    out: Path,
    device: torch.device,
) -> None:
    """Time the shipped scorers in batches and one by one, and watch the memory.

    Every image has another prompt. Images are in memory: files are read and written besides.
    Prints a table, in milliseconds an image, and writes JSON.
    """
    rewards = load_rewards(names, Setup(device, paths=dict(weights)))
    timings, peaks = turns(rewards, (images, alone), size, batch)
    click.echo(
        aligned([("reward", "batched ms", "one by one ms", "ratio"), *map(as_row, timings)])
    )
    half, last = (peaks[at] / MEGA for at in (len(peaks) // 2, -1))
    click.echo(f"Peak of memory: {last:.0f} MB, {last - half:.0f} MB of it in the second half.")
    about = {"images": images, "alone": alone, "size": size, "batch": batch, **provenance(device)}
    found = [{**asdict(timing), "ratio": timing.ratio} for timing in timings]
    write_json(out, {"about": about, "timings": found, "peaks": peaks})
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
