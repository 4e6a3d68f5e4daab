"""The EDM backend: preconditioning, dtypes, class labels, folders and NVIDIA's pickles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, save
from torch import Tensor, nn

from backends import edm
from backends.edm import EDMNetwork, class_condition, load_edm, save_edm
from solvers.field import Condition
from tests import nvidia
from tests.backends.edm_twins import TINY_ADM, TINY_NCSN, TINY_SONG, twin, wave

SIGMA = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
KINDS = pytest.mark.parametrize(
    "arguments", [TINY_SONG, TINY_NCSN, TINY_ADM], ids=["song", "ncsn", "adm"]
)


def denoise(network: EDMNetwork, dtype: torch.dtype = torch.float32) -> Tensor:
    x = wave(2, network.img_channels, 8, 8).to(dtype)
    sigma = torch.tensor([0.3, 5.0], dtype=dtype)
    return network(x, sigma, class_condition(torch.tensor([0, 2]), 3))


# --- preconditioning and the denoiser -----------------------------------------------------------


def test_edm_keeps_the_input_and_the_target_of_the_network_at_unit_variance() -> None:
    scaling = edm.EDMPrecond(sigma_data=0.7)(SIGMA)
    total = SIGMA**2 + 0.7**2
    torch.testing.assert_close(scaling.into**2 * total, torch.ones_like(SIGMA))
    variance = (1 - scaling.skip) ** 2 * 0.7**2 + scaling.skip**2 * SIGMA**2
    torch.testing.assert_close(variance / scaling.out**2, torch.ones_like(SIGMA))
    torch.testing.assert_close(scaling.noise, SIGMA.log() / 4)


def test_vp_and_ve_tell_the_network_the_times_of_their_sdes() -> None:
    t = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    vp = edm.VPPrecond()(torch.sqrt(torch.exp(19.9 * t**2 / 2 + 0.1 * t) - 1))
    torch.testing.assert_close(vp.noise, 999 * t)
    torch.testing.assert_close(vp.into, torch.exp(-19.9 * t**2 / 4 - 0.05 * t))
    assert edm.VPPrecond().sigma_min == pytest.approx(1.00025e-3, rel=1e-3)
    assert edm.VPPrecond().sigma_max == pytest.approx(152.17, rel=1e-3)
    ve = edm.VEPrecond()(SIGMA)
    torch.testing.assert_close(ve.noise, torch.log(SIGMA / 2))


@KINDS
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)],
    ids=["float64", "float16", "bfloat16"],
)
@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
def test_a_network_in_another_dtype_agrees_to_its_precision(
    precond: str, dtype: torch.dtype, tolerance: float, arguments: dict[str, Any]
) -> None:
    network = twin(precond, arguments)
    exact = denoise(network)
    noise, labels = torch.tensor([3.21, 987.6]), torch.eye(3)[:2]
    embedded = network.model.embed(noise, labels, None)
    got = denoise(network.cast(dtype))
    assert network.dtype == dtype
    assert got.dtype == torch.float32
    assert (got - exact).norm() / exact.norm() < tolerance
    if dtype != torch.float64:  # the noise embedding keeps its precision
        assert torch.equal(network.model.embed(noise, labels, None), embedded)
    assert denoise(network, dtype).dtype == dtype


def test_no_class_is_the_null_of_guidance_and_one_level_is_that_of_all() -> None:
    network, x, sigma = twin("edm", TINY_SONG), wave(2, 1, 8, 8), torch.tensor([0.3, 5.0])
    cond = class_condition(torch.tensor([0, 2]), 3)
    assert cond is not None
    assert cond.null is not None
    assert torch.equal(network(x, sigma), network(x, sigma, Condition(cond.null)))
    assert not torch.equal(network(x, sigma), network(x, sigma, cond))
    assert torch.equal(network(x, torch.tensor(0.5)), network(x, torch.tensor([0.5, 0.5])))


def test_classes_labels_and_images_that_do_not_fit_are_refused() -> None:
    network = twin("edm", TINY_SONG)
    for bad in (3, -1, 100):
        with pytest.raises(ValueError, match=f"class {bad} is out of range; choose 0 to 2"):
            class_condition(torch.tensor([0, bad]), 3)
    with pytest.raises(ValueError, match="takes no classes"):
        class_condition(torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"class_labels are \[2, 4\], the network takes \[2, 3\]"):
        network(wave(2, 1, 8, 8), torch.ones(2), class_condition(torch.tensor([0, 3]), 4))
    with pytest.raises(ValueError, match=r"x is \[2, 3, 8, 8\], but the network takes \[B, 1"):
        network(wave(2, 3, 8, 8), torch.ones(2))


# --- folders of ours ------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
def test_a_saved_network_comes_back_bit_by_bit(
    tmp_path: Path, precond: str, arguments: dict[str, Any]
) -> None:
    network = twin(precond, arguments)
    save_edm(tmp_path / "net", network)
    again = load_edm(tmp_path / "net")
    assert again.arguments == network.arguments
    assert again.precond == network.precond
    assert torch.equal(denoise(again), denoise(network))
    assert not any(p.requires_grad for p in again.parameters())


def change_config(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_tensors(path: Path, **entries: Tensor | None) -> None:
    state = {**load(path.read_bytes()), **entries}
    path.write_bytes(save({k: v for k, v in state.items() if v is not None}))


BIAS = "model.map_layer0.bias"
NAN = torch.full((32,), float("nan"))
BREAKS = {
    "no config": (lambda c, _: c.unlink(), "cannot read config.json"),
    "no weights": (lambda _, w: w.unlink(), "cannot read model.safetensors"),
    "no json": (lambda c, _: c.write_text("{"), "config.json is not JSON"),
    "bytes": (lambda c, _: c.write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "a list": (lambda c, _: c.write_text("[]"), "not a network of format 1"),
    "format": (lambda c, _: change_config(c, format=9), "of format 1"),
    "class": (lambda c, _: change_config(c, **{"class": "X"}), "unknown precond.* 'X'"),
    "arguments": (lambda c, _: change_config(c, arguments={}), "needs img_resol"),
    "truncated": (lambda _, w: w.write_bytes(w.read_bytes()[:-9]), "not a safetensors file"),
    "missing": (lambda _, w: change_tensors(w, **{BIAS: None}), f"lacks {BIAS}, for a EDMPrecond"),
    "foreign": (lambda _, w: change_tensors(w, extra=torch.ones(1)), "has a foreign extra"),
    "shape": (
        lambda _, w: change_tensors(w, **{BIAS: torch.zeros(3)}),
        rf"{BIAS} is \[3\] in the file, must be \[32\]",
    ),
    "nan": (lambda _, w: change_tensors(w, **{BIAS: NAN}), f"{BIAS} holds values that are no fin"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    save_edm(tmp_path, twin("edm", TINY_SONG))
    spoil, message = BREAKS[name]
    spoil(tmp_path / "config.json", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_edm(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# --- NVIDIA's pickles -------------------------------------------------------------------------


def as_nvidia(module: nn.Module, name: str = "", *args: Any, **kwargs: Any) -> nn.Module:
    """The same module of classes that are persistent as NVIDIA's are; containers are torch's."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({k: as_nvidia(child) for k, child in module.items()})

    class Copy(nn.Module):
        def __init__(self, *_args: Any, **_kwargs: Any) -> None:
            super().__init__()

    Copy.__name__ = name or type(module).__name__
    copy, kept = nvidia.persistent(Copy)(*args, **kwargs), module.state_dict()
    for key, value in module.named_parameters(recurse=False):
        copy.register_parameter(key, nn.Parameter(value.detach()))
    for key, value in module.named_buffers(recurse=False):
        if key in kept:
            copy.register_buffer(key, value)
    for key, child in module.named_children():
        kind = module.arguments["model_type"] if isinstance(module, EDMNetwork) else ""
        copy.add_module(key, as_nvidia(child, kind))
    return copy


@nvidia.persistent
class AugmentPipe(nn.Module):
    """What training snapshots carry beside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("Hz_geom", torch.ones(3))
        self.p = 0.12


def snapshot(network: EDMNetwork, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The content of a published file: the network and its neighbours."""
    return {
        "ema": as_nvidia(network, network.class_name, *args, **kwargs),
        "loss_fn": nvidia.EPD_loss(P_mean=-1.2, sigma_data=0.5),
        "augment_pipe": AugmentPipe(),
        "optimizer": torch.optim.Adam(network.parameters()),
        "dataset_kwargs": {"path": "data.zip", "use_labels": True, "resolution": 8},
    }


def written(folder: Path, content: Any, **options: Any) -> Path:
    path = folder / "net.pkl"
    path.write_bytes(nvidia.dumps(content, **options))
    return path


PICKLED = [
    *((TINY_SONG, "edm", protocol, "cpu") for protocol in (2, 3, 5)),
    *((arguments, "vp", 4, "cuda:0") for arguments in (TINY_SONG, TINY_NCSN, TINY_ADM)),
    *((arguments, "ve", 4, "cpu") for arguments in (TINY_NCSN, TINY_ADM)),
]


@pytest.mark.parametrize(("arguments", "precond", "protocol", "device"), PICKLED)
def test_a_network_pickle_loads_with_its_numbers(
    tmp_path: Path, arguments: dict[str, Any], precond: str, protocol: int, device: str
) -> None:
    network = twin(precond, arguments)
    content = snapshot(network, **arguments)
    again = load_edm(written(tmp_path, content, protocol=protocol, device=device))
    assert torch.equal(denoise(again), denoise(network))
    assert (again.class_name, again.arguments) == (network.class_name, network.arguments)


def test_arguments_by_position_defaults_and_half_weights_are_understood(tmp_path: Path) -> None:
    arguments = {**TINY_SONG, "beta_d": 10.0, "use_fp16": True}
    network = twin("vp", arguments)
    outer = ("img_resolution", "img_channels", "label_dim", "use_fp16", "beta_d")
    rest = {k: v for k, v in arguments.items() if k not in (*outer, "model_type")}
    path = written(tmp_path, snapshot(network, *(arguments[k] for k in outer), **rest))
    assert load_edm(path).precond == network.precond
    assert torch.equal(denoise(load_edm(path)), denoise(network))
    endless = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}
    network = twin("edm", TINY_SONG)
    for p in network.parameters():
        p.data = p.data.half()
    again = load_edm(written(tmp_path, snapshot(network, **TINY_SONG, **endless)))
    assert (again.dtype, again.sigma_max) == (torch.float32, float("inf"))
    assert torch.equal(denoise(again), denoise(network.cast(torch.float32)))


def spoiled(name: str, value: object) -> dict[str, Any]:
    """A snapshot with another entry in the state of its network."""
    model = as_nvidia(twin("edm", TINY_SONG), "EDMPrecond", **TINY_SONG)
    vars(model)[name] = value
    return {"ema": model}


KWARGS, SONG = "_init_kwargs", TINY_SONG
CASES = {
    "unknown class": (
        lambda: {"ema": as_nvidia(twin("edm", SONG), "iDDPMPrecond")},
        "class 'iDDPMPrecond'; known: EDMPrecond",
    ),
    "no ema": (lambda: {"net": 1}, 'no network under "ema"'),
    "a list": (lambda: [1, 2], 'no network under "ema"'),
    "a number": (lambda: {"ema": 1}, 'no network under "ema"'),
    "no modules": (lambda: spoiled("_modules", {}), "lacks model.dec"),
    "odd modules": (lambda: spoiled("_modules", 3), "lacks model.dec"),
    "odd child": (lambda: spoiled("_modules", {"model": 3}), "lacks model.dec"),
    "odd init": (lambda: spoiled(KWARGS, 3), "does not tell its init arguments"),
    "no init": (lambda: spoiled(KWARGS, {}), "needs img_resolution, img_channels"),
    "long init": (lambda: spoiled("_init_args", (1,) * 20), "takes 8 arguments by position"),
    "size": (lambda: spoiled(KWARGS, {**SONG, "model_channels": 16}), "in the file, must be"),
    "huge": (lambda: spoiled(KWARGS, {**SONG, "model_channels": 1 << 20}), "from 1 to 65536"),
    "deep": (lambda: spoiled(KWARGS, {**SONG, "num_blocks": 9999}), "num_blocks must be a whole"),
    "odd argument": (lambda: spoiled(KWARGS, {**SONG, "hue": 1}), "takes no argument 'hue'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_without_our_kind_of_network_is_one_line_that_says_why(
    tmp_path: Path, name: str
) -> None:
    make, message = CASES[name]
    path = written(tmp_path, make())
    with pytest.raises(ValueError, match=message) as caught:
        load_edm(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# --- the command ------------------------------------------------------------------------------


def test_the_command_converts_a_pickle_to_a_folder_without_loss(tmp_path: Path) -> None:
    network = twin("vp", TINY_SONG)
    source = written(tmp_path, snapshot(network, **TINY_SONG))
    runner = CliRunner()
    result = runner.invoke(edm.main, ["convert", str(source), str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    assert torch.equal(denoise(load_edm(tmp_path / "one")), denoise(network))
    for paths, words in ((("no.pkl", "out"), "no network at"), (("one", "two.pkl"), "only read")):
        result = runner.invoke(edm.main, ["convert", *(str(tmp_path / path) for path in paths)])
        assert result.exit_code == 1
        assert words in result.output
        assert result.output.count("\n") == 1
