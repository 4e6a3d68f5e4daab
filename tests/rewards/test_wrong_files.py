"""Whatever lies where a reward's weights should be, the error is one line that names it."""

from pathlib import Path

import pytest
import torch

from rewards.registry import Setup, load_rewards

FILES = ("hps", "clip", "aesthetic", "imagereward", "mps", "pickscore")


def junk(path: Path) -> None:
    path.write_bytes(b"no weights at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    torch.save({"of.another.network": torch.zeros(3)}, path)


def numbers(path: Path) -> None:
    torch.save([1, 2, 3], path)


def cut(path: Path) -> None:
    other(path)
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("write", [junk, empty, other, numbers, cut], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_an_error_of_one_line(name: str, write: object, tmp_path: Path) -> None:
    assert callable(write)
    path = tmp_path / "weights.pt"
    write(path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    needed = {"imagereward": ("bert",), "aesthetic": ("clip",)}.get(name, ())
    paths = {name: path} | {n: tmp_path if n == "bert" else path for n in needed}
    with pytest.raises(ValueError, match=r"weights\.pt") as error:
        load_rewards([name], Setup(paths=paths))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_path_that_is_not_there_is_told_before_anything_is_loaded(
    name: str, tmp_path: Path
) -> None:
    paths = dict.fromkeys(("bert", "clip", name), tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"no such file or folder: .*none\.pt$"):
        load_rewards([name], Setup(paths=paths))
