"""FID's Inception: its files, its resize, and the features of torchvision's, once changed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as theirs

from eval.inception import SIZE, load_inception, resized
from eval.inception_network import Inception
from src.images import to_bytes


@cache
def drawn() -> dict[str, Tensor]:
    """Tensors of the published names and shapes, that keep the size of what goes through."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Inception().state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("conv.weight"):
            scale = (2 / shape[1:].numel()) ** 0.5
            found[name] = torch.randn(shape, generator=generator) * scale
        elif "num_batches" not in name:
            middle = 1.0 if name.endswith(("weight", "var")) else 0.0
            found[name] = middle + 0.1 * torch.rand(shape, generator=generator)
    return found | {"fc.weight": torch.zeros(1008, SIZE), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(drawn(), path)
    return path


def images(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def torchvisions(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Its Inception with the pools of the TensorFlow graph, and the drawn tensors."""
    network = theirs.Inception3(1008, aux_logits=False, init_weights=False).eval()
    network.load_state_dict(drawn(), strict=False)
    network.register_module("fc", nn.Identity())
    mean = F.avg_pool2d
    last = {"now": False}
    network.Mixed_7c.register_forward_pre_hook(lambda *_: last.update(now=True))

    def pool(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        if last["now"]:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return mean(x, kernel_size, stride, padding, count_include_pad=False)

    monkeypatch.setattr(theirs.F, "avg_pool2d", pool)
    return network


def test_the_features_are_torchvisions_with_the_pools_of_the_graph(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = images(1)
    found = load_inception(weights)(given)
    with torch.no_grad():
        ready = (resized(to_bytes(given).float()) - 128) / 128
        expected = torchvisions(monkeypatch)(ready)
    assert found.shape == (1, SIZE)
    assert found.std() > 0.01
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_published_file_has_just_these_tensors() -> None:
    network = theirs.Inception3(1008, aux_logits=False, init_weights=False)
    expected = {n: t.shape for n, t in network.state_dict().items() if "num_batches" not in n}
    assert {n: t.shape for n, t in drawn().items()} == expected


def test_a_picture_of_all_shades_resizes_as_in_tensorflow_1() -> None:
    """Pixel i of 299 lies at i H / 299 of H, and beyond the last there is the last."""
    ramp = torch.arange(10.0)[None, None, None].expand(1, 3, 7, 10)
    expected = (torch.arange(299) * (10 / 299)).clamp(max=9)
    found = resized(ramp)
    assert found.shape == (1, 3, 299, 299)
    assert torch.allclose(found[0, 0, 5], expected, atol=1e-4)


def test_the_resize_is_that_of_nvidias_network() -> None:
    """Which samples a grid shifted by half a pixel of both."""
    given = images(2, 20)[..., :13] * 255
    theta = torch.eye(2, 3)
    theta[0, 2] += 1 / 13 - 1 / 299
    theta[1, 2] += 1 / 20 - 1 / 299
    lattice = F.affine_grid(theta[None].repeat(2, 1, 1), [2, 3, 299, 299], align_corners=False)
    expected = F.grid_sample(given, lattice, padding_mode="border", align_corners=False)
    assert torch.allclose(resized(given), expected, atol=0.01)


def test_features_are_of_bytes_and_of_one_image_alone(weights: Path) -> None:
    network, given = load_inception(weights), images(2)
    together = network(given)
    assert torch.equal(together, network(to_bytes(given) / 255))
    assert torch.allclose(together[1:], network(given[1:]), rtol=1e-4, atol=1e-5)


def test_grey_images_are_repeated_to_three_channels(weights: Path) -> None:
    network, grey = load_inception(weights), images(1)[:, :1]
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert network(grey[:0]).shape == (0, SIZE)
    with pytest.raises(ValueError, match="1 or 3"):
        network(torch.zeros(1, 4, 8, 8))


class Script(nn.Module):
    """A network as NVIDIA's: bytes in, features where they are asked for."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        means = img.to(torch.float32).mean((2, 3))
        return means.repeat(1, 683)[:, :2048] if return_features else means


class Other(nn.Module):
    """A network of another kind."""

    def forward(self, img: Tensor) -> Tensor:
        return img.to(torch.float32).mean((2, 3))


def scripted(network: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(network), path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_file_serves(tmp_path: Path) -> None:
    network = load_inception(scripted(Script(), tmp_path / "inception-2015-12-05.pt"))
    given = images(3)
    expected = to_bytes(given).float().mean((2, 3))
    assert torch.allclose(network(given)[:, :3], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_another_torchscript_is_refused(tmp_path: Path) -> None:
    network = load_inception(scripted(Other(), tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="is not the Inception network") as error:
        network(images(1))
    assert "\n" not in str(error.value)


def damaged(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    content = dict(drawn())
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s.pop("Mixed_7c.branch1x1.conv.weight"),
            r"1 missing \(Mixed_7c.branch1x1.conv.weight",
        ),
        (
            lambda s: s.update({"Conv2d_1a_3x3.bn.bias": torch.zeros(3)}),
            r"\(Conv2d_1a_3x3.bn.bias \[3\], not",
        ),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, SIZE)}), "knows 1000 classes"),
        (lambda s: s.update({"AuxLogits.fc.bias2": torch.zeros(3)}), r"1 not known \(AuxLogits"),
    ],
)
def test_wrong_tensors_are_named(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    torch.save(damaged(change), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=said):
        load_inception(tmp_path / "w.pth")


def test_files_of_the_old_format_and_with_counters_serve(weights: Path, tmp_path: Path) -> None:
    counted = drawn() | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}
    torch.save(counted, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    given = images(1)
    assert torch.equal(load_inception(tmp_path / "w.pth")(given), load_inception(weights)(given))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 broken"])
def test_a_broken_or_missing_file_is_an_error_of_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no file of weights") as error:
        load_inception(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no Inception weights at"):
        load_inception(tmp_path / "none.pth")
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="not tensors by name"):
        load_inception(path)
