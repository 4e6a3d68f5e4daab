"""Pictures in folders, zips and lists, what they say of themselves, and how they are read."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.pictures import Identity, Pictures, find_pictures, identities, read_batches, subset
from src.images import save_png
from tests.eval.drawings import fill, image, sampled


def read(
    pictures: Pictures, batch: int = 3, bad: dict[str, str] | None = None
) -> dict[int, Tensor]:
    images: dict[int, Tensor] = {}
    for alike in read_batches(pictures, range(len(pictures.items)), batch=batch, bad=bad):
        images |= dict(zip(alike.which, alike.images, strict=True))
    return images


def names(place: Path, pattern: str = "*") -> list[str]:
    return [picture.name for picture in find_pictures(place, pattern).items]


def identity(place: Path) -> list[Identity]:
    pictures = find_pictures(place)
    each = identities(pictures, range(len(pictures.items)))
    return [one for i in sorted(each) if isinstance(one := each[i], Identity)]


def zipped(folder: Path) -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("0*.png")):
            archive.write(path, path.relative_to(folder).as_posix())
        archive.writestr("dataset.json", "{}")
        archive.writestr("__MACOSX/000000.png", "no picture")
        archive.writestr("folder.png/", "")
        archive.writestr("._000000.png", "what macOS lays beside a file")
    return target


def test_grids_and_strips_of_samples_are_no_pictures_of_a_set(tmp_path: Path) -> None:
    folder = sampled(tmp_path / "all" / "images", 3)
    for extra in ("grid.png", "trajectory/000000.png"):
        (folder / extra).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "000000.png", folder / extra)
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", folder))
    counts = [len(find_pictures(place).items) for place in (folder, folder.parent, whole)]
    assert counts == [3, 3, 3]


def test_a_zip_holds_what_its_folder_holds_and_a_damaged_one_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "images", 7)
    (folder / "folder.png").mkdir()
    path = zipped(folder)
    shutil.copy(folder / "000000.png", folder / ".000007.0123456789ab.tmp.png")  # of a killed run
    here, there = find_pictures(folder), find_pictures(path)
    assert here.items == there.items
    mine, others = read(here), read(there)
    assert sorted(mine) == sorted(others) == list(range(7))
    assert all(torch.equal(mine[i], others[i]) for i in mine)
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes(255 - b for b in whole[60:90]) + whole[90:])
    with pytest.raises(ValueError, match=r"000000\.png"):
        read(find_pictures(path))
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="no whole zip"):
        find_pictures(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a.png", bytes(100_000))
    monkeypatch.setattr("eval.pictures.LARGEST", 99_999)
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: it claims more"):
        read(find_pictures(path))


def test_every_kind_of_picture_becomes_three_channels_on_white(tmp_path: Path) -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    rgba = np.dstack([black, np.repeat([[255] * 8, [0] * 8], 4, 0)]).astype(np.uint8)
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    save_png(tmp_path / "a-grey.png", image(0, channels=1))
    Image.fromarray(rgba).save(tmp_path / "b-half.png")
    Image.fromarray(black).quantize(4).save(tmp_path / "c-palette.png")
    Image.fromarray(black).save(tmp_path / "d.jpg")
    Image.fromarray(black).save(tmp_path / "e-clear.png", transparency=(0, 0, 0))
    Image.fromarray(black[..., 0]).save(tmp_path / "f-clear-grey.png", transparency=0)
    Image.fromarray(shades).save(tmp_path / "g-sixteen.png")
    grey, half, palette, jpeg, clear, clear_grey, sixteen = read(find_pictures(tmp_path)).values()
    assert torch.equal(grey[0], grey[2])
    assert (half[:, :4].max(), half[:, 4:].min()) == (0, 255)
    assert palette.max() == jpeg.max() == 0
    assert clear.min() == clear_grey.min() == 255
    assert np.array_equal(sixteen[1].numpy(), np.round(shades / 257).astype(np.uint8))


def test_bad_pictures_are_refused_by_name_or_left_out(tmp_path: Path) -> None:
    fill(tmp_path, 6)
    whole = (tmp_path / "000001.png").read_bytes()
    (tmp_path / "000001.png").write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"000001\.png is not a readable") as error:
        read(find_pictures(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "000004.png").write_bytes(b"")
    bad: dict[str, str] = {}
    assert sorted(read(find_pictures(tmp_path), 2, bad)) == [0, 2, 3, 5]
    assert sorted(bad) == ["000001.png", "000004.png"]


def test_the_subset_is_the_one_that_edm_draws(tmp_path: Path) -> None:
    pictures = find_pictures(fill(tmp_path, 9))
    order = np.arange(9)
    np.random.RandomState(5).shuffle(order)
    expected = [f"{i:06d}.png" for i in sorted(order[:4])]
    assert [p.name for p in subset(pictures, 4, 5).items] == expected
    assert subset(pictures, 4, 5 + 2**31) == subset(pictures, 4, 5) != subset(pictures, 4, 6)
    assert subset(pictures, 9, 1) == subset(pictures, None, 2) == pictures
    with pytest.raises(ValueError, match="has 9 images, not 10"):
        subset(pictures, 10, 0)


def test_a_folder_has_what_its_list_names_and_what_says_itself_that_it_belongs(
    tmp_path: Path,
) -> None:
    """A stopped run's index lags behind; grids and strips of states carry no recipe."""
    folder = sampled(tmp_path, 5)
    save_png(folder / "grid.png", torch.ones(3, 16, 16))
    save_png(folder / "trajectory" / "000000.png", torch.ones(3, 8, 32))
    index = json.loads((folder / "samples.json").read_text())
    index["images"] = index["images"][:2]
    (folder / "samples.json").write_text(json.dumps(index))
    assert names(folder) == [f"{i:06d}.png" for i in range(5)]
    assert [one.prompt for one in identity(folder)] == ["a", "aa", "aaa", "a", "aa"]
    assert names(folder / "samples.json") == ["000000.png", "000001.png"]
    assert names(folder, "*[13].png") == ["000001.png", "000003.png"]
    sampled(folder / "other", 3)  # of another recipe, and some of this one again
    again = folder / "000000" / "000001.png"
    again.parent.mkdir()
    again.write_bytes((folder / "000001.png").read_bytes())
    other = folder / "other" / "samples.json"
    assert names(folder) == [f"{i:06d}.png" for i in range(5)]
    index["recipe"] = None  # then every picture that says what it is
    (folder / "samples.json").write_text(json.dumps(index))
    assert len(names(folder)) == 5
    other.unlink()
    for path in (again, *(folder / "other").iterdir(), folder / "samples.json"):
        path.unlink()
    assert len(names(folder)) == 7


def test_the_picture_is_believed_where_the_list_disagrees(tmp_path: Path) -> None:
    folder = sampled(tmp_path, 4)
    index = json.loads((folder / "samples.json").read_text())
    index["images"][1]["prompt"], index["images"][2]["seed"] = "another", 77
    (folder / "samples.json").write_text(json.dumps(index))
    each = identity(folder)
    assert [one.prompt for one in each] == ["a", "aa", "aaa", "a"]
    assert [one.seed for one in each] == [0, 1, 2, 3]
    assert [one.disagrees for one in each] == [False, True, True, False]


def test_a_picture_that_says_nothing_is_what_the_list_or_its_name_says(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    assert [(one.seed, one.prompt) for one in identity(tmp_path)] == [(0, None), (1, None)]
    entries = [{"file": "000000.png", "seed": 9, "prompt": "fox"}, {"file": "000001.png"}]
    (tmp_path / "samples.json").write_text(json.dumps({"images": entries}))
    assert [(one.seed, one.prompt) for one in identity(tmp_path)] == [(9, "fox"), (1, None)]
    assert not any(one.disagrees for one in identity(tmp_path))


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_pictures(tmp_path / "none")
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images in"):
        find_pictures(tmp_path)
    fill(tmp_path, 1)
    with pytest.raises(ValueError, match=r"whose names match \*\.jpg"):
        find_pictures(tmp_path, "*.jpg")
    for text in ("[]", "{}", '{"images": [1]}', '{"images": [{"file": 3}]}', "{"):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(ValueError, match=r"samples\.json"):
            find_pictures(tmp_path)
