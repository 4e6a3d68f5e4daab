"""sample_epd, as ComfyUI's sampler nodes call it, and the node folder."""

import importlib.util
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.k_diffusion import epd_sampler, learned_sigmas, sample_epd
from solvers.classic import Euler
from solvers.epd import Directions
from solvers.field import Field
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW, VE
from solvers.sampler import Sampler

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = torch.tensor([14.6, 5.0, 2.0, 0.8, 0.03, 0.0])
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * SIGMAS[0]


def shrink(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize(
    "name",
    ["sd15-best", "sd3-512-best", "lsun-bedroom-5nfe", "epd-multistep-k2-5nfe"],
)
def test_it_is_our_loop_on_the_predictors_own_levels(name: str) -> None:
    predictor = load_predictor(find_predictor(name))
    sigmas = learned_sigmas(predictor)
    assert sigmas is not None
    process = FLOW if name.startswith("sd3") else VE
    sampler = Sampler(predictor.solver(process), sigmas, process, predictor.recipe.afs)
    *_, expected = sampler.states(Field(lambda x, s, _c: shrink(x, s)), X)
    for end in ((), (0.0,)):
        ours = sample_epd(
            shrink, X, torch.tensor([*sigmas, *end], dtype=torch.float64), disable=True,
            predictor=predictor, denoise_last=not end,
        )  # fmt: skip
        assert torch.allclose(ours, expected)


@pytest.mark.parametrize("name", ["epd-multistep-k2-5nfe", "epd-multistep-k1-7nfe"])
def test_a_part_of_a_multistep_predictor_begins_anew(name: str) -> None:
    """A normal distribution of width 1/2, from its exact state: as near as Euler, or nearer."""

    def normal(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return x * 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)

    predictor = load_predictor(find_predictor(f"fashion-mnist-32/{name}"))
    sigmas = torch.tensor(learned_sigmas(predictor), dtype=torch.float64)
    width = (0.25 + sigmas**2).sqrt()
    for cut in range(1, len(sigmas) - 1):
        x = X.double() * width[cut]
        end = X.double() * width[-1]
        ours = sample_epd(normal, x, sigmas[cut:], disable=True, predictor=predictor)
        (*_, euler) = Sampler(Euler(), tuple(sigmas[cut:].tolist())).states(
            Field(lambda x, s, _c: normal(x, s)), x
        )
        assert (ours - end).norm() < 1.01 * (euler - end).norm()


def test_points_are_tiled_rows_and_so_are_tensors_among_the_arguments() -> None:
    asked = []

    def model(x: Tensor, sigma: Tensor, *, cond: Tensor, scale: float) -> Tensor:
        asked.append((sigma.tolist(), cond.tolist(), scale))
        return shrink(x, sigma)

    given = {"cond": torch.tensor([1.0, 2.0]), "scale": 7.0}
    tiled = sample_epd(model, X, SIGMAS, given, disable=True)
    apart = sample_epd(shrink, X, SIGMAS, given, disable=True, points="sequence")
    assert torch.allclose(apart, tiled, atol=1e-5)
    sigma, cond, scale = asked[1]
    assert cond == [1.0, 2.0, 1.0, 2.0]
    assert sigma[0] == sigma[1] > sigma[2] == sigma[3]
    assert scale == 7.0


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_model_with_a_state_of_b_rows_is_served(rows: int) -> None:
    """As ComfyUI's masked model, which keeps noise and the picture to keep."""
    kept = torch.randn(rows, 4, 3, 3, generator=torch.Generator().manual_seed(1))

    def masked(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return shrink(x, sigma) * 0.5 + kept * 0.5

    x = X[:1].repeat(rows, 1, 1, 1)
    together = sample_epd(masked, x, SIGMAS, disable=True)
    alone = [
        sample_epd(
            lambda x, s, row=row, **_: shrink(x, s) * 0.5 + kept[row : row + 1] * 0.5,
            x[:1], SIGMAS, disable=True,
        )
        for row in range(rows)
    ]  # fmt: skip
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_callback_hears_of_every_step() -> None:
    heard: list[dict[str, Any]] = []
    last = sample_epd(shrink, X, SIGMAS, callback=heard.append, disable=True)
    assert [h["i"] for h in heard] == [0, 1, 2, 3, 4]
    assert [float(h["sigma"]) for h in heard] == pytest.approx(SIGMAS[:-1].tolist())
    assert torch.allclose(heard[0]["x"], X)
    assert torch.allclose(heard[0]["denoised"], shrink(X, SIGMAS[:1].expand(2)), atol=1e-4)
    assert torch.equal(heard[-1]["denoised"], last)
    last = sample_epd(shrink, X, SIGMAS, callback=heard.append, disable=True, denoise_last=False)
    assert torch.equal(heard[-1]["denoised"], last)  # hosts give it out as the image


def test_a_table_with_an_analytic_first_step_has_its_callback_too() -> None:
    shipped = load_predictor(find_predictor("fashion-mnist-32/epd-multistep-k2-5nfe"))
    predictor = replace(shipped, recipe=replace(shipped.recipe, afs=True))
    sigmas, heard = learned_sigmas(predictor), list[dict[str, Any]]()
    assert sigmas is not None
    sample_epd(shrink, X, torch.tensor(sigmas), callback=heard.append, predictor=predictor)
    assert torch.allclose(heard[0]["denoised"], X - sigmas[0] * VE.free_slope(X, sigmas[0]))


def test_a_run_that_was_split_before_its_last_level_is_the_whole_run() -> None:
    predictor = load_predictor(find_predictor("fashion-mnist-32/epd-k2-5nfe"))
    sigmas = (*(learned_sigmas(predictor) or ()), 0.0)
    run = partial(sample_epd, shrink, disable=True, predictor=predictor)
    first = run(x=X, sigmas=torch.tensor(sigmas[:-1]))
    assert torch.allclose(run(x=first, sigmas=torch.tensor(sigmas[-2:])),
                          run(x=X, sigmas=torch.tensor(sigmas)), atol=1e-5)  # fmt: skip
    assert torch.equal(run(x=first, sigmas=torch.tensor(sigmas[-2:]), denoise_last=False), first)


@pytest.mark.parametrize("part", [slice(6, None), slice(0, 4)])
def test_a_part_of_its_levels_takes_that_part_of_its_table(part: slice) -> None:
    """denoise below 1, or SplitSigmas: the host gives the last of the levels, or the first."""
    predictor = load_predictor(find_predictor("sd15-best"))
    sigmas = learned_sigmas(predictor)
    assert sigmas is not None
    assert isinstance(predictor.table, Directions)
    steps = slice(part.start, part.stop and part.stop - 1)
    table = Directions(*(t[steps] for t in predictor.table.tensors()))
    sampler = Sampler(replace(predictor.solver(VE), table=table), sigmas[part], VE)
    *_, expected = sampler.states(Field(lambda x, s, _c: shrink(x, s)), X)
    ours = epd_sampler(predictor)(shrink, X, torch.tensor(sigmas[part]), None, None, True)
    assert torch.allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([14.6, 5.0, 5.0, 1.0], "must be two or more falling levels"),
        ([1.0, 5.0], "must be two or more falling levels"),
        ([14.6, 5.0, 2.0, 0.8, 0.03], "5 levels above 0 for a predictor of 11"),
        (torch.linspace(14, 0.1, 12).tolist(), "12 levels above 0 for a predictor of 11"),
    ],
)
def test_levels_that_cannot_be_taken_are_refused(levels: list[float], words: str) -> None:
    predictor = None if "falling" in words else load_predictor(find_predictor("sd15-best"))
    with pytest.raises(ValueError, match=words):
        sample_epd(shrink, X, torch.tensor(levels), disable=True, predictor=predictor)


def test_levels_that_it_was_not_learned_on_give_a_warning() -> None:
    predictor = load_predictor(find_predictor("sd15-best"))
    with pytest.warns(UserWarning, match=r"learned on other levels: 14\.61, "):
        epd_sampler(predictor)(shrink, X, torch.linspace(14, 0.1, 11), None, None, True)


# --- the node folder, in a stand-in of ComfyUI --------------------------------------------


class Sampling:
    """ComfyUI's model_sampling of Stable Diffusion 1.x."""

    def __init__(self, sigma_max: float | None = None) -> None:
        alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)
        self.sigmas = (1 / alphas - 1).sqrt().float()
        self.sigma_max = self.sigmas[-1] if sigma_max is None else torch.tensor(sigma_max)

    def get_model_object(self, name: str) -> "Sampling":
        assert name == "model_sampling"
        return self


class KSAMPLER:
    """ComfyUI's: masks by KSamplerX0Inpaint, and its callback."""

    def __init__(self, sampler_function: Any, extra_options: dict[str, Any]) -> None:
        self.function, self.options = sampler_function, extra_options

    def sample(
        self, sigmas: Tensor, noise: Tensor, latent: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        previews: list[tuple[int, int]] = []

        def masked(x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, seed: int) -> Tensor:
            assert seed == 3
            wide = sigma.reshape(-1, 1, 1, 1)
            if denoise_mask is not None:
                x = x * denoise_mask + (latent + noise * wide) * (1 - denoise_mask)
            out = shrink(x, sigma)
            return (
                out if denoise_mask is None else out * denoise_mask + latent * (1 - denoise_mask)
            )

        x = self.function(
            masked, latent + noise * sigmas[0], sigmas,
            extra_args={"denoise_mask": mask, "seed": 3},
            callback=lambda d: previews.append((d["i"], len(d["denoised"]))),
            disable=True, **self.options,
        )  # fmt: skip
        return x, previews


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node of a copied folder, as ComfyUI imports it."""
    folder = shutil.copytree(ROOT / "integrations" / "comfyui", tmp_path / "custom_nodes" / "epd")
    comfy = type(sys)("comfy")
    comfy.samplers = type(sys)("comfy.samplers")  # pyright: ignore[reportAttributeAccessIssue]
    comfy.samplers.KSAMPLER = KSAMPLER
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", comfy.samplers)
    spec = importlib.util.spec_from_file_location("epd_node", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["EPDPredictor"]()


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)])
@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_the_node_samples_in_comfyui(node: Any, denoise: float, mask: Tensor | None) -> None:
    sampler, sigmas, cfg = node.load(Sampling(), "sd15-best", denoise)
    steps = round(10 * denoise)
    assert (len(sigmas), sigmas[-1].item(), cfg) == (steps + 2, 0.0, 7.5)
    latent, noise = X / 14.6, torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
    x, previews = sampler.sample(sigmas, noise, latent, mask)
    assert previews == [(i, 2) for i in range(steps)]
    if mask is not None and mask.sum() == 0:  # all is kept, and noised to the last level
        assert torch.allclose(x, latent + sigmas[-2] * noise, atol=1e-4)
    else:
        predictor = load_predictor(find_predictor("sd15-best"))
        expected = sample_epd(
            shrink, latent + noise * sigmas[0], sigmas[:-1], disable=True, predictor=predictor
        )
        assert torch.allclose(x, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["lsun-bedroom-5nfe-ipndm", "exps/tiny-sd3/epd-ipndm-k2-4nfe.pkl", "epd-multistep-k2-5nfe"],
)
def test_the_node_takes_epd_over_a_base_and_half_precision(
    node: Any, name: str, dtype: torch.dtype
) -> None:
    """A network in float16 answers with noise or velocity; the state stays float32."""
    predictor = load_predictor(find_predictor(name))
    own = learned_sigmas(predictor)
    assert own is not None

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        wide = sigma.reshape(-1, 1, 1, 1)
        return x - wide * ((x - shrink(x, sigma)) / wide).to(dtype).float()

    sampler, sigmas, _ = node.load(Sampling(own[0]), name, 1.0)
    start = X * own[0] / SIGMAS[0]
    x = sampler.function(model, start, sigmas, disable=True, **sampler.options)
    process = FLOW if own[0] == 1 else VE
    loop = Sampler(predictor.solver(process), own, process, predictor.recipe.afs)
    *_, expected = loop.states(Field(lambda x, s, _c: shrink(x, s)), start)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert x.dtype == torch.float32
    assert (x - expected).norm() <= tolerance * expected.norm()


def test_levels_without_signal_are_one_end(node: Any) -> None:
    """ComfyUI's zero terminal SNR begins at 4518, diffusers' at 4096."""
    predictor = load_predictor(find_predictor("sd15-best"))
    scheduler = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
    }  # fmt: skip
    recipe = replace(predictor.recipe, backend_config={"scheduler": scheduler})
    levels = node.load.__globals__["levels"]
    assert levels(replace(predictor, recipe=recipe), Sampling(4518.0))[0] == pytest.approx(4096)
    with pytest.raises(ValueError, match="begin at 4096, the model's at 14"):
        levels(replace(predictor, recipe=recipe), Sampling())


def test_a_predictor_of_another_model_is_refused_by_the_node(node: Any) -> None:
    with pytest.raises(ValueError, match=r"for another model .ms_coco, sd3.*begin at 1, "):
        node.load(Sampling(), "sd3-512-best", 1.0)
