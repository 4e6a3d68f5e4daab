"""NVIDIA's network pickles become our networks, and nothing in them runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backends.edm import EDM, load_edm
from tests import persistence_files as files
from tests.backends.edm_twins import TINY_ADM, TINY_NCSN, TINY_SONG, twin, wave


def as_nvidia(
    module: nn.Module, class_name: str, args: tuple[Any, ...] = (), **kwargs: Any
) -> files.Persistent:
    """A module as NVIDIA's persistence pickles it: children persistent, containers torch's own."""
    children: dict[str, Any] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleDict):
            inner = {k: as_nvidia(v, type(v).__name__) for k, v in child.items()}
            children[name] = files.module_dict(inner)
        else:
            children[name] = as_nvidia(child, type(child).__name__)
    kept = module.state_dict()
    state = files.module_state(
        {k: p.detach() for k, p in module.named_parameters(recurse=False)},
        children,
        {k: b for k, b in module.named_buffers(recurse=False) if k in kept},
        _init_args=args,
        _init_kwargs=kwargs,
        img_resolution=8,
    )
    return files.Persistent(class_name, state)


def snapshot(network: EDM, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The content of a published file: the network and its neighbours."""
    ema = as_nvidia(network, network.class_name, args, **kwargs)
    ema.meta["state"]["_modules"]["model"].meta["class_name"] = network.arguments["model_type"]
    return {
        "ema": ema,
        "loss_fn": files.Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}),
        "augment_pipe": files.Persistent("AugmentPipe", {"p": 0.12, "xflip": 1e8}),
        "dataset_kwargs": {"path": "data.zip", "use_labels": True, "resolution": 8},
    }


def write(path: Path, content: Any, **options: Any) -> Path:
    path.write_bytes(files.dump(content, **options))
    return path


def denoise(network: EDM) -> torch.Tensor:
    labels = torch.eye(3)[[0, 2]]
    raw = network.raw(wave(2, network.img_channels, 8, 8), torch.tensor([0.3, 5.0]), labels)
    return torch.cat(
        [raw.flatten(), network(wave(1, network.img_channels, 8, 8), torch.ones(1)).flatten()]
    )


KINDS = [
    *((TINY_SONG, "edm", protocol) for protocol in (2, 3, 4, 5)),
    *((arguments, precond, 4) for arguments in (TINY_NCSN, TINY_ADM) for precond in ("vp", "ve")),
]


@pytest.mark.parametrize(
    ("arguments", "precond", "protocol"),
    KINDS,
    ids=[f"{a['model_type']}-{p}-{n}" for a, p, n in KINDS],
)
def test_a_network_pickle_loads_with_its_numbers(
    tmp_path: Path, arguments: dict[str, Any], precond: str, protocol: int
) -> None:
    network = twin(precond, arguments)
    path = write(tmp_path / "net.pkl", snapshot(network, **arguments), protocol=protocol)
    again = load_edm(path)
    assert torch.equal(denoise(again), denoise(network))
    assert (again.class_name, again.arguments) == (network.class_name, network.arguments)


def test_a_network_saved_on_a_gpu_loads_on_the_cpu(tmp_path: Path) -> None:
    network = twin("edm", TINY_SONG)
    path = write(tmp_path / "net.pkl", snapshot(network, **TINY_SONG), device="cuda:0")
    assert torch.equal(denoise(load_edm(path)), denoise(network))


def test_arguments_by_position_are_understood(tmp_path: Path) -> None:
    arguments = {**TINY_SONG, "beta_d": 10.0, "use_fp16": True}
    network = twin("vp", arguments)
    outer = ("img_resolution", "img_channels", "label_dim", "use_fp16", "beta_d")
    rest = {k: v for k, v in arguments.items() if k not in outer}
    given = [arguments[k] for k in outer]
    path = write(tmp_path / "net.pkl", snapshot(network, *given, **rest))
    assert load_edm(path).precond == network.precond
    assert torch.equal(denoise(load_edm(path)), denoise(network))


def test_the_class_of_the_inner_network_stands_in_for_a_default(tmp_path: Path) -> None:
    network = twin("edm", TINY_SONG)
    rest = {k: v for k, v in TINY_SONG.items() if k != "model_type"}
    path = write(tmp_path / "net.pkl", snapshot(network, **rest))
    assert load_edm(path).arguments["model_type"] == "SongUNet"


def test_infinite_levels_written_out_are_the_default(tmp_path: Path) -> None:
    network = twin("edm", TINY_SONG)
    levels = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}
    path = write(tmp_path / "net.pkl", snapshot(network, **TINY_SONG, **levels))
    assert load_edm(path).sigma_max == float("inf")


def test_half_precision_weights_load(tmp_path: Path) -> None:
    network = twin("edm", TINY_SONG)
    for p in network.parameters():
        p.data = p.data.half()
    again = load_edm(write(tmp_path / "net.pkl", snapshot(network, **TINY_SONG)))
    assert again.dtype == torch.float32
    assert torch.equal(denoise(again), denoise(network.cast(torch.float32)))


def test_embedded_source_never_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    network = twin("edm", TINY_SONG)
    content = snapshot(network, **TINY_SONG)
    content["ema"].meta["module_src"] = f"open({str(mark)!r}, 'w')"
    load_edm(write(tmp_path / "net.pkl", content))
    assert not mark.exists()


def test_a_global_that_is_not_allowed_is_refused_by_name(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "net.pkl"
    path.write_bytes(
        b"\x80\x03}X\x03\x00\x00\x00emacos\nsystem\nX" + _text(f"touch {mark}") + b"\x85Rs."
    )
    with pytest.raises(ValueError, match=r"os\.system") as caught:
        load_edm(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def _text(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode()


def spoiled(**changes: Any) -> dict[str, Any]:
    """A snapshot with other entries in the state of its network."""
    content = snapshot(twin("edm", TINY_SONG), **TINY_SONG)
    content["ema"].meta["state"] |= changes
    return content


def renamed(class_name: str) -> dict[str, Any]:
    content = spoiled()
    content["ema"].meta["class_name"] = class_name
    return content


CASES = {
    "unknown-class": (lambda: renamed("iDDPMPrecond"), "class 'iDDPMPrecond'; known: EDMPrecond"),
    "no-ema": (lambda: {"net": 1}, 'no network under "ema"'),
    "a-list": (lambda: [1, 2], 'no network under "ema"'),
    "a-number": (lambda: {"ema": 1}, 'no network under "ema"'),
    "no-modules": (lambda: spoiled(_modules={}), "lacks model.dec"),
    "odd-modules": (lambda: spoiled(_modules=3), "_modules of a EDMPrecond is no dict"),
    "odd-child": (lambda: spoiled(_modules={"model": 3}), "model is no module but int"),
    "odd-parameter": (lambda: spoiled(_parameters={"x": "y"}), "x is no tensor but str"),
    "odd-init": (lambda: spoiled(_init_kwargs=3), "does not tell its init arguments"),
    "no-init": (lambda: spoiled(_init_kwargs={}), "needs img_resolution, img_channels"),
    "long-init": (lambda: spoiled(_init_args=tuple(range(20))), "takes 8 arguments by position"),
    "wrong-size": (
        lambda: spoiled(_init_kwargs={**TINY_SONG, "model_channels": 16}),
        "in the file, must be",
    ),
    "unknown-argument": (
        lambda: spoiled(_init_kwargs={**TINY_SONG, "colour": 1}),
        "takes no argument 'colour'",
    ),
    "huge": (
        lambda: spoiled(_init_kwargs={**TINY_SONG, "model_channels": 1 << 20}),
        "in the file, must be",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_without_our_kind_of_network_is_one_line_that_says_why(
    tmp_path: Path, name: str
) -> None:
    make, message = CASES[name]
    path = write(tmp_path / "net.pkl", make())
    with pytest.raises(ValueError, match=message) as caught:
        load_edm(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, 0.99])
def test_a_truncated_pickle_is_refused(tmp_path: Path, keep: float) -> None:
    data = files.dump(spoiled())
    path = tmp_path / "net.pkl"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"net\.pkl"):
        load_edm(path)
