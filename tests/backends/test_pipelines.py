"""Pipelines of every family, from their folders to images, against diffusers' own sampling."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backends.base import Backend, ModelOptions
from backends.flow import Shifts, flow_levels
from backends.flux import pack, unpack
from backends.generate import Job, generate
from backends.load import load_backend
from backends.methods import HandMade, check_fit, predictor_method
from backends.pipelines import wrap
from backends.vp import table_of
from solvers.classic import Euler
from solvers.field import Field
from solvers.integrate import integrate
from solvers.predictor import find_predictor, load_predictor
from src.seeds import randn
from tests import twins
from tests.backends.original_layout import original, original_sd3, original_vae

NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
diffusers = twins.diffusers
CPU = torch.device("cpu")
SMALL = ModelOptions(size=(32, 32))
TEXT = "a red fox in the snow"
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a twin, made when it is first asked for."""
    root = tmp_path_factory.mktemp("twins")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            twins.saved(root / name, twins.MAKERS[name]())
        return root / name

    return folder


def stock(folder: Path) -> Any:
    """diffusers' own pipeline of a folder."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, **missing(folder)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def missing(folder: Path) -> dict[str, None]:
    index = json.loads((folder / "model_index.json").read_text())
    return {part: None for part, made_by in index.items() if made_by == [None, None]}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """To float tolerance, relative to the size of the numbers."""
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


# --- our Euler is theirs ------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "rate"), [("epsilon", 5.0), ("v_prediction", 1.0)])
def test_sd_by_euler_is_diffusers_ddim(prediction: str, rate: float) -> None:
    pipe = twins.sd(prediction)
    pipe.set_progress_bar_config(disable=True)
    noise = randn([3], (4, 8, 8))
    theirs = pipe(
        TEXT, negative_prompt="blur", num_inference_steps=5, guidance_scale=rate, height=16,
        width=16, latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    backend = wrap(pipe, CPU, ModelOptions(negative_prompt="blur"))
    assert backend.family == "ldm"
    t = torch.cat([pipe.scheduler.timesteps, torch.zeros(1)])
    sigmas = backend.levels.timesteps.sigma_of(t)
    x = noise * math.sqrt(1 + sigmas[0].item() ** 2)
    ours = euler(backend, x, sigmas, rate) / math.sqrt(1 + sigmas[-1].item() ** 2)
    assert close(ours, theirs)


@NUMPY
def test_sd_by_euler_is_diffusers_euler() -> None:
    pipe = twins.sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    noise = randn([3], (4, 8, 8))
    theirs = pipe(
        TEXT, num_inference_steps=6, guidance_scale=4.0, height=16, width=16, latents=noise,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    x = noise * pipe.scheduler.init_noise_sigma
    ours = euler(wrap(pipe, CPU), x, pipe.scheduler.sigmas, 4.0)
    assert close(ours, theirs)


def test_unconditional_ldm_by_euler_is_diffusers_ddim() -> None:
    pipe = twins.uncond()
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np"
    ).images
    backend = wrap(pipe, CPU)
    assert backend.family == "ldm"
    sigmas = backend.levels.timesteps.sigma_of(pipe.scheduler.timesteps)
    x = randn([3], (3, 8, 8)) * math.sqrt(1 + sigmas[0].item() ** 2)
    ours = euler(backend, x, torch.cat([sigmas, torch.zeros(1)]), 1.0, prompt=None)
    assert close(backend.decode(ours).permute(0, 2, 3, 1), torch.from_numpy(theirs), 1e-4)


@torch.no_grad()
def euler(
    backend: Backend, x: torch.Tensor, sigmas: torch.Tensor, rate: float, prompt: str | None = TEXT
) -> torch.Tensor:
    cond = backend.encode([prompt])
    *_, last = integrate(Euler(), Field(backend.guided(rate, cond), cond), x, sigmas)
    return last


@pytest.mark.parametrize("with_t5", [False, True])
def test_sd3_by_seed_is_diffusers_pipeline(with_t5: bool, tmp_path: Path) -> None:
    folder = twins.saved(tmp_path / "sd3", twins.sd3(with_t5))
    theirs = stock(folder)(
        TEXT, negative_prompt="blur", num_inference_steps=5, guidance_scale=4.5, height=24,
        width=16, generator=torch.Generator().manual_seed(3), output_type="pt",
    ).images  # fmt: skip
    backend = load_backend(
        str(folder), options=ModelOptions(size=(24, 16), negative_prompt="blur")
    )
    method = replace(
        HandMade("euler", 5).method(backend.levels), guidance_rate=4.5, denoise_to_zero=True
    )
    (made,) = generate(backend, method, [Job(3, TEXT)], batch=1)
    assert made.images.shape == (1, 3, 24, 16)
    assert close(made.images, theirs)


def test_flux_by_seed_is_diffusers_pipeline(folders: Folders) -> None:
    """On the levels of the scheduler's own range, which FLUX's pipeline takes as an argument."""
    theirs = stock(folders("flux"))(
        TEXT, sigmas=np.linspace(1, 1e-3, 5).tolist(), guidance_scale=3.5, height=32, width=16,
        generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="pt",
    ).images  # fmt: skip
    backend = load_backend(str(folders("flux")), options=ModelOptions(size=(32, 16)))
    method = replace(
        HandMade("euler", 5).method(backend.levels), guidance_rate=3.5, denoise_to_zero=True
    )
    (made,) = generate(backend, method, [Job(3, TEXT)], batch=1)
    assert close(made.images, theirs)


@pytest.mark.parametrize("name", ["sd", "uncond", "sd3", "flux"])
def test_slopes_pass_through_a_frozen_network(name: str, folders: Folders) -> None:
    backend = load_backend(str(folders(name)), options=SMALL)
    x = torch.randn(1, *backend.latent_shape, requires_grad=True)
    cond = backend.encode([None if name == "uncond" else "a"])
    x0 = backend(x, torch.full((1,), 0.5), cond)
    assert torch.autograd.grad(x0.sum(), x)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="does not require grad"):
        backend(x.detach(), torch.full((1,), 0.5), cond).sum().backward()


@pytest.mark.parametrize("name", ["sd", "uncond", "sd3", "flux"])
def test_points_in_one_call_are_the_points_one_by_one(name: str, folders: Folders) -> None:
    backend = load_backend(str(folders(name)), options=SMALL)
    file = "sd15-best" if name in ("sd", "uncond") else "sd3-512-best"
    method = predictor_method(load_predictor(find_predictor(file)), backend.levels)
    rate = 1.0 if name == "uncond" else method.guidance_rate
    jobs = [Job(s, None if name == "uncond" else t) for s, t in ((0, "a"), (1, "b"))]

    def latents(points: int | None, batch: int) -> torch.Tensor:
        chunked = replace(method, guidance_rate=rate, points_chunk=points)
        return torch.cat([m.latents for m in generate(backend, chunked, jobs, batch=batch)])

    together = latents(None, 2)
    assert close(latents(1, 2), together)
    assert close(latents(None, 1), together)


# --- clocks and schedules -----------------------------------------------------------------


def test_the_range_of_stable_diffusion_is_derived() -> None:
    levels = table_of(twins.SD_SCHEDULER).levels
    assert levels.sigma_min == pytest.approx(0.0292, abs=5e-5)
    assert levels.sigma_max == pytest.approx(14.6146, abs=5e-5)


def test_the_table_is_inverted_between_steps_too() -> None:
    table = table_of(twins.SD_SCHEDULER)
    t = torch.tensor([0.0, 0.25, 1.0, 499.5, 998.9, 999.0], dtype=torch.float64)
    assert torch.allclose(table.sigma_inv(table.sigma(t)), t, atol=1e-9)
    beyond = table.sigma_inv(torch.tensor([1e-9, 1e9]))
    assert beyond.tolist() == [0.0, 999.0]


def test_the_discrete_schedule_is_even_in_timesteps() -> None:
    table = table_of(twins.SD_SCHEDULER)
    sigmas = table.levels.grid("discrete", 4)
    assert torch.allclose(table.sigma_inv(sigmas), torch.tensor([999.0, 666, 333, 0]).double())


@NUMPY
def test_levels_are_those_of_diffusers_euler() -> None:
    theirs = diffusers.EulerDiscreteScheduler(
        **{k: v for k, v in twins.SD_SCHEDULER.items() if k.startswith(("beta", "num"))}
    )
    theirs.set_timesteps(1000)
    ours = table_of(twins.SD_SCHEDULER).log_sigmas.exp().flip(0)
    assert torch.allclose(ours.float(), theirs.sigmas[:-1], rtol=2e-4)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_the_dynamic_shift_is_the_pipelines(tokens: int) -> None:
    theirs = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens)
    assert Shifts(dynamic=True).mu(tokens) == pytest.approx(theirs)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15)])
def test_flow_levels_follow_the_resolution(tokens: int, mu: float) -> None:
    levels = flow_levels({"use_dynamic_shifting": True, "shift": 3.0}, tokens)
    assert levels.mu == pytest.approx(mu)
    assert levels.sigma_min == 1e-3


def test_flow_levels_of_sd3_are_the_published() -> None:
    assert flow_levels({"shift": 3.0}, 0).sigma_min == pytest.approx(0.0029940119760479044)


def test_packing_is_undone() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    theirs = diffusers.FluxPipeline._pack_latents(x, 2, 3, 4, 6)
    assert torch.equal(pack(x), theirs)
    assert torch.equal(unpack(theirs, (3, 4, 6)), x)


# --- prompts ------------------------------------------------------------------------------


def test_a_distinct_prompt_is_encoded_once() -> None:
    pipe = twins.sd3()
    encoder, asked = pipe.encode_prompt, []
    pipe.encode_prompt = lambda prompt, **rest: (asked.append(prompt), encoder(prompt, **rest))[1]
    backend = wrap(pipe, CPU, SMALL)
    assert backend.family == "sd3"
    backend.encode(["a", "b", "a"])
    cond = backend.encode(["b"])
    assert sorted(asked) == ["", "a", "b"]
    assert cond.given["text"].shape == (1, 77 + 1, 32)  # one row of zeros for 256
    assert cond.given["pooled"].shape == (1, 32)


def test_encoders_are_let_go_of_on_request(folders: Folders) -> None:
    kept = load_backend(str(folders("sd")))
    released = load_backend(str(folders("sd")), options=ModelOptions(encode_first=(TEXT,)))
    ours, theirs = released.encode([TEXT]), kept.encode([TEXT])
    assert ours
    assert theirs
    assert torch.equal(ours.given["text"], theirs.given["text"])
    with pytest.raises(ValueError, match="let go before 'another'"):
        released.encode(["another"])


def test_without_a_prompt_there_is_a_test_prompt_by_seed(folders: Folders) -> None:
    backend = load_backend(str(folders("sd")))
    first, again = backend.usual_prompt(1), backend.usual_prompt(201)
    assert isinstance(first, str)
    assert first == again != backend.usual_prompt(2)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_class_number_is_refused_by_texts(name: str, folders: Folders) -> None:
    backend = load_backend(str(folders(name)), options=SMALL)
    with pytest.raises(ValueError, match="takes a text for every image, not 7"):
        backend.encode([7])


def test_a_prompt_is_refused_by_an_unconditional_model(folders: Folders) -> None:
    with pytest.raises(ValueError, match="takes no prompts"):
        load_backend(str(folders("uncond"))).encode(["a dog"])


def test_flux_is_told_its_guidance(folders: Folders) -> None:
    backend = load_backend(str(folders("flux")), options=SMALL)
    cond = backend.encode([TEXT])
    assert cond is not None
    x, sigma = randn([0], backend.latent_shape), torch.ones(1)
    with torch.no_grad():
        weak, strong = (backend.guided(rate, cond)(x, sigma, cond) for rate in (1.0, 7.0))
        pair = replace(cond.repeat(2), rates=(1.0, 7.0))
        both = backend.guided(3.5, cond)(torch.cat([x, x]), torch.ones(2), pair)
    assert not torch.allclose(weak, strong)
    assert torch.allclose(both, torch.cat([weak, strong]), atol=1e-5)


def test_a_flux_without_guidance_refuses_it() -> None:
    backend = wrap(twins.flux(guidance=False), CPU, SMALL)
    assert backend.family == "flux"
    assert backend.guided(1.0, None)
    with pytest.raises(ValueError, match=r"guidance_rate 3\.5"):
        backend.guided(3.5, None)


def test_flux_refuses_a_negative_prompt(folders: Folders) -> None:
    with pytest.raises(ValueError, match="no negative prompt"):
        load_backend(str(folders("flux")), options=replace(SMALL, negative_prompt="blur"))


# --- published predictors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "size"),
    [
        ("sd15/sd15-best", "sd", 16),
        ("lsun-bedroom/lsun-bedroom-5nfe", "uncond", 16),
        ("lsun-bedroom/lsun-bedroom-5nfe-ipndm", "uncond", 16),
        ("sd3-512/sd3-512-best", "sd3", 64),
        ("sd3-1024/sd3-1024-best", "sd3", 64),
        ("flux/flux-best", "flux", 64),
    ],
)
def test_published_predictors_sample_from_their_family(
    file: str, name: str, size: int, folders: Folders
) -> None:
    backend = load_backend(str(folders(name)), options=ModelOptions(size=(size, size)))
    predictor = load_predictor(find_predictor(file))
    method = predictor_method(predictor, backend.levels)
    jobs = [Job(0, None if name == "uncond" else TEXT)]
    (made,) = generate(backend, method, jobs, batch=1)
    assert made.tally.calls == predictor.nfe
    assert made.images.shape == (1, 3, size, size)
    assert bool(made.images.isfinite().all())
    assert made.images.std() > 0


def test_a_512_predictor_is_refused_by_a_1024_model(folders: Folders) -> None:
    recipe = load_predictor(find_predictor("sd3-512-best")).recipe
    options = ModelOptions(size=(128, 128))
    with pytest.raises(ValueError, match=r"for 512 pixels.*makes 128.*--resolution 512"):
        check_fit(recipe, load_backend(str(folders("sd3")), options=options))


def test_a_predictor_fits_the_model_at_its_resolution(folders: Folders) -> None:
    recipe = replace(load_predictor(find_predictor("sd3-512-best")).recipe, img_resolution=128)
    options = ModelOptions(size=(128, 128))
    check_fit(recipe, load_backend(str(folders("sd3")), options=options))


def test_a_flow_table_is_refused_by_a_vp_model(folders: Folders) -> None:
    predictor = load_predictor(find_predictor("sd3-512-best"))
    with pytest.raises(ValueError, match="is not for a ve model"):
        predictor_method(predictor, load_backend(str(folders("sd"))).levels)


def test_afs_is_refused_by_flow(folders: Folders) -> None:
    with pytest.raises(ValueError, match="afs is for VE models"):
        HandMade("euler", 5, afs=True).method(load_backend(str(folders("sd3"))).levels)


# --- sizes, parts and files ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("sd3", 30, "30 is no multiple of 4: try 32"),
        ("sd3", 1024, "1024 is too large: the model goes up to 256"),
        ("flux", 18, "18 is no multiple of 4"),
        ("sd", 0, "0 is no multiple of 2: try 2"),
    ],
)
def test_sizes_that_a_model_lacks_are_refused(
    name: str, size: int, words: str, folders: Folders
) -> None:
    with pytest.raises(ValueError, match=words):
        load_backend(str(folders(name)), options=ModelOptions(size=(size, size)))


def test_tiles_and_slices_are_the_vaes() -> None:
    options = ModelOptions(vae_tiling=True, vae_slicing=True)
    pipe = twins.sd3()
    wrap(pipe, CPU, options)
    assert pipe.vae.use_tiling
    assert pipe.vae.use_slicing


def test_offload_needs_a_gpu(folders: Folders) -> None:
    with pytest.raises(ValueError, match="cpu_offload needs a GPU"):
        load_backend(str(folders("sd3")), options=ModelOptions(cpu_offload=True))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_half_precision_networks_keep_a_float32_state(name: str, folders: Folders) -> None:
    backend = load_backend(str(folders(name)), dtype=torch.bfloat16, options=SMALL)
    assert backend.dtype == torch.bfloat16
    method = HandMade("euler", 3).method(backend.levels)
    (made,) = generate(backend, method, [Job(0, TEXT)], batch=1)
    assert made.latents.dtype == made.images.dtype == torch.float32
    assert bool(made.images.isfinite().all())


def test_a_pixel_model_takes_no_such_options(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="takes no prompts, sizes"):
        load_backend(str(tmp_path), options=SMALL)


def test_missing_weights_are_named_with_source_size_and_option(
    folders: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders("sd3"), tmp_path / "sd3")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"transformer has no weights.*15.5 GB.*--model") as error:
        load_backend(str(folder))
    assert "\n" not in str(error.value)


def test_a_name_that_no_hub_gives_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"FLUX.1-dev.*33.7 GB.*--model") as error:
        load_backend("black-forest-labs/FLUX.1-dev")
    assert "\n" not in str(error.value)


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "MadeUpPipeline"}')
    with pytest.raises(ValueError, match="no pipeline of diffusers is called 'MadeUpPipeline'"):
        load_backend(str(tmp_path))


# --- single files -------------------------------------------------------------------------


class ModelCheckpoint:
    """What a trainer leaves in its checkpoint."""

    def __init__(self) -> None:
        self.best = 1.0


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_an_original_sd_file_gives_the_folders_outputs(
    ending: str, folders: Folders, tmp_path: Path
) -> None:
    pipe, file = stock(folders("sd")), tmp_path / f"model.{ending}"
    tensors = original(pipe)
    if ending == "ckpt":
        callback = {"callbacks": {ModelCheckpoint: ModelCheckpoint()}, "global_step": 7}
        torch.save({"state_dict": tensors, **callback}, file)
    else:
        save_file(tensors, file)
    ours = load_backend(str(file), options=ModelOptions(config=str(folders("sd"))))
    theirs = load_backend(str(folders("sd")))
    method = replace(HandMade("euler", 3).method(theirs.levels), guidance_rate=3.0)
    (a,), (b,) = (generate(m, method, [Job(1, TEXT)], batch=1) for m in (ours, theirs))
    assert torch.equal(a.images, b.images)


class Hostile:
    """Touches a file when it is unpickled by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": Hostile(tmp_path / "touched")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt"):
        load_backend(str(tmp_path / "bad.ckpt"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_a_broken_file_is_one_line(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model.{ending}"
    file.write_bytes(b"PK\x03\x04 neither weights nor anything")
    with pytest.raises(ValueError, match="no weights that can be read") as error:
        load_backend(str(file))
    assert "\n" not in str(error.value)


def test_a_file_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of no model that is known"):
        load_backend(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("more", [False, True])
def test_an_original_sd3_file_gives_the_folders_outputs(
    more: bool, folders: Folders, tmp_path: Path
) -> None:
    """The folder beside it has what the file lacks: all but the transformer, or one encoder."""
    pipe, file = stock(folders("sd3")), tmp_path / "sd3.safetensors"
    rest = shutil.copytree(folders("sd3"), tmp_path / "rest")
    tensors = original_sd3(pipe.transformer)
    if more:
        tensors |= original_vae(pipe.vae)
        clip = pipe.text_encoder_2.state_dict()
        tensors |= {f"text_encoders.clip_g.transformer.{n}": t for n, t in clip.items()}
    for part in ("transformer", "vae", "text_encoder_2") if more else ("transformer",):
        next((rest / part).glob("*.safetensors")).unlink()
    save_file(tensors, file)
    ours = load_backend(str(file), options=ModelOptions(config=str(rest)))
    theirs = load_backend(str(folders("sd3")))
    method = replace(HandMade("euler", 3).method(theirs.levels), guidance_rate=3.0)
    (a,), (b,) = (generate(m, method, [Job(1, TEXT)], batch=1) for m in (ours, theirs))
    assert torch.equal(a.images, b.images)


def test_a_single_file_of_sd3_asks_for_a_config(tmp_path: Path) -> None:
    name = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
    save_file({name: torch.zeros(1)}, tmp_path / "sd3.safetensors")
    with pytest.raises(ValueError, match="--model_config"):
        load_backend(str(tmp_path / "sd3.safetensors"))


def test_the_shipped_config_is_stable_diffusion_15() -> None:
    """859,520,964 parameters of the U-Net, 83,653,863 of the VAE (Rombach et al. 2022)."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(
            diffusers.UNet2DConditionModel.load_config(twins.CONFIG / "unet")
        )
        vae = diffusers.AutoencoderKL.from_config(
            diffusers.AutoencoderKL.load_config(twins.CONFIG / "vae")
        )
    assert [sum(p.numel() for p in m.parameters()) for m in (unet, vae)] == [859520964, 83653863]
