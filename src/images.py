"""The one rule from floats to bytes, PNG files and grids.

Images are floats in [0, 1]: B images, C channels (1 grey, 3 colour), height H, width W.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from src.files import to_json, write_atomically

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def to_bytes(images: Tensor) -> Tensor:
    """Floats [*] -> uint8 [*]: floor(255 x + 1/2), clipped to 0 ... 255.

    Rounds to the nearest, halves up; the same bytes as x' * 127.5 + 128 cut to an integer for
    x' = 2 x - 1 in [-1, 1], the rule of EDM. Values outside [0, 1] are clipped. ValueError for
    NaN, infinity and images that are not floats.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], not {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("the image holds NaN or infinity")
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return (wide * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def save_png(path: str | Path, image: Tensor, text: Mapping[str, Any] | None = None) -> None:
    """Write one image [C, H, W] as a PNG, whole or not at all; ValueError as `png_bytes`."""
    content = png_bytes(image, text)
    with write_atomically(path) as temp:
        temp.write_bytes(content)


def png_bytes(image: Tensor, text: Mapping[str, Any] | None = None) -> bytes:
    """The content of a PNG file of one image [C, H, W] in [0, 1]; C = 1 makes a grey one.

    Each entry of `text` becomes a text chunk: a string as it is, anything else as JSON.
    ValueError for other shapes, NaN, and what `to_json` refuses.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(f"a PNG needs an image [1 or 3, H, W], not {list(image.shape)}")
    pixels = to_bytes(image).permute(1, 2, 0).cpu().numpy()
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value if isinstance(value, str) else to_json(value))
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels)
    picture.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """The image [C, H, W] (float32, C = 1 for grey, else 3) and its text chunks.

    What is transparent shows white. ValueError for a file that is missing or no whole PNG.
    """
    pixels, text = read_image(path, str(path), ("PNG",))
    return pixels / 255, text


def png_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG, its pixels unread; ValueError where it is missing or none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {k: str(v) for k, v in image.info.items() if isinstance(v, str)}
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable PNG: {error}") from error


def read_image(
    file: str | Path | IO[bytes], name: str, formats: tuple[str, ...] = FORMATS
) -> tuple[Tensor, dict[str, str]]:
    """The image [C, H, W] in uint8 (C = 1 for grey, else 3) and its text chunks.

    What is transparent shows white. ValueError, with `name`, for a file that is missing or no
    whole image of one of these formats.
    """
    try:
        with Image.open(file, formats=formats) as image:
            image.load()
            text = {k: str(v) for k, v in image.info.items() if isinstance(v, str)}
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                kind = "floats" if image.mode == "F" else "integers of 32 bits"
                raise ValueError(f"its pixels are {kind}: save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits, which Pillow would cut instead of scale
                pixels = ((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255)
            elif image.mode in ("L", "RGB") and "transparency" not in image.info:
                pixels = np.array(image)
            else:
                white = Image.new("RGBA", image.size, "white")
                whole = Image.alpha_composite(white, image.convert("RGBA"))
                pixels = np.array(whole.convert("RGB"))
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {name}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kinds = " or ".join(formats)
        raise ValueError(f"{name} is not a readable {kinds}: {error}") from error
    shown = torch.from_numpy(pixels.astype(np.uint8, copy=False))
    return (shown[None] if shown.ndim == 2 else shown.permute(2, 0, 1)), text


def grid(images: Tensor, columns: int | None = None, gap: int = 0) -> Tensor:
    """Images [B, C, H, W] -> one [C, rows * (H + gap) - gap, columns * (W + gap) - gap].

    Row by row, as square as can be where `columns` is not given. Gaps and the cells after the
    last image are white. ValueError for no images or columns < 1.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"a grid needs images [B, C, H, W], not {list(images.shape)}")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"a grid needs at least 1 column, not {columns}")
    rows = math.ceil(len(images) / columns)
    b, c, h, w = images.shape
    cells = images.new_ones(rows * columns, c, h + gap, w + gap)
    cells[:b, :, :h, :w] = images
    cells = cells.reshape(rows, columns, c, h + gap, w + gap).permute(2, 0, 3, 1, 4)
    height, width = rows * (h + gap), columns * (w + gap)
    return cells.reshape(c, height, width)[:, : height - gap, : width - gap]
