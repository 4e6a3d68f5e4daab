"""Where the model of a predictor is found."""

from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import Backend
from backends.load import backbone_of, check_fit, load_backend, places_of, published_model
from solvers.predictor import find_predictor, load_predictor
from solvers.recipe import Recipe


def recipe(name: str) -> Recipe:
    return load_predictor(find_predictor(name)).recipe


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EPD_SD15", "EPD_SD3", "EPD_FLUX", "EPD_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False
    )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("cifar10-5nfe", "src/cifar10/edm-cifar10-32x32-uncond-vp.pkl"),
        ("ffhq-3nfe", "src/ffhq/a-network-of-my-own.pkl"),
        ("imagenet64-7nfe", "weights/edm-imagenet-64x64-cond-adm.pkl"),
        ("lsun-bedroom-5nfe", "src/lsun_bedroom_ldm/model.ckpt"),
        ("sd15-best", "src/ms_coco/v1-5-pruned-emaonly.ckpt"),
        ("sd15-best", "weights/v1-5-pruned-emaonly.safetensors"),
        ("sd3-512-best", "weights/stable-diffusion-3-medium-diffusers"),
        ("flux-best", "weights/FLUX.1-dev"),
    ],
)
def test_a_published_model_is_found_where_its_readme_puts_it(
    name: str, place: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give its folder or file with --model"):
        backbone_of(recipe(name), tmp_path)
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.touch()
    assert backbone_of(recipe(name), tmp_path) == str(file)


def test_a_variable_goes_first_and_the_hubs_cache_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    snapshot = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (snapshot / "snapshots" / "1").mkdir(parents=True)
    (snapshot / "snapshots" / "1" / "model_index.json").write_text("{}")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("1")
    assert backbone_of(recipe("sd15-best"), tmp_path) == name
    monkeypatch.setenv("EPD_SD15", str(tmp_path))
    assert backbone_of(recipe("sd15-best"), tmp_path) == str(tmp_path)


def test_what_is_nowhere_is_named_with_its_source_and_the_places(tmp_path: Path) -> None:
    for name, words in {
        "sd3-512-best": "15.5 GB",
        "cifar10-5nfe": "nvlabs-fi-cdn.nvidia.com",
        "lsun-bedroom-5nfe": "ommer-lab.com",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            backbone_of(recipe(name), tmp_path)
        assert all(place in str(error.value) for place in places_of(recipe(name), tmp_path))
    own = replace(recipe("epd-k2-6nfe"), dataset_name="mine", training={"model": "/none/mine"})
    with pytest.raises(ValueError, match=r"for /none/mine .sd3.; give"):
        backbone_of(own, tmp_path)


def test_a_published_data_set_is_its_model_where_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name in the current one is no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(ValueError, match=r"no model of cifar10 at .*weights.*; give --model"):
        published_model("cifar10")
    file = tmp_path / "weights" / "edm-cifar10-32x32-uncond-vp.pkl"
    file.parent.mkdir()
    file.touch()
    assert published_model("cifar10") == backbone_of(recipe("cifar10-5nfe")) == str(file)
    assert published_model("mine") == "mine"


def test_a_predictor_of_another_family_is_refused() -> None:
    backend: Backend = load_backend("fashion-mnist-32")
    check_fit(recipe("cifar10-5nfe"), backend)
    with pytest.raises(ValueError, match=r"for sd3 .tiny-sd3., the model is of edm"):
        check_fit(recipe("epd-k2-6nfe"), backend)
