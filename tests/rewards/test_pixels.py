"""Resize, crop and normalise, against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from rewards.pixels import MEAN, STD, prepare, resize
from tests.rewards.twins import images

SIZES = [(64, 64), (512, 512), (300, 200), (200, 333), (32, 225), (224, 224), (225, 224)]


def by_pillow(batch: Tensor, size: int) -> Tensor:
    path = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    made = [path(Image.fromarray(np.ascontiguousarray(p))) for p in pixels]
    return torch.stack([m for m in made if isinstance(m, Tensor)])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_pillows_resize_to_a_byte_level_in_one_of_a_thousand_pixels(
    height: int, width: int
) -> None:
    batch = images(2, height, width)
    ours, theirs = prepare(batch, 224), by_pillow(batch, 224)
    assert ours.shape == (2, 3, 224, 224)
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01
    assert (levels > 0.01).float().mean() < 1e-3


def test_what_bicubic_overshoots_is_cut_to_the_range_of_images() -> None:
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 255
    assert resize(edge, 64).aminmax() == (0, 255)


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    batch = images(1, 224, 224)
    middle, spread = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert torch.equal(prepare(batch, 224), (batch - middle) / spread)
