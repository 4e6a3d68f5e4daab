"""Floats to bytes by one rule, PNGs with what they say, other pictures as they look."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.images import grid, png_text, read_image, read_png, save_png, to_bytes


def test_the_rule_is_that_of_edm_and_loses_no_byte() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_bytes(levels.to(dtype) / 255), levels)
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(to_bytes(x), ((2 * x - 1) * 127.5 + 128).clip(0, 255).to(torch.uint8))
    outside = torch.tensor([-3.0, 0.5 / 255, 1.49 / 255, 2.0], dtype=torch.float64)
    assert to_bytes(outside).tolist() == [0, 1, 1, 255]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.full((3, 2, 2), float("nan")), "NaN"),
        (torch.full((3, 2, 2), float("inf")), "NaN"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 4, 4), "a PNG needs"),
        (torch.zeros(3, 0, 4), "a PNG needs"),
    ],
)
def test_what_is_no_image_is_refused_and_not_written(
    tmp_path: Path, image: torch.Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        save_png(tmp_path / "a.png", image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_keeps_its_pixels_and_its_recipe(tmp_path: Path, channels: int, mode: str) -> None:
    image = torch.rand(channels, 50, 70, generator=torch.Generator().manual_seed(1))
    recipe = {"solver": "epd", "sigmas": [80.0, 0.002], "prompt": "a 犬 é"}
    path = tmp_path / "deep" / "a.png"
    save_png(path, image, {"recipe": recipe, "software": "ours"})
    with Image.open(path) as png:
        assert (png.mode, png.size) == (mode, (70, 50))
    back, text = read_png(path)
    assert torch.equal(to_bytes(back), to_bytes(image))
    assert (json.loads(text["recipe"]), text["software"]) == (recipe, "ours")
    whole = path.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    assert png_text(tmp_path / "cut.png") == text  # its pixels are not read
    for name in ("cut.png", "text.png", "none.png"):
        with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*$"):
            read_png(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.png"):
        png_text(tmp_path / "none.png")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_what_is_transparent_shows_white(tmp_path: Path, mode: str) -> None:
    """Alpha, palettes and a colour that stands for nothing, in files as others write them."""
    clear = {"RGB": (0, 0, 0), "RGBA": (9, 9, 9, 0)}.get(mode, 0)
    picture = Image.new(mode, (2, 1), clear)
    picture.putpixel((1, 0), {"RGB": (7, 7, 7), "RGBA": (7, 7, 7, 255)}.get(mode, 7))
    more = {} if mode == "RGBA" else {"transparency": clear}
    picture.save(tmp_path / "a.png", **more)
    image, _ = read_png(tmp_path / "a.png")
    assert (image[:, 0, 0] == 1).all()
    assert (image[:, 0, 1] < 0.1).all()


def test_sixteen_bits_are_scaled_and_pixels_of_no_known_range_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.tiff"):
        Image.fromarray(np.array([[0, 257 * 9, 65535]], np.uint16)).save(tmp_path / name)
        assert read_image(tmp_path / name, name)[0].flatten().tolist() == [0, 9, 255]
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.full((2, 2), 300, dtype)).save(tmp_path / "a.tiff")
        with pytest.raises(ValueError, match="its pixels are"):
            read_image(tmp_path / "a.tiff", "a.tiff")


def test_a_grid_fills_rows_first_and_leaves_the_rest_white() -> None:
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 2, 2) / 10
    whole = grid(images, columns=3, gap=1)
    assert whole.shape == (1, 5, 8)
    assert torch.equal(whole[0, 0, ::3], torch.tensor([0.0, 0.1, 0.2]))
    assert torch.equal(whole[0, 3, ::3], torch.tensor([0.3, 0.4, 1.0]))
    assert whole[0, 2].eq(1).all()
    assert whole[0, :, 2].eq(1).all()
