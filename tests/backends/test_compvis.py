"""CompVis' LSUN checkpoint gives, in diffusers' modules, what the paper's own networks give."""

from pathlib import Path

import pytest
import torch

from backends.compvis import MARKS
from backends.load import load_backend
from solvers.predictor import find_predictor, load_predictor
from tests.backends.edm_twins import by_rule, wave
from tests.backends.original_layout import LAYOUTS, original
from tests.twins import diffusers, seeded


def test_a_checkpoint_of_compvis_is_its_networks(tmp_path: Path) -> None:
    """A level without attention, one of one head, one of two; VQ-f4; its own network's numbers."""
    golden = LAYOUTS["compvis"]
    first = diffusers.VQModel(
        block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, num_vq_embeddings=16,
    )  # fmt: skip
    unet = {f"model.diffusion_model.{n}": by_rule(n, shape) for n, shape in golden["names"]}
    state = unet | original(seeded(first, 2, 0.1), "vq") | {"betas": torch.zeros(1000)}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "model.ckpt")
    backend = load_backend(str(tmp_path / "model.ckpt"))
    assert (backend.family, backend.shape, backend.size) == ("ldm", (3, 64, 64), (256, 256))
    assert backend.levels.sigma_max == pytest.approx(83.82, rel=1e-3)
    assert backend.levels.timesteps is not None
    sigma = backend.levels.timesteps.sigma_of(torch.tensor(golden["times"])).float()
    wide = sigma.reshape(-1, 1, 1, 1)
    x = wave(2, 3, 16, 16) * (1 + wide**2).sqrt()
    with torch.no_grad():
        x0 = backend.denoise(x, sigma, None)
        images = first.decode(x0).sample
    eps = (x - x0) / wide
    expected = torch.tensor(golden["eps_first64"])
    assert torch.allclose(eps.flatten()[:64], expected, rtol=1e-3, atol=1e-4)
    assert eps.mean().item() == pytest.approx(golden["eps_mean"], abs=1e-4)
    assert eps.std().item() == pytest.approx(golden["eps_std"], rel=1e-3)
    assert torch.allclose(backend.decode(x0), (images / 2 + 0.5).clamp(0, 1), atol=1e-4)
    sampler = load_predictor(find_predictor("lsun-bedroom-5nfe")).sampler(backend.levels)
    assert sampler.sigmas[0] == pytest.approx(83.82, rel=1e-3)


def test_a_checkpoint_that_lacks_a_tensor_is_one_line(tmp_path: Path) -> None:
    state = {name: torch.zeros(1, 1) for name in MARKS}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt: not CompVis' layout") as error:
        load_backend(str(tmp_path / "model.ckpt"))
    assert "\n" not in str(error.value)
