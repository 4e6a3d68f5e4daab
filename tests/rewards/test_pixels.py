"""Resize, crop and normalise, against Pillow, open_clip and transformers."""

import resource
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers as library
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from rewards.pixels import FILTERS, Preprocess, by_open_clip, by_transformers, resize
from tests.rewards.networks import by_pillow, images, pictures

transformers: Any = library
SIZES = [(64, 64), (512, 512), (300, 200), (200, 333), (32, 225), (224, 224), (225, 224), (1, 1)]
HERE = Path("preprocessor_config.json")


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_torchvisions_and_pillows_to_the_byte(height: int, width: int) -> None:
    batch = images(2, height, width)
    batch[:, :, : height // 2] = batch[:, :, : height // 2].round()  # hard edges overshoot
    ours = Preprocess(224)(batch)
    torch.testing.assert_close(ours, by_pillow(batch, 224), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_is_pillows_and_a_part_is_cut_from_the_whole(name: str) -> None:
    (picture,) = pictures(images(1, 90, 130))
    kind = getattr(Image.Resampling, name.upper())
    whole = pil_to_tensor(picture.resize((61, 40), kind)).float()
    levels = images(1, 90, 130) * 255
    assert torch.equal(resize(levels, (40, 61), (0, 0, 40, 61), name)[0], whole)
    assert torch.equal(resize(levels, (40, 61), (7, 9, 20, 30), name)[0], whole[:, 7:27, 9:39])


@pytest.mark.parametrize("shape", [(4, 3000), (3000, 4), (1, 100_000)])
def test_a_strip_takes_no_more_memory_than_it_has_pixels(shape: tuple[int, int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = Preprocess(224)(images(1, *shape))
    assert square.shape == (1, 3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_gradient_goes_through_the_roundings() -> None:
    batch = images(1, 40, 30).requires_grad_()
    plain = Preprocess(16, mean=(0.0,) * 3, std=(1.0,) * 3)
    (slope,) = torch.autograd.grad(plain(batch).sum(), batch)
    assert slope.sum().item() == pytest.approx(3 * 16 * 16, rel=1e-3)  # each pixel's weights: 1
    assert torch.equal(plain(batch).detach(), plain(batch.detach()))


def by_open_clips(config: dict[str, Any], batch: Tensor) -> Tensor:
    cfg = open_clip.transform.PreprocessCfg(size=32, **config)
    path: Any = open_clip.transform.image_transform_v2(cfg, is_train=False)
    return torch.stack([path(picture) for picture in pictures(batch)])


def by_transformers_own(config: dict[str, Any], batch: Tensor) -> Tensor:
    processor = transformers.CLIPImageProcessorPil(**config)
    return processor(pictures(batch), return_tensors="pt").pixel_values


@pytest.mark.parametrize(
    ("ours", "theirs", "config"),
    [
        (by_open_clip, by_open_clips, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}),
        (by_open_clip, by_open_clips, {"interpolation": "bilinear"}),
        (by_open_clip, by_open_clips, {"resize_mode": "squash"}),
        *(
            (by_transformers, by_transformers_own, config)
            for config in (
                {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
                {"size": 32, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.2] * 3},
                {"size": {"shortest_edge": 41}, "crop_size": 32, "resample": 2},
                {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 1},
                {"size": 32, "crop_size": 32, "do_normalize": False},
            )
        ),
    ],
)
def test_what_a_folder_states_is_followed(ours: Any, theirs: Any, config: dict[str, Any]) -> None:
    for shape in ((50, 70), (40, 36), (20, 21), (33, 32)):
        batch = images(2, *shape)
        pixels = ours(config, 32, HERE)(batch)
        torch.testing.assert_close(pixels, theirs(config, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("reader", "config", "words"),
    [
        *(
            (by_transformers, config, "does not make images of 32x32")
            for config in (
                {"size": {"shortest_edge": 64}, "crop_size": 64},
                {"size": {"height": 32, "width": 48}},
                {"size": 32, "do_center_crop": False},
                {"size": 20, "crop_size": 32},
            )
        ),
        (by_transformers, {"resample": 0}, "only the resizes bilinear, bicubic"),
        (by_transformers, {"do_rescale": False}, "resized and rescaled"),
        (by_transformers, {"image_mean": [0.5]}, "three numbers each"),
        (by_transformers, {"image_std": ["a", "b", "c"]}, "three numbers each"),
        (by_transformers, [32], "it is no object"),
        (by_open_clip, {"resize_mode": "longest"}, "resize_mode 'longest' is not served"),
    ],
)
def test_what_is_not_served_is_refused(reader: Any, config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{words}"):
        reader(config, 32, HERE)
