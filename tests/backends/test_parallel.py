"""What a call by `parallel`, or under our scheduler, leaves and takes besides pictures."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from backends import families
from backends.any_pipeline import any_backend
from backends.ldm import ldm_backend
from backends.parallel import parallel
from backends.scheduler import EPDScheduler
from solvers.field import Field
from solvers.predictor import Predictor
from tests import twins
from tests.backends.test_families import CPU, SMALL, TEXT, call, close, drawn, learned, twin
from tests.backends.test_variants import EMBEDS, FROM, SIZE, of

diffusers = twins.diffusers
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "Future", "User")
]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_kandinsky_from_an_image_starts_at_the_noise_of_its_own_scheduler() -> None:
    """It hands x to its network as it is, and noises its picture by the scheduler alone."""
    pipe = quiet(of("KandinskyV22Img2ImgPipeline", "kandinsky22")())
    pipe.scheduler = diffusers.DDIMScheduler(**twins.SD_SCHEDULER | {"clip_sample": False})
    embeds = {"image_embeds": EMBEDS[0, :1], "negative_image_embeds": EMBEDS[1, :1]}
    given = {**SIZE, **FROM, **embeds, "num_inference_steps": 6, "output_type": "pt"}
    theirs = pipe(**given, generator=drawn(3))[0]
    pipe.scheduler = EPDScheduler.from_solver("euler", like=pipe.scheduler)
    pipe.scheduler.plain = True
    assert close(pipe(**given, generator=drawn(3))[0], theirs)


def test_a_pipeline_has_its_own_config_after_a_call() -> None:
    pipe = quiet(twins.sd3())
    before = dict(pipe.config)
    parallel(pipe, learned(pipe, "epd"))(TEXT, output_type="latent", **SIZE)
    assert dict(pipe.config) == before


@pytest.mark.parametrize("rate", [0.0, 1.0, 3.0])
def test_guidance_as_rows_takes_every_rate(rate: float) -> None:
    """Of the kind that starts at 0, both are the pipeline's negative prompt alone."""
    pipe = quiet(twins.sd3())
    fast = parallel(pipe, learned(pipe, "epd"), guidance="rows")
    (images,) = fast(TEXT, guidance_scale=rate, output_type="latent", **SIZE, return_dict=False)
    assert images.shape == (1, *images.shape[1:])
    assert bool(images.isfinite().all())


@pytest.mark.parametrize("name", ["flux", "flux2", "hunyuan_video"])
def test_a_network_that_is_told_its_guidance_is_told_the_tables(name: str) -> None:
    pipe = twin(name)
    plain = learned(pipe, "epd", mu=0.8)  # FLUX.2's own hangs on the number of calls
    if not families.network_of(pipe).config.get("guidance_embeds"):
        pipe.transformer.register_to_config(guidance_embeds=True)

    def guided(rates: Tensor) -> Predictor:
        return replace(plain, table=replace(plain.table, guidance=rates.double()))

    def drawn_by(predictor: Predictor, points: str, **more: Any) -> Tensor:
        return call(pipe, name, parallel(pipe, predictor, points=points), **more)

    two = {"prompt": [TEXT, "a dog"]}
    constant = drawn_by(guided(torch.full((3,), 2.5)), "rows", **two, generator=drawn(3, 4))
    by_argument = drawn_by(plain, "rows", guidance_scale=2.5, **two, generator=drawn(3, 4))
    assert torch.equal(constant, by_argument)
    of_points = guided(torch.tensor([[1.0, 2.0], [3.0, 4.5], [6.0, 0.5]]))
    rows, sequence = (drawn_by(of_points, points) for points in ("rows", "sequence"))
    assert close(rows, sequence)
    assert not close(rows, drawn_by(plain, "rows", guidance_scale=2.5), 1e-4)


def test_embeddings_of_another_dtype_are_made_anew() -> None:
    pipe = quiet(twins.sdxl()).to(torch.bfloat16)
    fast = parallel(pipe, learned(pipe, "epd"))
    given = {"output_type": "latent", **SIZE}
    fast(TEXT, **given)
    pipe.to(torch.float32)
    assert fast(TEXT, **given)[0].dtype == torch.float32


def test_solvers_of_two_calls_start_within_an_image() -> None:
    pipe = quiet(of("StableDiffusionImg2ImgPipeline", "sd", requires_safety_checker=False)())
    pipe.scheduler = EPDScheduler.from_solver("heun", like=pipe.scheduler)
    given = {**FROM, "strength": 0.8, "output_type": "latent", "num_inference_steps": 10}
    assert bool(pipe(TEXT, **given)[0].isfinite().all())


def test_what_the_rows_of_a_call_cannot_take_is_refused() -> None:
    pipe = quiet(of("StableDiffusionXLImg2ImgPipeline", "sdxl")())
    fast = parallel(pipe, learned(pipe, "epd"))
    with pytest.raises(ValueError, match='from an image take points="sequence"'):
        fast(TEXT, **FROM, latents=torch.zeros(1, 4, 8, 8))
    pipe.register_to_config(requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="an aesthetic score of their own"):
        parallel(pipe, learned(pipe, "epd"), guidance="rows")


def test_a_predictor_of_another_family_is_refused_unless_told() -> None:
    pipe = quiet(twins.sdxl())
    with pytest.raises(ValueError, match=r"is for ldm .*give any_family=True"):
        parallel(pipe, "sd15-best")
    parallel(pipe, "sd15-best", any_family=True)
    inpaint = of("StableDiffusionInpaintPipeline", "sd", requires_safety_checker=False)()
    parallel(inpaint, "sd15-best")
    with pytest.raises(ValueError, match="learned with an exponential shift"):
        parallel(twin("cogview4"), "flux-best", any_family=True)


def test_a_video_that_is_noised_and_then_scaled_begins_at_its_own_noise() -> None:
    pipe = quiet(of("CogVideoXVideoToVideoPipeline", "cogvideox")())
    video = [Image.fromarray((torch.rand(64, 64, 3) * 255).byte().numpy())] * 5
    given = {**SIZE, "video": video, "prompt": TEXT, "strength": 0.8, "output_type": "latent"}
    given |= {"num_inference_steps": 10, "guidance_scale": 3.0}
    theirs = pipe(**given, generator=torch.Generator().manual_seed(3))[0]
    pipe.scheduler = EPDScheduler.from_solver("dpmpp-2", like=pipe.scheduler)
    assert close(pipe(**given, generator=torch.Generator().manual_seed(3))[0], theirs, 1e-4)


def test_a_pipeline_that_never_scales_its_noise_is_served_as_it_is() -> None:
    kind = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
    network = diffusers.DiTTransformer2DModel(
        **kind, num_layers=1, sample_size=8, num_embeds_ada_norm=1000
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = quiet(diffusers.DiTPipeline(network.eval(), twins.vae(), scheduler))
    given = {"class_labels": [1], "output_type": "np", "num_inference_steps": 6}
    theirs = pipe(**given, generator=drawn(3)[0])[0]
    assert not families.scales(pipe)
    pipe.scheduler = EPDScheduler.from_solver("euler", like=scheduler)
    with pytest.raises(ValueError, match="steps x as its network sees it: use parallel"):
        pipe(**given)  # it steps what it scaled
    pipe.scheduler.plain = True  # as `parallel` sets it
    ours = pipe(**given, generator=drawn(3)[0])[0]
    assert close(torch.from_numpy(ours), torch.from_numpy(theirs))


def test_more_arguments_of_a_config_change_the_pipelines_own() -> None:
    like = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    changed = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **like.config}
    ours = EPDScheduler.from_config(config, solver="euler", shift=5.0)
    again = EPDScheduler.from_config(EPDScheduler.from_solver("euler", like).config, shift=5.0)
    changed.set_timesteps(5)
    for scheduler in (ours, again):
        scheduler.set_timesteps(5)
        assert close(scheduler.sigmas[:-1], changed.sigmas[:-1])
    with pytest.raises(ValueError, match="has no shfit"):
        EPDScheduler.from_config(config, solver="euler", shfit=5.0)


def test_latent_diffusion_follows_the_scheduler_that_is_there() -> None:
    pipe = twins.sd()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="flow matching in the scheduler's config"):
        ldm_backend(pipe, CPU, SMALL)
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample in the scheduler's config"):
        ldm_backend(pipe, CPU, SMALL)


def test_what_a_pipeline_mixes_by_itself_is_refused_and_its_templates_are_seen() -> None:
    pipe = quiet(twins.twin("flux2_klein"))
    pipe.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match="it is distilled, and takes none"):
        parallel(pipe, learned(pipe, "epd"), guidance="rows")
    pipe = quiet(twins.twin("bria"))
    given = {**SIZE, "prompt": TEXT, "negative_prompt": "a dog", "output_type": "latent"}
    with pytest.raises(ValueError, match=r"normalize does not go .*: it takes all rows together"):
        parallel(pipe, learned(pipe, "epd"))(**given, normalize=True)
    with pytest.raises(ValueError, match=r"clip_value does not go .*: the solver mixes guidance"):
        parallel(pipe, learned(pipe, "epd"), guidance="rows")(**given, clip_value=0.5)
    with pytest.raises(ValueError, match=r"has levels that start at 83\.82, those of DDIM"):
        parallel(quiet(twins.sd()), "lsun-bedroom-5nfe")
    pipe = quiet(twins.sd3())
    fast = parallel(pipe, learned(pipe, "epd"))
    given = {**SIZE, "prompt": "a red fox and a long story of a dog", "output_type": "latent"}
    before = fast(**given, generator=drawn(3)).images
    pipe.tokenizer_max_length = 5
    assert not close(fast(**given, generator=drawn(3)).images, before)


def test_two_threads_on_one_pipeline_take_turns() -> None:
    pipe = quiet(twins.sd3())
    fast = [parallel(pipe, learned(pipe, "epd", n=n)) for n in (3, 2)]
    own, encode = pipe.scheduler, pipe.encode_prompt

    def latents(i: int) -> Tensor:
        return fast[i % 2](TEXT, output_type="latent", **SIZE, generator=drawn(i))[0]

    wanted = [latents(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        given = list(pool.map(latents, range(6)))
    assert all(map(torch.equal, given, wanted))
    assert pipe.scheduler is own
    assert pipe.encode_prompt == encode


@pytest.mark.parametrize("points", ["rows", "sequence"])
def test_noise_beyond_half_precision_is_handed_over_scaled(
    points: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepFloyd IF's levels begin at 20,291."""
    betas = {"beta_schedule": "squaredcos_cap_v2"}
    whole = quiet(twins.twin("if", scheduler=betas))
    noise = torch.randn(1, 3, 16, 16, generator=drawn(1)[0]).half()
    draw = "diffusers.pipelines.deepfloyd_if.pipeline_if.randn_tensor"  # float16 has others
    monkeypatch.setattr(draw, lambda _shape, dtype, **_: noise.to(dtype))

    def by(pipe: Any) -> Tensor:
        predictor = learned(pipe, "epd-multistep")
        return call(pipe, "if", parallel(pipe, predictor, points=points)).float()

    half = quiet(twins.twin("if", scheduler=betas)).to(torch.float16)
    assert close(by(half), by(whole), 1e-2)
    half.scheduler = EPDScheduler.from_predictor(learned(half, "epd"), like=half.scheduler)
    with pytest.raises(ValueError, match=r"float16 has no room .* use parallel"):
        call(half, "if")


def test_noise_of_another_number_of_steps_is_refused() -> None:
    """Latent diffusion asks how strong noise is before it says its number of steps."""
    sizes = {"block_out_channels": (32,), "sample_size": 8, "in_channels": 4, "out_channels": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = diffusers.UNet2DModel(**sizes, **blocks, layers_per_block=1)
    like = diffusers.DDIMScheduler(clip_sample=False)
    pipe = quiet(diffusers.LDMPipeline(vqvae=twins.vae(), unet=network.eval(), scheduler=like))
    pipe.scheduler = EPDScheduler.from_solver("unipc-2", like=like)
    with pytest.raises(ValueError, match=r"call scheduler.set_timesteps"):
        pipe(num_inference_steps=6)
    pipe.scheduler.set_timesteps(6)
    pipe(num_inference_steps=6)
    pipe.scheduler.set_timesteps(40)
    with pytest.raises(ValueError, match="noise of another number of steps"):
        pipe(num_inference_steps=6)


def test_a_shift_by_size_that_a_pipeline_keeps_for_its_own_scheduler_is_refused() -> None:
    pipe = quiet(twins.twin("bria", scheduler={"use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match="use_dynamic_shifting=False and a shift"):
        call(pipe, "bria", parallel(pipe, learned(pipe, "epd")))
    pipe.scheduler = EPDScheduler.from_solver("euler", like=pipe.scheduler)
    with pytest.raises(ValueError, match="use_dynamic_shifting=False and a shift"):
        call(pipe, "bria")


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("dpmpp", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")],
)
def test_solvers_by_name_lower_their_orders_as_diffusers_does(
    name: str, kind: str, flow: bool, steps: int
) -> None:
    more = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    more = more if flow else twins.CONFIGS["sd"]["scheduler"]
    more = {n: v for n, v in more.items() if n.startswith(("beta", "pred", "use", "flow"))}

    def end(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 4, 8, 8, generator=drawn(0)[0]) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            shown = scheduler.scale_model_input(x, t)
            d = torch.tanh(1.3 * shown + 0.2 * torch.sin(t / 300))
            x = scheduler.step(d, t, x, return_dict=False)[0]
        return x

    for order in (1, 2, 3):
        for last in ("zero", "sigma_min"):
            theirs = getattr(diffusers, kind)(**more, solver_order=order, final_sigmas_type=last)
            ours = EPDScheduler.from_solver(f"{name}-{order}", theirs)
            if (name, flow, last) == ("unipc", True, "sigma_min"):
                with pytest.raises(ValueError, match="unipc needs final_sigmas_type='zero'"):
                    end(ours)
            else:
                assert close(end(ours), end(theirs)), (order, last)


@pytest.mark.parametrize("name", ["sd", "kandinsky3", "sd, plain"])
@pytest.mark.parametrize("points", ["rows", "sequence"])
def test_a_first_interval_without_a_call_is_passed(name: str, points: str) -> None:
    """Parallel multistep with AFS, which makes its first call in the second interval."""
    pipe = quiet(twins.twin(name.partition(",")[0]))
    backend = any_backend(pipe, CPU, SMALL)
    predictor = learned(pipe, "epd-multistep", n=4)
    predictor = replace(predictor, recipe=replace(predictor.recipe, afs=True))
    sampler, cond = predictor.sampler(backend.levels), backend.encode([TEXT])
    noise = torch.randn(1, *backend.shape, generator=drawn(5)[0])
    *_, wanted = sampler.states(Field(backend.guided(3.0, cond), cond), noise * sampler.sigmas[0])
    if name == "sd, plain":  # as if it handed its network x as it is
        pipe.scheduler = EPDScheduler.from_predictor(predictor, pipe.scheduler)
        pipe.scheduler.plain = True
        fast: Any = pipe
    elif points == "rows" and families.one_time(pipe):
        return
    else:
        fast = parallel(pipe, predictor, points=points)
    assert close(call(pipe, "sd", fast, latents=noise), wanted)


def test_a_scheduler_of_a_config_shows_pipelines_its_changes() -> None:
    like = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = EPDScheduler.from_solver("euler", like)
    changed = EPDScheduler.from_config(ours.config, max_shift=3.0)
    assert changed.config["max_shift"] == changed.like.config["max_shift"] == 3.0


def test_a_callback_that_switches_guidance_of_rows_is_refused() -> None:
    pipe = quiet(twins.sd3())
    fast = parallel(pipe, learned(pipe, "epd"), guidance="rows")

    def off(pipe: Any, _step: int, _time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return tensors

    with pytest.raises(ValueError, match="switches guidance"):
        fast(TEXT, guidance_scale=3.0, output_type="latent", callback_on_step_end=off, **SIZE)
