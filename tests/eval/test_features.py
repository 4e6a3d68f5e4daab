"""Feature spaces: torch-fidelity's Inception from a local file, CLIP, DINOv2, one's own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
import transformers as library
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.inception import Inception3

from eval.features import EFFICIENTNET, load_space
from eval.fid import main
from rewards.clip import load_towers
from rewards.efficientnet import load_features
from src.images import read_png, to_bytes
from tests.eval.drawings import fill
from tests.rewards.networks import shaken, write_open_clip_folder

transformers: Any = library
CPU = torch.device("cpu")


def drawn() -> dict[str, Tensor]:
    """Tensors of the published names and shapes, that keep the size of what goes through."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in shapes.items():
        if name.endswith("conv.weight"):
            scale = (2 / tensor.shape[1:].numel()) ** 0.5
            state[name] = torch.randn(tensor.shape, generator=generator) * scale
        elif "num_batches" not in name:
            middle = 1.0 if name.endswith(("weight", "var")) else 0.0
            state[name] = middle + 0.1 * torch.rand(tensor.shape, generator=generator)
    return state


def images(count: int, height: int = 32, width: int = 27) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_number_is_torch_fidelitys(tmp_path: Path) -> None:
    """Of two folders of PNGs, its command beside ours."""
    weights = tmp_path / "pt_inception.pth"
    torch.save(drawn(), weights)
    a, b = fill(tmp_path / "a", 3), fill(tmp_path / "b", 3, 100)  # it takes one size alone
    theirs = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), fid=True, cuda=False, verbose=False, cache=False,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True,
    )  # fmt: skip
    options = ["calc", "--images", a, "--ref", b, "--weights", weights, "--device", "cpu"]
    options += ["--out", tmp_path / "out.json"]
    done = CliRunner().invoke(main, [*map(str, options)])
    assert done.exit_code == 0, done.output
    ours = json.loads((tmp_path / "out.json").read_text())["fid"]
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


class Script(nn.Module):
    """A network as NVIDIA's: levels in, features where they are asked for."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        means = img.to(torch.float32).mean((2, 3))
        return means.repeat(1, 683)[:, :2048] if return_features else means


class Other(nn.Module):
    """A network of another kind."""

    def forward(self, img: Tensor) -> Tensor:
        return img.to(torch.float32).mean((2, 3))


class Saving(nn.Module):
    """A network that writes a file."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        torch.save([img], self.place)
        return img.to(torch.float32).mean((2, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_nvidias_torchscript_serves_and_another_is_refused(tmp_path: Path) -> None:
    for network in (Script(), Other()):
        torch.jit.save(torch.jit.script(network), tmp_path / f"{type(network).__name__}.pt")
    given = images(3)
    features = load_space("inception", CPU, tmp_path / "Script.pt")(given)
    assert torch.allclose(features[:, :3], to_bytes(given).float().mean((2, 3)))
    with pytest.raises(ValueError, match="is not the Inception network"):
        load_space("inception", CPU, tmp_path / "Other.pt")(given)
    torch.jit.save(torch.jit.script(Saving(str(tmp_path / "mark"))), tmp_path / "Saving.pt")
    with pytest.raises(ValueError, match=r"Saving.pt is refused: its code asks for torch\.save"):
        load_space("inception", CPU, tmp_path / "Saving.pt")(given)


def test_other_files_of_weights_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    hostile, few, text = (tmp_path / n for n in ("hostile.pth", "few.pth", "text.pth"))
    mark = tmp_path / "mark"
    hostile.write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, few)
    text.write_text("nothing")
    for path in (hostile, few, text):
        with pytest.raises(ValueError, match=path.name) as error:
            load_space("inception", CPU, path)
        assert "\n" not in str(error.value)
    assert not mark.exists()


def test_efficientnet_sees_what_the_reward_sees() -> None:
    given = to_bytes(images(3)).float() / 255
    space = load_space("efficientnet", CPU)
    assert space.about == EFFICIENTNET
    assert torch.allclose(space(given), load_features("cpu")(given), atol=1e-5)


def test_clip_features_are_its_image_embeddings(tmp_path: Path) -> None:
    """Of the model that the reward clip loads; other weights are another version."""
    folder = write_open_clip_folder(tmp_path / "clip")
    space, (given, _) = load_space("clip", CPU, folder), read_png(fill(tmp_path, 1) / "000000.png")
    expected = load_towers(folder, CPU, False).images(given[None])
    assert torch.allclose(space(given[None]), expected, atol=1e-5)
    assert "of length 1 [16], input 32x32" in space.about
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3f")
    assert load_space("clip", CPU, folder).version != space.version


def test_dinov2_gives_its_class_token(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    network = transformers.Dinov2Model(config).eval()
    network.load_state_dict(shaken(network))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    space = load_space("dinov2", CPU, tmp_path)
    given = torch.full((1, 3, 224, 224), 0.2)
    given[:, 1:] = 0.6
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        ready = (given - mean[:, None, None]) / std[:, None, None]
        expected = network(ready).last_hidden_state[:, 0]
    assert torch.allclose(space(given), expected, atol=1e-4)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="its model_type is not dinov2"):
        load_space("dinov2", CPU, tmp_path)


def test_spaces_that_there_are_not_and_features_of_another_shape_are_refused(
    tmp_path: Path,
) -> None:
    names = {"inceptoin": "did you mean inception", "fashion-judge": "is of no use"}
    names |= {"tests.eval.drawings:none": "cannot be imported"}
    for name, words in (names | {"tests.eval.drawings:CHEAP": "is no function"}).items():
        with pytest.raises(ValueError, match=words):
            load_space(name, CPU, tmp_path if name == "fashion-judge" else None)
    space = load_space("tests.eval.drawings:shapeless_features", CPU)
    empty = replace(space, network=lambda images: images.flatten(1)[:, :0])
    with pytest.raises(ValueError, match=r"must return \[2, D\], not \[2, 0\]"):
        empty(images(2))
    for given, words in (
        (images(2), r"must return \[2, D\]"),
        (torch.zeros(1, 4, 8, 8), "1 or 3"),
    ):
        with pytest.raises(ValueError, match=words):
            space(given)


def test_an_edited_function_is_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "own_features.py"
    source.write_text("def f(images):\n    return images.mean((2, 3))\n")
    before = load_space("own_features:f", CPU)
    assert before(images(2)).shape == (2, 3)
    source.write_text("def f(images):\n    return images.amax((2, 3))\n")
    assert load_space("own_features:f", CPU).version != before.version
