"""Preconditioning, dtypes, class labels and folders of the EDM backend."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, save
from torch import Tensor

from backends import edm
from backends.edm import (
    EDMPrecond,
    Precond,
    VEPrecond,
    VPPrecond,
    build_edm,
    class_condition,
    load_edm,
    rows,
    save_edm,
)
from tests.backends.edm_twins import TINY_ADM, TINY_NCSN, TINY_SONG, twin, wave

SIGMA = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)


def test_edm_keeps_the_input_and_the_target_of_the_network_at_unit_variance() -> None:
    scaling = EDMPrecond(sigma_data=0.7)(SIGMA)
    total = SIGMA**2 + 0.7**2
    torch.testing.assert_close(scaling.into**2 * total, torch.ones_like(SIGMA))
    variance = (1 - scaling.skip) ** 2 * 0.7**2 + scaling.skip**2 * SIGMA**2
    torch.testing.assert_close(variance / scaling.out**2, torch.ones_like(SIGMA))
    torch.testing.assert_close(scaling.noise, SIGMA.log() / 4)


def test_vp_tells_the_network_the_time_of_its_sde() -> None:
    precond = VPPrecond()
    t = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    sigma = torch.sqrt(torch.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    scaling = precond(sigma)
    torch.testing.assert_close(scaling.noise, 999 * t)
    torch.testing.assert_close(scaling.into, torch.exp(-19.9 * t**2 / 4 - 0.05 * t))
    assert torch.equal(scaling.out, -sigma)
    assert precond.levels == pytest.approx((1.00025e-3, 152.17), rel=1e-3)


def test_ve_tells_the_network_the_log_of_half_the_level() -> None:
    scaling = VEPrecond()(SIGMA)
    torch.testing.assert_close(scaling.noise, torch.log(SIGMA / 2))
    assert (scaling.skip, scaling.into) == (1.0, 1.0)
    assert torch.equal(scaling.out, SIGMA)
    assert VEPrecond().levels == (0.02, 100.0)


@pytest.mark.parametrize("precond", [EDMPrecond(), VPPrecond(), VEPrecond()])
def test_a_denoiser_leaves_an_image_without_noise_as_it_is(precond: Precond) -> None:
    scaling = precond(torch.tensor([1e-6], dtype=torch.float64))
    assert float(torch.as_tensor(scaling.skip)) == pytest.approx(1, abs=1e-9)
    assert float(scaling.out) == pytest.approx(0, abs=1e-5)


def test_levels_of_no_limit_are_the_default_of_edm() -> None:
    network = build_edm("edm", TINY_SONG)
    assert (network.sigma_min, network.sigma_max) == (0.0, float("inf"))


def denoise(network: edm.EDM, dtype: torch.dtype = torch.float32) -> Tensor:
    x = wave(2, network.img_channels, 8, 8).to(dtype)
    sigma = torch.tensor([0.3, 5.0], dtype=dtype)
    return network(x, sigma, class_condition(torch.tensor([0, 2]), 3))


@pytest.mark.parametrize(
    "arguments", [TINY_SONG, TINY_NCSN, TINY_ADM], ids=["song", "ncsn", "adm"]
)
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
    got = denoise(network.cast(dtype))
    assert network.dtype == dtype
    assert got.dtype == torch.float32
    assert (got - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_estimate_has_the_dtype_of_the_state(dtype: torch.dtype) -> None:
    assert denoise(twin("edm", TINY_SONG), dtype).dtype == dtype


def test_a_float64_state_around_a_float64_network_is_exact_to_float64() -> None:
    network = twin("edm", TINY_SONG).cast(torch.float64)
    x, sigma = wave(2, 1, 8, 8).double(), torch.tensor([0.3, 5.0], dtype=torch.float64)
    s = network.precond(sigma)
    raw = network.model(rows(s.into) * x, s.noise, None)
    expected = rows(s.skip) * x + rows(s.out) * raw
    torch.testing.assert_close(network(x, sigma), expected, rtol=1e-14, atol=1e-14)


def test_one_level_for_all_is_that_level_for_each() -> None:
    network, x = twin("edm", TINY_SONG), wave(2, 1, 8, 8)
    assert torch.equal(network(x, torch.tensor(0.5)), network(x, torch.tensor([0.5, 0.5])))


def test_no_class_is_the_null_of_guidance() -> None:
    network, x, sigma = twin("edm", TINY_SONG), wave(2, 1, 8, 8), torch.tensor([0.3, 5.0])
    cond = class_condition(torch.tensor([0, 2]), 3)
    assert cond is not None
    assert cond.null is not None
    null = edm.Condition(cond.null)
    assert torch.equal(network(x, sigma), network(x, sigma, null))
    assert not torch.equal(network(x, sigma), network(x, sigma, cond))


@pytest.mark.parametrize("bad", [3, -1, 100])
def test_a_class_out_of_range_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"class {bad} is out of range; choose 0 to 2"):
        class_condition(torch.tensor([0, bad]), 3)


def test_a_class_for_an_unconditional_network_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no classes"):
        class_condition(torch.tensor([0]), 0)


def test_labels_and_images_of_another_size_are_refused() -> None:
    network = twin("edm", TINY_SONG)
    with pytest.raises(ValueError, match=r"class_labels are \[2, 4\], the network takes \[2, 3\]"):
        network(wave(2, 1, 8, 8), torch.ones(2), class_condition(torch.tensor([0, 3]), 4))
    with pytest.raises(ValueError, match=r"x is \[2, 3, 8, 8\], but the network takes \[B, 1"):
        network(wave(2, 3, 8, 8), torch.ones(2))


@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
@pytest.mark.parametrize(
    "arguments", [TINY_SONG, TINY_NCSN, TINY_ADM], ids=["song", "ncsn", "adm"]
)
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


def test_half_the_bytes_are_written_when_asked_for(tmp_path: Path) -> None:
    network = twin("edm", TINY_SONG)
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        save_edm(tmp_path / name, network, dtype=dtype, about={"dataset": "none"})
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    exact = denoise(network)
    assert (denoise(load_edm(tmp_path / "half")) - exact).norm() / exact.norm() < 1e-2


def test_the_dtype_asked_for_is_what_the_network_runs_in(tmp_path: Path) -> None:
    save_edm(tmp_path, twin("edm", TINY_SONG), dtype=torch.float16)
    assert load_edm(tmp_path).dtype == torch.float32
    network = load_edm(tmp_path, dtype=torch.bfloat16)
    assert network.dtype == torch.bfloat16
    assert network.model.map_layer0.weight.dtype == torch.float32


@pytest.mark.parametrize("arguments", [TINY_SONG, TINY_NCSN], ids=["positional", "fourier"])
def test_half_precision_leaves_the_noise_embedding_untouched(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    network = twin("vp", arguments)
    noise, labels = torch.tensor([3.21, 987.6]), torch.eye(3)[:2]
    exact = network.model.embed(noise, labels, None)
    assert torch.equal(network.cast(torch.bfloat16).model.embed(noise, labels, None), exact)
    save_edm(tmp_path, twin("vp", arguments), dtype=torch.float16)
    stored = load_edm(tmp_path).model.map_noise(noise)
    assert torch.equal(stored, network.model.map_noise(noise))


def break_file(path: Path, change: dict[str, Any]) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | change))


def drop_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda state: state.pop("model.map_layer0.bias"))


def edit_tensors(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    state = load(path.read_bytes())
    edit(state)
    path.write_bytes(save(state))


BREAKS = {
    "no-config": (lambda f: (f / "config.json").unlink(), "cannot read config.json"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "cannot read model.safetensors"),
    "no-json": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "a-list": (lambda f: (f / "config.json").write_text("[]"), "not a network of format 1"),
    "format": (lambda f: break_file(f / "config.json", {"format": 9}), "of format 1"),
    "class": (lambda f: break_file(f / "config.json", {"class": "X"}), "unknown precond.* 'X'"),
    "arguments": (lambda f: break_file(f / "config.json", {"arguments": {}}), "needs img_resol"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "not a safetensors file",
    ),
    "missing": (drop_tensor, "lacks model.map_layer0.bias, for a EDMPrecond"),
    "foreign": (
        lambda f: edit_tensors(f, lambda s: s.update(extra=torch.zeros(1))),
        "has a foreign extra",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda s: s.update({"model.map_layer0.bias": torch.zeros(3)})),
        r"model.map_layer0.bias is \[3\] in the file, must be \[32\]",
    ),
    "nan": (
        lambda f: edit_tensors(f, lambda s: s["model.map_layer0.bias"].fill_(float("nan"))),
        "model.map_layer0.bias holds values that are no finite floats",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    save_edm(tmp_path, twin("edm", TINY_SONG))
    spoil, message = BREAKS[name]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_edm(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_wrong_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no network at .*nowhere"):
        load_edm(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_data": "x"}, "sigma_data must be a number from 0, not 'x'"),
        ({"sigma_data": -1.0}, "sigma_data must be a number"),
        ({"use_fp16": 1}, "use_fp16 must be true or false"),
    ],
)
def test_wrong_arguments_of_the_preconditioning_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_edm("edm", {**TINY_SONG, **change})


def test_the_command_converts_both_ways_without_loss(tmp_path: Path) -> None:
    network = twin("vp", TINY_SONG)
    save_edm(tmp_path / "one", network)
    for source, target in (("one", "two"), ("two", "three")):
        args = ["convert", str(tmp_path / source), str(tmp_path / target)]
        result = CliRunner().invoke(edm.main, args)
        assert result.exit_code == 0, result.output
        assert "VPPrecond" in result.output
    assert torch.equal(denoise(load_edm(tmp_path / "three")), denoise(network))
    for name in ("config.json", "model.safetensors"):
        first, last = (tmp_path / "one" / name), (tmp_path / "three" / name)
        assert first.read_bytes() == last.read_bytes()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(edm.main, ["convert", str(tmp_path / "no.pkl"), str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: no network at")
    assert result.output.count("\n") == 1
