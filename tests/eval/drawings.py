"""Pictures on disk; cheap features and rewards of them, by a dotted name; two ranks at once."""

import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from src.files import write_json
from src.images import save_png

CHEAP = "tests.eval.drawings:features"


def features(images: Tensor) -> Tensor:
    """Five numbers of an image: [N, C, H, W] -> [N, 5]."""
    flat = images.flatten(1)
    extremes = [flat.amax(1), flat.amin(1), flat.median(1).values]
    return torch.stack([flat.mean(1), flat.std(1), *extremes], 1)


def moments(images: Tensor) -> Tensor:
    """The first two of those."""
    return features(images)[:, :2]


def nan_features(images: Tensor) -> Tensor:
    """As those, but not finite for an image that begins black."""
    numbers = features(images)
    numbers[images[:, 0, 0, 0] == 0] = float("nan")
    return numbers


def unpooled(images: Tensor) -> Tensor:
    """As many as the image has rows."""
    return images.mean((1, 3))


def shapeless_features(images: Tensor) -> Tensor:
    """No features: a number for all."""
    return images.mean()


def image(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> Tensor:
    """One drawn image [C, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, height, width, generator=generator) ** (1 + seed % 3)


def fill(folder: Path, count: int, first: int = 0) -> Path:
    """A folder of drawn pictures, every fifth of another size."""
    for i in range(first, first + count):
        save_png(folder / f"{i:06d}.png", image(i, width=9 if i % 5 == 4 else 8))
    return folder


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward: the mean, and as much more as the prompt has letters."""
    return images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward for which the prompt is of no use."""
    return images[:, 0].mean((1, 2)) + 0 * len(prompts)


def shapeless(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """No reward: a number for all."""
    return images.mean() + len(prompts)


def undefined(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that is NaN for a black image."""
    return redness(images, prompts) / images.amax((1, 2, 3))


def sampled(folder: Path, count: int, *, prompt: str = "a", seed: int = 0) -> Path:
    """A folder as sample.py writes it: prompts of different lengths, one a seed."""
    entries = []
    for i in range(count):
        text = prompt * (1 + i % 3)
        recipe = {"recipe": {"seed": i, "prompt": text}}
        save_png(folder / f"{i:06d}.png", image(seed + i, width=9 if i % 5 == 4 else 8), recipe)
        entries.append({"file": f"{i:06d}.png", "seed": i, "prompt": text})
    write_json(folder / "samples.json", {"recipe": {}, "images": entries})
    return folder


PROGRESS = re.compile(r"[^:]*: \d+/\d+ images in |\d+/\d+ images in ")


def refused(done: Result, words: str) -> None:
    """A command that ended with one line that holds these words."""
    assert done.exit_code != 0
    lines = [line for line in done.output.strip().splitlines() if not PROGRESS.match(line)]
    assert words in lines[-1], done.output
    assert len(lines) == 1, done.output


def on_two_ranks(command: click.Command, options: Callable[[int], Sequence[object]]) -> list[str]:
    """A command as two processes of one group run it, each with its options -> what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")  # all is imported already
    said = fork.Queue()

    def work(rank: int) -> None:
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        done = CliRunner().invoke(command, [*map(str, options(rank))])
        said.put((rank, done.exit_code, done.stdout if not done.exit_code else done.output))

    workers = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    ends = sorted(said.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert [code for _, code, _ in ends] == [0, 0], ends
    return [text for *_, text in ends]
