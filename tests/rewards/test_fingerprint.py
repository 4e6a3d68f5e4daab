"""What scores are kept under changes with all that they hang on."""

import os
from pathlib import Path

import pytest

from rewards.fingerprint import fingerprint, sources
from rewards.registry import Setup


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a reward of one's own: a package, a helper, a lazy import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "helper.py").write_text("SCALE = 1.0\n")
    (tmp_path / "late.py").write_text("A = 1\n")
    (tmp_path / "mine" / "score.py").write_text(
        "import torch\nfrom .helper import SCALE\n\ndef f(images, prompts):\n"
        "    import late\n    return images.mean((1, 2, 3)) * SCALE * late.A\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "file", ["mine/score.py", "mine/helper.py", "mine/__init__.py", "late.py"]
)
def test_an_edit_of_any_file_of_ones_own_function_changes_it(own: Path, file: str) -> None:
    before = fingerprint("mine.score:f")
    assert fingerprint("mine.score:f") == before
    (own / file).write_text((own / file).read_text() + "# edited\n")
    assert fingerprint("mine.score:f") != before
    assert fingerprint("multi:mine.score:f=2") not in ("", before)


@pytest.mark.usefixtures("own")
def test_what_is_installed_is_left_out() -> None:
    assert set(sources("mine.score")) == {"mine", "mine.score", "mine.helper", "late"}
    assert {"rewards.clip", "rewards.pixels"} <= set(sources("rewards.clip"))
    assert not any(name.startswith("torch") for name in sources("rewards.clip"))


def test_other_weights_and_half_precision_change_it(tmp_path: Path) -> None:
    path = tmp_path / "hps.pt"
    path.write_bytes(b"one")
    setup = Setup(paths={"hps": path})
    before = fingerprint("hps", setup)
    assert fingerprint("hps", Setup(amp=True, paths=setup.paths)) != before
    os.utime(path, ns=(1, 1))
    assert fingerprint("hps", setup) != before
