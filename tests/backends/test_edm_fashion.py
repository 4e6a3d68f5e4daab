"""The shipped Fashion-MNIST network, and the script that trained it."""

import gzip
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from backends.edm import EDM, class_condition, load_edm
from tests.backends.edm_twins import twin

FOLDER = Path(__file__).parents[2] / "src" / "models" / "fashion-mnist-32"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fashion_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped() -> EDM:
    return load_edm(FOLDER)


def test_the_shipped_network_is_small(shipped: EDM) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8 << 20
    assert 1e6 <= sum(p.numel() for p in shipped.parameters()) <= 3e6
    assert (shipped.img_channels, shipped.img_resolution, shipped.label_dim) == (1, 32, 10)


def test_the_shipped_network_removes_noise_from_a_trouser(shipped: EDM) -> None:
    clean = -torch.ones(1, 1, 32, 32)
    clean[:, :, 4:28, 11:21] = 0.6
    clean[:, :, 10:28, 15:17] = -1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    cond = class_condition(torch.tensor([1]), 10)
    estimate = shipped(clean + 0.5 * noise, torch.tensor([0.5]), cond)
    assert (estimate - clean).square().mean() < 0.1 * (0.5 * noise).square().mean()


def test_from_pure_noise_the_classes_of_the_shipped_network_differ(shipped: EDM) -> None:
    noise = torch.randn((1, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    x = (80 * noise).expand(10, 1, 32, 32)
    means = shipped(x, torch.full((10,), 80.0), class_condition(torch.arange(10), 10))
    distances = torch.cdist(means.flatten(1), means.flatten(1)) + 99 * torch.eye(10)
    assert distances.min() > 1.5  # of 32 x 32 pixels in [-1, 1]


def write_data(folder: Path) -> Path:
    """Ten made-up images in the files of Fashion-MNIST."""
    for kind, shape in (("images-idx3", (10, 28, 28)), ("labels-idx1", (10,))):
        numel = torch.Size(shape).numel()
        values = bytes(i % (256 if len(shape) == 3 else 10) for i in range(numel))
        head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values))
    return folder


def test_images_are_padded_with_black_and_keep_their_pixels(
    script: ModuleType, tmp_path: Path
) -> None:
    images, labels = script.load_split(write_data(tmp_path), "train")
    assert images.shape == (10, 1, 32, 32)
    assert labels.tolist() == list(range(10))
    assert images[0, 0, :2].eq(-1).all()
    pixels = (images[0, 0, 2, 2:30] + 1) * 127.5
    torch.testing.assert_close(pixels, torch.arange(28.0))


def test_the_number_of_workers_does_not_change_a_gradient(script: ModuleType) -> None:
    network = twin("edm", {**script.UNET, **SMALL}).requires_grad_(True)
    plan = script.Plan(steps=1, minutes=1, batch=40, lr=1e-3, seed=0)
    images = torch.linspace(-1, 1, 40 * 64).reshape(40, 1, 8, 8)
    drawn = script.draw(images, torch.arange(40) % 10, plan, torch.Generator().manual_seed(0))
    found = []
    for workers in (1, 2):
        with ThreadPoolExecutor(workers) as pool:
            script.gradients(network, drawn, pool)
        found.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


SMALL = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_channels": 8,
    "channel_mult": [1, 1],
}


def test_every_epoch_sees_every_image_once(script: ModuleType) -> None:
    plan = script.Plan(steps=10, minutes=1, batch=2, lr=1e-3, seed=0)
    epochs = [
        [int(i) for step in range(e * 5, e * 5 + 5) for i in script.rows_of(step, 10, plan)]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_the_rate_of_learning_warms_up_and_ends_at_zero(script: ModuleType) -> None:
    plan = script.Plan(steps=10, minutes=1, batch=2, lr=1.0, seed=0, warmup=4)
    assert script.lr_at(0.0, 0, plan) == 0.25
    assert script.lr_at(0.5, 100, plan) == pytest.approx(0.5)
    assert script.lr_at(1.0, 100, plan) == 0.0


def test_a_stopped_run_goes_on_where_it_was(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "UNET", {**script.UNET, "model_channels": 8, "channel_mult": [1]})
    data, out = write_data(tmp_path), tmp_path / "run"

    def train(steps: int) -> int:
        arguments = ["--data", data, "--outdir", out, "--steps", steps, "--batch", 4]
        result = CliRunner().invoke(script.main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return torch.load(out / "checkpoint.pt", weights_only=True)["step"]

    assert train(1) == 1
    before = (out / "export" / "model.safetensors").read_bytes()
    assert train(3) == 3
    assert (out / "export" / "model.safetensors").read_bytes() != before
    assert json.loads((out / "export" / "config.json").read_text())["about"]["steps"] == 3
    assert load_edm(out / "export").label_dim == 10


def test_without_the_data_the_script_says_where_to_get_it(
    script: ModuleType, tmp_path: Path
) -> None:
    arguments = ["--data", str(tmp_path), "--outdir", str(tmp_path / "run")]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 1
    assert "apt install dataset-fashion-mnist" in result.output
