"""Pictures in folders, zips and lists, read in batches."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.pictures import Pictures, find_pictures, prompt_in, read_batches, subset
from src.images import read_png, save_png, to_bytes
from tests.eval.pictures import fill, image


def read(
    pictures: Pictures, batch: int = 3, bad: dict[str, str] | None = None
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for alike in read_batches(pictures, range(len(pictures.items)), batch=batch, bad=bad):
        found |= dict(zip(alike.which, alike.images, strict=True))
    return found


def zipped(folder: Path) -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder).as_posix())
        archive.writestr("dataset.json", "{}")
        archive.writestr("__MACOSX/000000.png", "no picture")
    return target


def test_a_zip_holds_what_its_folder_holds(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", 7)
    here, there = find_pictures(folder), find_pictures(zipped(folder))
    assert here.items == there.items
    mine, others = read(here), read(there)
    assert sorted(mine) == sorted(others) == list(range(7))
    assert all(torch.equal(mine[i], others[i]) for i in mine)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_changes_nothing_and_sizes_may_differ(tmp_path: Path, batch: int) -> None:
    found = read(find_pictures(fill(tmp_path, 11)), batch)
    assert sorted(found) == list(range(11))
    for i, pixels in found.items():
        assert torch.equal(pixels, to_bytes(read_png(tmp_path / f"{i:06d}.png")[0]))


def test_grey_palette_and_transparent_images_become_three_channels(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image(0, channels=1))
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255  # black above, nothing below
    Image.fromarray(rgba).save(tmp_path / "b.png")
    Image.fromarray(rgba[..., :3]).quantize(4).save(tmp_path / "c.png")
    Image.fromarray(rgba[..., :3]).save(tmp_path / "d.jpg")
    found = read(find_pictures(tmp_path))
    assert all(pixels.shape == (3, 8, 8) for pixels in found.values())
    assert torch.equal(found[0][0], found[0][2])
    assert found[1][:, :4].max() == 0
    assert found[1][:, 4:].min() == 255
    assert found[2].max() == 0


def test_sixteen_bits_are_scaled_to_eight_and_floats_are_refused(tmp_path: Path) -> None:
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(shades).save(tmp_path / "a.png")
    (pixels,) = read(find_pictures(tmp_path)).values()
    assert np.array_equal(pixels[1].numpy(), np.round(shades / 257).astype(np.uint8))
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="its pixels are floats"):
        read(find_pictures(tmp_path))


def test_a_truncated_picture_is_one_line_that_names_it(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    broken = tmp_path / "000001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"000001\.png is not a readable") as error:
        read(find_pictures(tmp_path))
    assert "\n" not in str(error.value)


def test_bad_pictures_are_left_out_and_listed(tmp_path: Path) -> None:
    fill(tmp_path, 6)
    (tmp_path / "000001.png").write_bytes(b"")
    (tmp_path / "000004.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    bad: dict[str, str] = {}
    assert sorted(read(find_pictures(tmp_path), 2, bad)) == [0, 2, 3, 5]
    assert sorted(bad) == ["000001.png", "000004.png"]


def test_a_damaged_zip_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = zipped(fill(tmp_path / "images", 2))
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes(255 - b for b in whole[60:90]) + whole[90:])
    with pytest.raises(ValueError, match=r"000000\.png"):
        read(find_pictures(path))
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="no whole zip"):
        find_pictures(path)


def test_the_subset_is_the_one_that_edm_draws(tmp_path: Path) -> None:
    pictures = find_pictures(fill(tmp_path, 9))
    order = np.arange(9)
    np.random.RandomState(5).shuffle(order)
    expected = [f"{i:06d}.png" for i in sorted(order[:4])]
    assert [p.name for p in subset(pictures, 4, 5).items] == expected
    assert subset(pictures, 4, 5 + 2**31) == subset(pictures, 4, 5)
    assert subset(pictures, 4, 6) != subset(pictures, 4, 5)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    pictures = find_pictures(fill(tmp_path, 3))
    assert subset(pictures, 3, 1) == subset(pictures, None, 2) == pictures
    with pytest.raises(ValueError, match="has 3 images, not 4"):
        subset(pictures, 4, 0)


def test_the_list_says_the_prompts(tmp_path: Path) -> None:
    entries = [{"file": "1.png", "seed": 1, "prompt": "a fox"}, {"file": "2.png", "class": 3}]
    (tmp_path / "samples.json").write_text(json.dumps({"images": entries}))
    first, second = find_pictures(tmp_path).items
    assert (first.name, first.seed, first.prompt) == ("1.png", 1, "a fox")
    assert (second.seed, second.prompt) == (None, None)


def test_the_prompt_is_in_the_picture_itself(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image(0), {"recipe": {"prompt": "a fox", "seed": 0}})
    save_png(tmp_path / "b.png", image(1), {"recipe": {"class": 3}})
    (alike,) = read_batches(find_pictures(tmp_path), range(2), batch=2)
    assert [prompt_in(text, "it") for text in alike.texts] == ["a fox", None]


def test_places_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_pictures(tmp_path / "none")
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images in"):
        find_pictures(tmp_path)
