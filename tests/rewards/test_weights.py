"""The table of weights, where they are looked for, what is wrong with files, and the doctor."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from rewards import weights as doctor
from rewards.registry import Setup, load_rewards
from rewards.weights import (
    WEIGHTS,
    broken,
    find,
    places,
    require,
    variable,
)


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine are seen."""
    for name in WEIGHTS:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rewards.weights.packaged", lambda _: [])


def saved(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"a": torch.arange(1000.0)}, path)
    return path


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file({"a": torch.arange(9.0)}, path / "model.safetensors")
    return path


def in_hub_cache(repo: str, *files: str) -> Path:
    """Files as the hub's own cache has them."""
    root = Path("cache") / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    for name in files:
        path = root / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        if path.suffix == ".safetensors":
            save_file({"a": torch.zeros(1)}, path)
    return root.absolute() / "snapshots" / ("0" * 40)


# --- where they are ---------------------------------------------------------------------------


def test_they_are_where_the_published_readme_and_other_packages_put_them(tmp_path: Path) -> None:
    for name, at in (
        ("hps", "weights/HPS_v2.1_compressed.pt"),
        ("pickscore", "weights/PickScore_v1"),
        ("imagereward", ".cache/ImageReward/ImageReward.pt"),
        ("clip", "weights/clip/ViT-L-14.pt"),
        ("edm-cifar10", "src/cifar10/edm-cifar10-32x32-uncond-vp.pkl"),
        ("sd15", "src/ms_coco/v1-5-pruned-emaonly.ckpt"),
    ):
        assert find(name) is None
        path = tmp_path / at
        (saved if path.suffix else folder)(path)
        if path.suffix == ".pkl":
            path.write_bytes(b"\x80\x04N.")
        where = find(name)
        assert where is not None
        assert where.absolute() == path


def test_the_hubs_cache_has_files_folders_and_pipelines(tmp_path: Path) -> None:
    sd15 = in_hub_cache(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "model_index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    assert find("sd15") == sd15
    clip = in_hub_cache("openai/clip-vit-large-patch14", "config.json", "model.safetensors")
    assert find("clip") == clip
    assert find("bert") is None
    assert find("bert", {"bert": tmp_path}) == tmp_path


def test_what_a_command_says_goes_before_the_environment_and_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, second = saved(places("hps")[0]), saved(places("hps")[1])
    assert find("hps") == default
    default.write_bytes(b"")
    assert find("hps") == second  # of two places the one that is whole
    by_variable = saved(tmp_path / "v" / "HPS_v2.1_compressed.pt")
    monkeypatch.setenv("EPD_HPS", str(by_variable.parent))
    assert find("hps") == by_variable
    given = saved(tmp_path / "t.pt")
    assert find("hps", {"hps": given}) == given


# --- what is wrong with them ------------------------------------------------------------------


def without_its_end(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"a": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", b"", "empty"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", "LFS"),
        ("a.pt", b"<!DOCTYPE html><html>", "web page"),
        ("a.pkl", b"\x80\x04N", "cut short"),
        ("a.pt", None, "cut short"),
        ("a.safetensors", None, "cut short"),
    ],
)
def test_what_is_no_whole_file_is_said(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    without_its_end(path) if content is None else path.write_bytes(content)
    assert words in broken(path)
    with pytest.raises(ValueError, match=words):
        require(["hps"], {"hps": path})
    (tmp_path / "config.json").write_text("{}")
    assert f"{name}: " in broken(tmp_path)


def test_all_that_is_missing_is_named_with_size_source_option_and_places() -> None:
    words = (
        r"^missing weights: hps: HPS v2\.1.*4 GB.*launch\.sh weights hps.*--weights hps=PATH"
        r".*EPD_HPS.*weights/hps/HPS_v2\.1_compressed\.pt, .*hub's cache\); mps: .*Kwai-Kolors"
    )
    with pytest.raises(ValueError, match=words) as error:
        load_rewards(["multi:hps=1,mps=1,aesthetic=0"])
    assert "aesthetic" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hps", "imagereward", "pickscore"])
def test_whatever_a_file_is_the_error_is_a_line_that_names_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    for content in (b"no weights at all", {"of.another.network": torch.zeros(3)}, [1, 2, 3]):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=r"weights\.pt") as error:
            load_rewards([name], Setup(paths={"bert": tmp_path, "clip": path, name: path}))
        assert "\n" not in str(error.value)


def test_wrong_names_and_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hps: no such file or folder: .*none"):
        find("hps", {"hps": tmp_path / "none"})
    with pytest.raises(ValueError, match="no weights 'hsp': did you mean hps"):
        require([], {"hsp": "x"})


# --- the doctor -------------------------------------------------------------------------------


def test_the_doctor_says_what_is_found_missing_and_wrong_and_every_place() -> None:
    assert CliRunner().invoke(doctor.main).exit_code == 0
    saved(places("hps")[0])
    places("imagereward")[0].parent.mkdir()
    places("imagereward")[0].write_bytes(b"<html>")
    result = CliRunner().invoke(doctor.main)
    lines = {line.split()[0]: line for line in result.output.splitlines() if line[:2] == "  "}
    verdicts = {name: lines[name].split()[1] for name in WEIGHTS}
    assert [verdicts[name] for name in ("hps", "imagereward", "clip")] == [
        "found",
        "wrong",
        "missing",
    ]
    assert all(str(path) in lines["clip"] for path in places("clip"))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == f"Error: 1 of {len(WEIGHTS)} are wrong: see above"

    save_file({"a": torch.zeros(3)}, places("sd15")[0])
    assert doctor.examine("sd15")[0] == "found"
    assert "not that of the published file" in doctor.examine("sd15", thoroughly=True)[1]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read")
def test_a_file_that_cannot_be_read_is_wrong_and_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EPD_IMAGEREWARD", "/proc/self/mem")
    result = CliRunner().invoke(doctor.main)
    lines = {
        line.split()[0]: line.split()[1] for line in result.output.splitlines() if line[:1] == " "
    }
    assert lines["imagereward"] == "wrong"
    assert lines.keys() >= WEIGHTS.keys()
