"""Solvers as schedulers of stock pipelines: their contract, what is refused, what is edited."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.base import ModelOptions
from backends.drop_in import EPDScheduler, parallel, parallel_pipeline
from backends.generate import Job, generate
from backends.lending import CachedPrompts
from backends.pipelines import wrap
from solvers.predictor import find_predictor, load_predictor
from tests import twins
from tests.pretend_gpu import pretend_gpu

diffusers = twins.diffusers
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TEXT = "a red fox"
SIZE = {"height": 16, "width": 16}
LATENT = {"output_type": "latent", **SIZE}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISY = {"stochastic_sampling": True}
NO_SIGNAL = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
NO_SIGNAL |= {"timestep_spacing": "trailing"}
ENDS = {"sigma_min": 0.05, "sigma_max": 20.0}


def ours(pipe: Any, name: str, seeds: list[int], prompt: str | None = TEXT) -> Tensor:
    """Pictures [B, 3, 16, 16] by our own loop."""
    backend = wrap(pipe, CPU, ModelOptions(size=(16, 16)))
    sampler = load_predictor(find_predictor(name)).sampler(backend.levels)
    parts = generate(backend, sampler, [Job(s, prompt) for s in seeds], batch=len(seeds))
    return torch.cat([part.images for part in parts])


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(maker: Any, name: str, **options: Any) -> Any:
    """A twin whose scheduler is the predictor."""
    pipe = quiet(maker(**options))
    pipe.scheduler = EPDScheduler.from_predictor(name, like=pipe.scheduler)
    return pipe


def drawn(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the pictures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "name", "rate"),
    [
        (twins.sd, "sd15-best", 7.5),
        (twins.sd3, "sd3-512-best", 4.5),
        (twins.flux, "flux-best", 3.5),
    ],
)
def test_a_stock_pipeline_gives_our_picture(maker: Any, name: str, rate: float) -> None:
    pipe, predictor = stock(maker, name), load_predictor(find_predictor(name))
    given = {"guidance_scale": rate, "output_type": "pt", **SIZE}
    expected = ours(pipe, name, [3, 4])
    (image,) = pipe(TEXT, generator=drawn(3), **given).images
    assert torch.allclose(image, expected[0], atol=1e-4)
    assert len(pipe.scheduler.timesteps) == predictor.evaluations
    images = parallel(pipe, name)(TEXT, generator=drawn(3, 4), num_images_per_prompt=2, **given)
    assert torch.allclose(images.images, expected, atol=1e-4)


def test_a_parallel_pipeline_calls_its_network_as_often_as_promised_on_no_row_too_many() -> None:
    pipe, rows = quiet(twins.sd()), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    parallel(pipe, "sd15-best")(TEXT, guidance_scale=7.5, **LATENT)
    assert rows == [2, 4] * 10
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize("name", ["lsun-bedroom-5nfe", "lsun-bedroom-5nfe-ipndm"])
def test_afs_scales_and_multistep_bases_are_served(name: str) -> None:
    pipe = stock(twins.uncond, name)
    theirs = pipe(generator=torch.Generator().manual_seed(3), output_type="np").images
    expected = ours(pipe, name, [3], None).permute(0, 2, 3, 1)
    assert torch.allclose(torch.from_numpy(theirs), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_float32_picture(dtype: torch.dtype) -> None:
    """Within 2 % (bf16: 5 %) of the latents' size, and no NaN."""
    images = {}
    for kind in (torch.float32, dtype):
        pipe = quiet(twins.sd3()).to(kind)
        images[kind] = parallel(pipe, "sd3-512-best")(TEXT, generator=drawn(3), **LATENT).images
    exact, near = images[torch.float32], images[dtype].float()
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.02
    assert (near - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("name", ["sd15-best", "sd3-512-best", "lsun-bedroom-5nfe"])
def test_no_step_waits_for_a_gpu_or_sends_it_anything(name: str) -> None:
    scheduler = EPDScheduler.from_predictor(name)
    with pretend_gpu() as seen:
        scheduler.set_timesteps(20, device="cuda")
        scheduler.set_begin_index(0)
        x = torch.zeros(2, 4, 8, 8, device="cuda")
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x)[0]
            if i == 0:
                seen.uploads.clear()
    assert not seen.waits
    assert not seen.uploads


# --- the contract of diffusers' schedulers ------------------------------------------------


def test_a_scheduler_goes_through_its_config_and_its_files(tmp_path: Path) -> None:
    first = EPDScheduler.from_predictor("sd15-best")
    first.save_pretrained(tmp_path)
    for again in (EPDScheduler.from_pretrained(tmp_path), EPDScheduler.from_config(first.config)):
        assert isinstance(again, EPDScheduler)
        assert again.learned[0].recipe == first.learned[0].recipe
        for s in (first, again):
            s.set_timesteps(50)
        assert torch.equal(again.timesteps, first.timesteps)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = EPDScheduler.from_config(
        {"_class_name": type(flow).__name__, **flow.config}, solver="euler"
    )
    for s in (ours, flow):
        s.set_timesteps(4)
    assert torch.allclose(ours.timesteps, flow.timesteps)
    with pytest.raises(ValueError, match="use from_solver"):
        EPDScheduler.from_config(flow.config, solver="euler")
    other = diffusers.DPMSolverMultistepScheduler.from_config(first.config)
    assert other.config.beta_schedule == "scaled_linear"


def test_the_level_of_noise_is_that_of_the_next_call() -> None:
    scheduler = EPDScheduler.from_predictor("sd15-best")
    scheduler.set_timesteps(30)
    x = torch.zeros(1, 4, 2, 2)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        noise = scheduler.add_noise(torch.zeros(1), torch.ones(1), t[None]).item()
        assert noise == pytest.approx(scheduler.sigmas[i].item(), rel=1e-5)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.zeros_like(x), t, x)[0]
    assert scheduler.sigmas[2] < scheduler.sigmas[1] < scheduler.sigmas[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_edited_in_place_by_a_callback_stay_edited(dtype: torch.dtype) -> None:
    def in_place(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i in (2, 5, 8):
            tensors["latents"].mul_(0.5)
        return tensors

    def anew(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if i in (2, 5, 8) else tensors

    pipe = stock(twins.sd, "sd15-best").to(dtype)
    none, first, second = (
        pipe(TEXT, generator=drawn(0), callback_on_step_end=c, **LATENT).images
        for c in (None, in_place, anew)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(none, first, atol=0.1)


def test_a_callback_of_a_parallel_pipeline_sees_a_row_of_each_image() -> None:
    """Halved after every step of the solver, one way and the other."""
    pipe, seen = quiet(twins.sd()), []

    def halve(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, len(tensors["latents"])))
        return {"latents": tensors["latents"] * (0.5 if i % 2 else 1)}

    fast = parallel(pipe, "sd15-best")(
        [TEXT, "b"], generator=drawn(0, 1), callback_on_step_end=halve, **LATENT
    ).images
    assert seen == [(i, 2) for i in range(20)]

    def halve_slowly(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (0.5 if i % 3 == 2 else 1)}

    pipe.scheduler = EPDScheduler.from_predictor("sd15-best", like=pipe.scheduler)
    slow = pipe(
        [TEXT, "b"], generator=drawn(0, 1), callback_on_step_end=halve_slowly, **LATENT
    ).images
    assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_a_pipeline_that_a_callback_interrupts_gives_a_row_of_each_image(count: int) -> None:
    def interrupt(pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert tensors.keys() == {"prompt_embeds"}
        pipe._interrupt = i == 2
        return {}

    images = parallel(quiet(twins.sd()), "sd15-best")(
        [TEXT] * count, callback_on_step_end=interrupt,
        callback_on_step_end_tensor_inputs=["prompt_embeds"], **LATENT,
    ).images  # fmt: skip
    assert len(images) == count


def test_guidance_as_rows_takes_the_texts_of_every_encoder() -> None:
    pipe = quiet(twins.sd3())
    texts = {"prompt_2": "b", "prompt_3": "c", "negative_prompt": "d", "negative_prompt_2": "e"}
    given = {"prompt": TEXT, **texts, **LATENT}
    rows, theirs = (
        parallel(pipe, "sd3-512-best", guidance=kind)(**given, generator=drawn(3)).images
        for kind in ("rows", "pipeline")
    )
    assert torch.allclose(rows, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hidream", "sd3"])
@pytest.mark.parametrize("prompt", [TEXT, [TEXT, "b"]])
def test_copies_of_prompts_are_the_pipelines_own(name: str, prompt: Any) -> None:
    """Also where layers stand before rows."""
    pipe = twins.twin(name)
    given = {"prompt": prompt, "device": "cpu", "num_images_per_prompt": 3}
    given |= {"prompt_2": None, "prompt_3": None}
    ours, theirs = (f(**given) for f in (CachedPrompts(pipe).installed(), pipe.encode_prompt))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_takes_rows() -> None:
    pipe = quiet(twins.sd3())
    plain = parallel(pipe, "sd3-512-best")(TEXT, generator=drawn(3), **LATENT).images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    compiled = parallel(pipe, "sd3-512-best")(TEXT, generator=drawn(3), **LATENT).images
    assert torch.allclose(compiled, plain, atol=1e-5)


def test_a_hand_made_solver_takes_what_the_pipelines_own_would() -> None:
    """Sigmas of the caller's own, timesteps, spacings and their ends, zero terminal SNR."""
    pipe, four = quiet(twins.sdxl()), {"num_inference_steps": 4}
    base = pipe.scheduler.config
    for options, config in (
        ({"timesteps": [900, 500, 100]}, {}),
        (four, {"use_karras_sigmas": True}),
        (four, {"timestep_spacing": "trailing"}),
        (four, NO_SIGNAL),
        (four, NO_SIGNAL | {"beta_schedule": "linear", "beta_end": 0.02}),
        *((four, {f"use_{s}_sigmas": True, **ENDS}) for s in ("karras", "exponential", "beta")),
    ):
        own = diffusers.EulerDiscreteScheduler.from_config(base, **config)
        results = []
        for scheduler in (own, EPDScheduler.from_solver("euler", like=own)):
            pipe.scheduler = scheduler
            results.append(pipe(TEXT, generator=drawn(3), **options, **LATENT).images)
        assert torch.allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "KDPM2Discrete", "PNDM", "UniPCMultistep"],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_a_level_goes_with_its_timestep_whatever_the_pipelines_scheduler(name: str) -> None:
    """Also where that stands at some levels twice, or between them."""
    like = getattr(diffusers, f"{name}Scheduler")(**SD, timestep_spacing="trailing")
    scheduler = EPDScheduler.from_solver("euler", like=like)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5
    table = scheduler.model.table
    assert table is not None
    expected = table.sigma_inv(scheduler.sigmas[:-1])
    assert (scheduler.timesteps - expected).abs().max() < 1.0


def test_a_scheduler_of_any_kind_is_asked_before_its_steps_are_set() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = EPDScheduler.from_solver("euler", like=flow)
    assert (scheduler.init_noise_sigma, len(scheduler)) == (1.0, len(flow))
    discrete = EPDScheduler.from_solver("euler", like=diffusers.EulerDiscreteScheduler(**SD))
    with pytest.raises(ValueError, match=r"call scheduler\.set_timesteps"):
        assert discrete.init_noise_sigma


def test_several_predictors_are_chosen_by_their_calls(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = EPDScheduler.from_predictor(
        "exps/tiny-sd3/*-k2-*.pkl", like=twins.sd3(scheduler={"shift": 1}).scheduler
    )
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 15
    assert not caplog.messages
    scheduler.set_timesteps(4)
    assert caplog.messages == ["4 predictors of 4 calls: the first of them is taken"]
    plain = next(predictor for predictor in scheduler.learned if predictor.nfe == 6)
    assert plain.table.guidance is None  # epd-k2-6nfe, not epd-k2-6nfe-tuned
    with pytest.raises(ValueError, match=r"no predictor of 11 calls.* 6, 7, 10, 14, 20"):
        scheduler.set_timesteps(11)


# --- image to image and inpainting --------------------------------------------------------


def image_to_image(pipe: Any, **options: Any) -> Any:
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    image = torch.full((1, 3, 16, 16), 0.5)
    calls: list[int] = []

    def count(*args: Any) -> Any:
        calls.append(args[1])
        return args[3]

    given = {"image": image, "generator": drawn(3), "output_type": "latent", **options}
    result = quiet(other)(TEXT, callback_on_step_end=count, **given).images
    return result, len(calls)


def test_image_to_image_runs_its_strength() -> None:
    """All points in one call or one after another, from half of the way."""
    slow, calls = image_to_image(
        stock(twins.sd, "sd15-best"), num_inference_steps=30, strength=0.5
    )
    assert calls == 15
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **twins.sd().components, requires_safety_checker=False
    )
    image = torch.full((1, 3, 16, 16), 0.5)
    given = {"image": image, "strength": 0.5, "generator": drawn(3), "output_type": "latent"}
    fast = parallel(quiet(other), "sd15-best")(TEXT, **given).images
    assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-4)


def test_image_to_image_is_refused_inside_an_interval() -> None:
    with pytest.raises(ValueError, match=r"timestep 14 of 30 is inside.*strength of 1, 0\.9"):
        image_to_image(stock(twins.sd, "sd15-best"), num_inference_steps=30, strength=0.55)


@pytest.mark.parametrize("steps", [10, 29, 50, 200])
@pytest.mark.parametrize(
    ("kind", "maker", "name"),
    [
        ("StableDiffusionImg2ImgPipeline", twins.sd, "sd15-best"),
        ("StableDiffusionXLImg2ImgPipeline", twins.sdxl, "sd15-best"),
        ("StableDiffusion3Img2ImgPipeline", twins.sd3, "sd3-512-best"),
        ("StableDiffusionInpaintPipeline", twins.sd, "sd15-best"),
    ],
)
def test_strength_with_other_steps_than_the_tables_is_one_line(
    kind: str, maker: Any, name: str, steps: int
) -> None:
    """A pipeline counts its strength in steps of the call, which are not the solver's."""
    pipe = stock(maker, name)
    names = inspect.signature(getattr(diffusers, kind).__init__).parameters
    parts = {n: v for n, v in pipe.components.items() if n in names}
    extra = {n: False for n in ("requires_safety_checker", "add_watermarker") if n in names}
    other = quiet(getattr(diffusers, kind)(**parts, **extra))
    given = {"image": torch.full((1, 3, 16, 16), 0.5), "strength": 0.5, "generator": drawn(3)}
    given |= SIZE if "SD3" in kind or "Diffusion3" in kind else {}
    given |= {"mask_image": torch.ones(1, 1, 16, 16)} if "Inpaint" in kind else {}
    with pytest.raises(ValueError, match=r"takes \d+ timesteps: give num_inference_steps=") as e:
        other(TEXT, num_inference_steps=steps, **given)
    assert "\n" not in str(e.value)


def test_inpainting_keeps_what_it_keeps_at_the_level_of_every_call() -> None:
    """With the whole picture kept, x is the kept picture and the same noise, call by call."""
    pipe, seen = twins.sd(), []
    other = quiet(
        diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    )
    with pytest.raises(ValueError, match="noises what it keeps to one level"):
        parallel(other, "sd15-best", points="rows")
    other.unet.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    kept = parallel(other, "sd15-best")(
        TEXT, image=torch.full((1, 3, 16, 16), 0.5), mask_image=torch.zeros(1, 1, 16, 16),
        generator=drawn(3), guidance_scale=1.0, **LATENT,
    ).images  # fmt: skip
    scheduler = EPDScheduler.from_predictor("sd15-best", like=pipe.scheduler)
    scheduler.set_timesteps(30)
    levels = scheduler.sigmas[1:-1]
    noises = [
        (x * (1 + level**2) ** 0.5 - kept) / level
        for x, level in zip(seen[1:], levels, strict=True)
    ]
    assert torch.allclose(
        torch.stack(noises[:-2]), noises[0].expand(27, -1, -1, -1, -1), atol=1e-3
    )


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "like", "words"),
    [
        ("sd3-512-best", diffusers.DDIMScheduler(**SD), "not for DDIMScheduler.*a VP process"),
        ("sd15-best", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "flow matching"),
        ("sd15-best", diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True), "rescale_betas"),
        ("sd15-best", diffusers.EDMEulerScheduler(), "EDMEulerScheduler is not served"),
        (
            "sd15-best",
            diffusers.EulerDiscreteScheduler(timestep_type="continuous"),
            "timestep_type",
        ),
        ("flux-best", diffusers.FlowMatchEulerDiscreteScheduler(**NOISY), "it draws noise"),
        (
            "sd3-512-best",
            diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            "shift is",
        ),
        ("sd3-512-best", diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), "shift is another"),
        (
            "flux-best",
            diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
            "has one shift",
        ),
        (
            "sd3-512-best",
            diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
            "shift is another",
        ),
        ("cifar10-5nfe", None, "needs the scheduler of its model: like="),
        ("cifar10-5nfe", diffusers.DDIMScheduler(**SD), "start at 80"),
        ("exps/none-*.pkl", None, "no predictor is named"),
        ([], None, "a predictor is a file"),
        (Path("exps/sd15/sd15-best.pkl"), "DDIMScheduler", "like is a str: give pipe.scheduler"),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(name: Any, like: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EPDScheduler.from_predictor(name, like=like)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"timesteps": [100, 500, 900]}, "falling levels"),
        ({"num_inference_steps": 3, "timesteps": [900, 100]}, "Can only pass one of"),
        ({"sigmas": [1.0, 2.0]}, "falling levels"),
    ],
)
def test_no_timestep_of_the_callers_is_dropped(given: dict[str, Any], words: str) -> None:
    scheduler = EPDScheduler.from_solver("euler", like=diffusers.EulerDiscreteScheduler(**SD))
    with pytest.raises(ValueError, match=words):
        scheduler.set_timesteps(**given)


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        (
            {},
            {"num_inference_steps": 28},
            "of 28 calls: num_inference_steps may be 20",
        ),
        ({"guidance": "rows"}, {"prompt": None}, "takes texts"),
        ({"guidance": "columns"}, {}, "pipeline or rows"),
        ({"guidance": "rows", "points": "sequence"}, {}, "cannot take guidance as rows"),
        ({"guidance": "rows"}, {"guidance_rescale": 0.7}, "guidance_rescale does not go"),
        ({"guidance": "rows"}, {"negative_prompt": ["a", "b"]}, "has 2 texts for 1 prompts"),
        ({}, {"timesteps": [900, 100]}, "timesteps does not go"),
        ({}, {"callback": print}, "use callback_on_step_end"),
    ],
)
def test_calls_that_cannot_be_served_are_refused(
    options: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        parallel(quiet(twins.sd()), "sd15-best", **options)(**{"prompt": TEXT, **given, **LATENT})


# --- our own loop on a pipeline's parts ---------------------------------------------------


def test_parallel_pipeline_is_our_loop_on_the_parts_of_today() -> None:
    """With a plain string for every seed, and text encoders that a LoRA changes between calls."""
    pipe = twins.sd()
    fast = parallel_pipeline(pipe, "sd15-best", size=(16, 16))
    for seed, image in zip((3, 4), fast(TEXT, seeds=[3, 4]), strict=True):
        pixels = torch.tensor(list(image.tobytes())).reshape(16, 16, 3).float()
        (expected,) = ours(pipe, "sd15-best", [seed]).permute(0, 2, 3, 1) * 255
        assert torch.allclose(pixels, expected, atol=0.6)
    before = fast(TEXT, seeds=[3])[0].tobytes()
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.weight.mul_(-3)
    assert fast(TEXT, seeds=[3])[0].tobytes() != before
    with pytest.raises(ValueError, match="for 512 pixels"):
        parallel_pipeline(twins.sd3(), "sd3-512-best")
