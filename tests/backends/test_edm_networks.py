"""The networks are the published ones: names, shapes, counts and numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.edm import build_edm, class_condition
from backends.edm_networks import Conv2d
from exps.build.fit_fashion import initialise
from tests.backends.edm_twins import TINY_NCSN, TINY_SONG, twin, wave

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "edm_networks.json").read_text())
CIFAR = {
    "img_resolution": 32,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "augment_dim": 9,
}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['arch']}-{c['precond']}")
def test_a_small_network_matches_the_recorded_names_and_outputs(case: dict[str, Any]) -> None:
    network = twin(case["precond"], case["init"])
    names = [[name, list(p.shape)] for name, p in network.named_parameters()]
    assert names == case["names"]
    assert sum(p.numel() for p in network.parameters()) == case["parameters"]
    x = wave(2, network.img_channels, network.img_resolution, network.img_resolution)
    labels = None if case["labels"] is None else torch.tensor(case["labels"])
    y = network(x, torch.tensor(case["sigma"]), class_condition(labels, network.label_dim))
    torch.testing.assert_close(
        y.flatten()[:64], torch.tensor(case["y_flat_first64"]), rtol=1e-5, atol=2e-6
    )
    assert y.mean().item() == pytest.approx(case["y_mean"], abs=5e-6)
    assert y.std().item() == pytest.approx(case["y_std"], rel=1e-5)


@pytest.mark.parametrize(
    ("precond", "arguments", "count"),
    [
        ("vp", {**CIFAR, "label_dim": 10}, 55_735_299),
        ("vp", CIFAR, 55_733_891),
        ("ve", {**CIFAR, **NCSNPP, "label_dim": 10}, 56_400_643),
        ("vp", {**CIFAR, "img_resolution": 64, "channel_mult": [1, 2, 2, 2]}, 61_805_571),
        ("edm", {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}, 295_899_267),
    ],
    ids=["cifar10-cond", "cifar10-uncond", "cifar10-ncsnpp", "ffhq64", "imagenet64-adm"],
)
def test_published_networks_have_the_published_number_of_parameters(
    precond: str, arguments: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        network = build_edm(precond, arguments)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("resample", ["up", "down"])
def test_the_box_filter_of_its_own_kernels_is_the_general_filter(resample: str) -> None:
    conv = Conv2d(4, 4, 0, resample=resample)
    x = wave(2, 4, 8, 8)
    fast = conv(x)
    conv.is_box = False
    torch.testing.assert_close(fast, conv(x))


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
def test_every_kind_of_encoder_and_decoder_uses_all_its_weights(
    encoder: str, decoder: str
) -> None:
    arguments = {**TINY_NCSN, "encoder_type": encoder, "decoder_type": decoder, "dropout": 0.0}
    network = twin("ve", arguments).requires_grad_(True)
    cond = class_condition(torch.tensor([0, 2]), 3)
    network(wave(2, 1, 8, 8), torch.tensor([0.3, 5.0]), cond).square().sum().backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_the_initial_weights_hang_on_the_generator_alone() -> None:
    def weights(seed: int) -> Tensor:
        network = build_edm("ve", TINY_NCSN)
        initialise(network.model, torch.Generator().manual_seed(seed))
        return torch.cat([v.flatten() for v in network.state_dict().values()])

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": 0}, "model_channels must be a whole number from 1 to 65536, not 0"),
        ({"channel_mult": []}, "channel_mult must be a list of up to 32 whole numbers from 1"),
        ({"channel_mult": "12"}, "channel_mult must be a list"),
        ({"img_resolution": 9}, "img_resolution 9 cannot be halved 1 times"),
        ({"encoder_type": "other"}, "encoder_type must be one of standard, skip, residual"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\)"),
        ({"atn_resolutions": [4]}, "takes no argument 'atn_resolutions'"),
        ({"model_type": "UNet"}, "unknown network 'UNet'; known: SongUNet, DhariwalUNet"),
        ({"model_type": ["UNet"]}, "unknown network"),
        ({"label_dim": -1}, "label_dim must be a whole number from 0"),
        ({"sigma_data": "x"}, "sigma_data must be a number from 0, not 'x'"),
        ({"sigma_data": -1.0}, "sigma_data must be a number"),
        ({"use_fp16": 1}, "use_fp16 must be true or false"),
    ],
)
def test_arguments_that_make_no_network_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_edm("edm", {**TINY_SONG, **change})
    assert "\n" not in str(caught.value)
