"""Which piece of clothing is it? A small classifier of Fashion-MNIST, trained here.

`fashion-judge` scores the log-probability of the class that was asked for; its features, 128
numbers an image, serve Frechet distances. It shares nothing with the diffusion model but the
training set. B images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.registry import Setup
from rewards.state_dicts import fill, read_state

WEIGHTS = Path(__file__).parents[1] / "src/models/fashion-mnist-judge/model.safetensors"
SIDE, SIZE = 32, 128
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Residual(nn.Module):
    """Two convolutions beside a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ClothesClassifier(nn.Module):
    """Grey images [B, 1, 32, 32] in [0, 1] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.down1 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.block1 = Residual(64)
        self.down2 = nn.Conv2d(64, SIZE, 3, stride=2, padding=1)
        self.block2 = Residual(SIZE)
        self.norm = nn.GroupNorm(8, SIZE)
        self.head = nn.Linear(SIZE, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, [B, 128]."""
        x = self.block1(self.down1(F.relu(self.stem(2 * x - 1))))
        return F.relu(self.norm(self.block2(self.down2(F.relu(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class FashionJudge:
    """ln p(class | image), at most 0: a Reward with a gradient, whose prompts are classes."""

    network: ClothesClassifier
    device: torch.device

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, [B, 128], for images [B, 1 or 3, H, W] in [0, 1]."""
        return self.network.features(self._grey(images))

    def log_probabilities(self, images: Tensor) -> Tensor:
        """ln p of each class, [B, 10]; as `features`, with a gradient."""
        return F.log_softmax(self.network(self._grey(images)), -1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As Reward; a prompt is a class by number ("7") or name ("Sneaker"), else ValueError."""
        rows = torch.tensor([class_of(prompt) for prompt in prompts], device=self.device)
        return self.log_probabilities(images).gather(1, rows[:, None])[:, 0].to(images.device)

    def _grey(self, images: Tensor) -> Tensor:
        grey = images.to(self.device, torch.float32).mean(1, keepdim=True)
        size = (SIDE, SIDE)
        return grey if grey.shape[2:] == size else F.interpolate(grey, size, mode="area")


def class_of(prompt: str | int) -> int:
    """The class that a prompt names; ValueError where it names none."""
    names = {name.lower(): i for i, name in enumerate(CLASSES)}
    names |= {str(i): i for i in range(len(CLASSES))}
    if (row := names.get(str(prompt).strip().lower())) is None:
        raise ValueError(f"fashion-judge: {prompt!r} is no class: 0 to 9, or {', '.join(CLASSES)}")
    return row


def load_judge(path: Path = WEIGHTS, device: torch.device | str = "cpu") -> FashionJudge:
    """The classifier with its weights; ValueError, naming the file, where it is a wrong one."""
    device = torch.device(device)
    network = fill(ClothesClassifier, read_state(path), str(path), device)
    return FashionJudge(network.requires_grad_(False).eval(), device)


@cache
def judge_on(device: torch.device) -> FashionJudge:
    """The shipped classifier on a device, read once."""
    return load_judge(device=device)


def features(images: Tensor) -> Tensor:
    """The shipped judge's features [B, 128] of images [B, 1 or 3, H, W] in [0, 1]."""
    return judge_on(images.device).features(images)


def accuracy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where the shipped judge takes an image for its prompt's class, else 0, [B]."""
    asked = torch.tensor([class_of(prompt) for prompt in prompts], device=images.device)
    return (judge_on(images.device).log_probabilities(images).argmax(-1) == asked).float()


def load(setup: Setup) -> FashionJudge:
    """The reward."""
    return load_judge(device=setup.device)
