"""Pipelines from pictures, with parts of twins: points as rows, or one by one, are the same."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from backends.any_pipeline import any_backend
from backends.families import one_time, scales
from backends.parallel import parallel
from backends.parametrization import parametrization_of, shifted_end
from backends.scheduler import EPDScheduler
from tests import twins
from tests.backends.test_families import CPU, SMALL, TEXT, close, drawn, learned

diffusers = twins.diffusers
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "Future", "User")
]


IMAGE = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
SIZE = {"height": 16, "width": 16}
FROM = {"image": IMAGE[..., :16, :16], "strength": 2 / 3}


def controlled() -> Any:
    pipe = twins.sd()
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(8, 8)
    )
    for parameter in control.controlnet_down_blocks.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=control, requires_safety_checker=False
    )


def flux_controlled() -> Any:
    pipe = twins.flux()
    control = diffusers.FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
    )  # fmt: skip
    parts = {
        n: v for n, v in pipe.components.items() if n not in ("image_encoder", "feature_extractor")
    }
    return diffusers.FluxControlNetPipeline(**parts, controlnet=twins.seeded(control))


def qwen_controlled() -> Any:
    pipe = twins.twin("qwen")
    names = inspect.signature(diffusers.QwenImageControlNetModel.__init__).parameters
    config = {n: v for n, v in pipe.transformer.config.items() if n in names}
    control = twins.seeded(diffusers.QwenImageControlNetModel(**config))
    return of("QwenImageControlNetPipeline", "qwen", controlnet=control)()


def framepack() -> Any:
    transformer = {
        "_class_name": "HunyuanVideoFramepackTransformer3DModel", "has_image_proj": True,
        "image_proj_dim": 16, "has_clean_x_embedder": True,
    }  # fmt: skip
    kind = "HunyuanVideoFramepackPipeline"
    others = {"image_encoder": None, "feature_extractor": None}
    pipe = of(kind, "hunyuan_video", transformer=transformer, **others)()
    pipe.encode_image = lambda image, **_: torch.ones(len(image), 4, 16)
    return pipe


def edited(kind: str, *size: Any, family: str = "qwen", **changes: Any) -> Any:
    """A pipeline that edits pictures, of this size and not of 1024 x 1024."""
    module: Any = inspect.getmodule(getattr(diffusers, kind))
    module.calculate_dimensions = lambda *_: size
    return of(kind, family, **(changes or {"processor": None}))()


def skyreels() -> Any:
    transformer = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 32}
    kind, others = "SkyReelsV2ImageToVideoPipeline", {"image_encoder": None}
    pipe = of(kind, "skyreels", transformer=transformer, image_processor=None, **others)()
    pipe.encode_image = lambda *_: twins.words([TEXT], 4)
    return pipe


def kandinsky5_edited() -> Any:
    pipe = of("Kandinsky5I2IPipeline", "kandinsky5", transformer=SEEING)()
    pipe.resolutions, pipe.vae_scale_factor_spatial = [(16, 16)], 2
    return pipe


def kandinsky5_from_an_image() -> Any:
    vae = twins.part("vae", twins.CONFIGS["hunyuan_video"]["vae"])
    return of("Kandinsky5I2VPipeline", "kandinsky5", transformer=SEEING, vae=vae)()


class Processor:
    """What stands for a processor, of which LongCat-Image's edit asks that of its pictures."""

    image_processor = None


def of(kind: str, family: str, **changes: Any) -> Callable[[], Any]:
    """Another pipeline of a twin's parts, with `changes` of them or besides them."""

    def build() -> Any:
        names = inspect.signature(getattr(diffusers, kind).__init__).parameters
        more = {n: v for n, v in changes.items() if not isinstance(v, dict)}
        pipe = twins.twin(family, **{n: v for n, v in changes.items() if n not in more})
        parts = {n: v for n, v in pipe.components.items() if n in names}
        other = getattr(diffusers, kind)(**parts | more)
        method, _ = twins.STUBS.get(family, ("", None))
        replaced = {n: v for n, v in vars(pipe).items() if n == method}
        vars(other).update(replaced)
        return other

    return build


def ltx2_from_an_image() -> Any:
    pipe = of("LTX2ImageToVideoPipeline", "ltx2")()
    pipe.vae_spatial_compression_ratio = 32  # its tiny VAE says 64
    return pipe


SEEING = {"visual_cond": True}
MASKED = FROM | SIZE | {"mask_image": torch.ones(1, 1, 16, 16)}
LAYERED = {"processor": None, "transformer": {"use_additional_t_cond": True}}
FIBO = ['{"edit_instruction": "red"}', '{"edit_instruction": "a dog"}']
SMALL_PICTURE = Image.new("RGB", (16, 16), (90, 50, 10))
GUIDED = {"negative_prompt": "bad", "true_cfg_scale": 3.0}
TWO = GUIDED | {"prompt": [TEXT, "a dog"], "negative_prompt": ["bad", "worse"]}
EMBEDS = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1))
VARIANTS = {
    "Qwen-Image with ControlNet": (
        qwen_controlled, SIZE | TWO | {"control_image": FROM["image"]}
    ),
    "Qwen-Image, edited": (
        partial(edited, "QwenImageEditPipeline", 16, 16, None),
        SIZE | TWO | {"image": SMALL_PICTURE},
    ),
    "Qwen-Image, edited from two pictures": (
        partial(edited, "QwenImageEditPlusPipeline", 16, 16),
        SIZE | GUIDED | {"image": [SMALL_PICTURE] * 2},
    ),
    "Framepack": (
        framepack,
        {"image": Image.new("RGB", (32, 32), (90, 50, 10)), "height": 32, "width": 32,
         "num_frames": 9, "latent_window_size": 2, "output_type": "pt"},
    ),
    "IF from an image": (
        of("IFImg2ImgPipeline", "if", requires_safety_checker=False),
        FROM | {"output_type": "pt"},
    ),
    "Kandinsky 2.2": (
        partial(twins.twin, "kandinsky22"),
        SIZE | {"prompt": None, "image_embeds": EMBEDS[0], "negative_image_embeds": EMBEDS[1]},
    ),
    "SDXL from an image": (of("StableDiffusionXLImg2ImgPipeline", "sdxl"), FROM),
    "SD3 from an image": (of("StableDiffusion3Img2ImgPipeline", "sd3"), FROM | SIZE),
    "FLUX.1 from an image": (of("FluxImg2ImgPipeline", "flux"), FROM | SIZE),
    "Qwen-Image from an image": (
        of("QwenImageImg2ImgPipeline", "qwen"), FROM | SIZE | {"negative_prompt": "bad"}
    ),
    "SDXL, a part of an image": (
        of("StableDiffusionXLInpaintPipeline", "sdxl"),
        FROM | SIZE | {"mask_image": torch.ones(1, 1, 16, 16), "strength": 2 / 3},
    ),
    "SDXL with perturbed attention": (of("StableDiffusionXLPAGPipeline", "sdxl"), SIZE),
    "FLUX.1 Kontext": (
        of("FluxKontextPipeline", "flux"),
        SIZE | {"image": FROM["image"], "_auto_resize": False, "max_area": 256},
    ),
    "FLUX.1 with ControlNet, its picture drawn from the VAE": (
        flux_controlled,
        SIZE | {"control_image": FROM["image"], "prompt": [TEXT, "a dog"],
                "negative_prompt": "bad", "true_cfg_scale": 3.0},
    ),
    "FLUX.1 Fill": (
        of("FluxFillPipeline", "flux", transformer={"in_channels": 48, "out_channels": 16}),
        SIZE | {"image": FROM["image"], "mask_image": torch.ones(1, 1, 16, 16)},
    ),
    "Wan from an image": (
        of("WanImageToVideoPipeline", "wan", transformer={"in_channels": 12}),
        {"image": Image.new("RGB", (32, 32), (90, 50, 10)), "height": 32, "width": 32,
         "num_frames": 5},
    ),
    "LTX from conditions": (
        of("LTXConditionPipeline", "ltx", scheduler={"use_dynamic_shifting": False}),
        {"image": IMAGE, "height": 64, "width": 64, "num_frames": 9},
    ),
    "SD1.5 with ControlNet": (controlled, {"image": FROM["image"], **SIZE}),
    "LTX from an image": (
        of("LTXImageToVideoPipeline", "ltx"),
        {"image": IMAGE, "height": 64, "width": 64, "num_frames": 9},
    ),
    "LTX-2 from an image": (
        ltx2_from_an_image,
        {"image": IMAGE, "image_crf": 0, "height": 64, "width": 64, "num_frames": 17},
    ),
    "Wan from a video": (
        of("WanVideoToVideoPipeline", "wan"),
        {"video": [Image.new("RGB", (32, 32), (90, 50, 10))] * 5, "strength": 2 / 3,
         "height": 32, "width": 32},
    ),
    "Z-Image from an image": (
        of("ZImageImg2ImgPipeline", "z_image"), FROM | SIZE | {"prompt": [TEXT, "a dog"]}
    ),
    "Z-Image, a part of an image": (of("ZImageInpaintPipeline", "z_image"), MASKED),
    "Chroma from an image": (
        of("ChromaImg2ImgPipeline", "chroma"), FROM | SIZE | {"prompt": [TEXT, "a dog"]}
    ),
    "SkyReels-V2 from an image": (
        skyreels, {"image": IMAGE[..., :32, :32], "height": 32, "width": 32, "num_frames": 5}
    ),
    "LongCat-Image, edited": (
        partial(edited, "LongCatImageEditPipeline", 16, 16, family="longcat",
                text_processor=Processor),
        {"image": SMALL_PICTURE, "num_images_per_prompt": 1},
    ),
    "Qwen-Image, layered": (
        lambda: edited("QwenImageLayeredPipeline", 16, 16, text_encoder=twins.clip(), **LAYERED),
        GUIDED | {"image": SMALL_PICTURE, "layers": 2, "output_type": "pt"},
    ),
    "FIBO, edited": (
        of("BriaFiboEditPipeline", "bria_fibo"),
        {"image": SMALL_PICTURE, "height": 32, "width": 32, "prompt": FIBO,
         "negative_prompt": ["bad", "worse"]},
    ),
    "Ideogram 4": (
        partial(twins.twin, "ideogram"),
        SIZE | {"prompt": [TEXT, "a dog"], "max_sequence_length": 12, "guidance_scale": 3.0,
                "guidance_schedule": None},
    ),
    "Stable unCLIP from an image": (
        partial(twins.twin, "unclip_image"),
        SIZE | {"prompt": [TEXT, "a dog"], "image_embeds": EMBEDS[0], "noise_level": 3},
    ),
    "Stable unCLIP": (
        partial(twins.twin, "unclip"), SIZE | {"prior_num_inference_steps": 2}
    ),
    "LDM3D": (
        of("StableDiffusionLDM3DPipeline", "sd", vae={"in_channels": 6, "out_channels": 6},
           requires_safety_checker=False),
        SIZE | {"prompt": [TEXT, "a dog"], "output_type": "np"},
    ),
    "GLIGEN": (
        of("StableDiffusionGLIGENPipeline", "sd", unet={"attention_type": "gated"},
           requires_safety_checker=False),
        SIZE | {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    ),
    "AnimateDiff SDXL": (
        partial(twins.twin, "animate_diff_sdxl"),
        SIZE | {"num_frames": 2, "prompt": [TEXT, "a dog"]},
    ),
    "Kandinsky 2.1": (
        partial(twins.twin, "kandinsky21"),
        SIZE | {"image_embeds": EMBEDS[0, :1], "negative_image_embeds": EMBEDS[1, :1],
                "output_type": "pt"},
    ),
    "Kandinsky 5 from an image": (
        kandinsky5_from_an_image,
        {"image": IMAGE, "height": 32, "width": 32, "num_frames": 17},
    ),
    "Kandinsky 5, edited": (kandinsky5_edited, SIZE | {"image": FROM["image"]}),
    "DreamLite": (partial(twins.twin, "dreamlite"), SIZE),
    "DreamLite, edited": (partial(twins.twin, "dreamlite"), SIZE | {"image": SMALL_PICTURE}),
}  # fmt: skip


def stacked(images: Any) -> torch.Tensor:
    """Images as one tensor, however a pipeline gives them."""
    return torch.stack([torch.as_tensor(image) for image in images])


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_take_points_as_rows_or_one_by_one(name: str) -> None:
    maker, given = VARIANTS[name]
    pipe, calls = maker(), []
    if name == "IF from an image":  # its levels begin in the hundreds: x0 is a small difference
        pipe.to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    predictor = learned(pipe, "epd")
    given = {"prompt": TEXT, "output_type": "latent", **given}
    seeds = (3, 4) if isinstance(given["prompt"], list) else (3,)
    if given["prompt"] is None:  # two embeddings instead
        seeds, _ = (3, 4), given.pop("prompt")
    if reason := one_time(pipe):
        with pytest.raises(ValueError, match="cannot take points as rows") as error:
            parallel(pipe, predictor, points="rows")
        assert reason in str(error.value)
    network = pipe.components.get("transformer") or pipe.unet
    network.register_forward_hook(lambda *_: calls.append(1))
    fast = stacked(parallel(pipe, predictor)(**given, generator=drawn(*seeds))[0])
    by_rows = len(calls)
    calls.clear()
    pipe.scheduler = EPDScheduler.from_predictor(predictor, like=pipe.scheduler)
    pipe.scheduler.plain = pipe.scheduler.model.table is not None and not scales(pipe)
    slow = pipe(**given, generator=drawn(*seeds), num_inference_steps=predictor.evaluations)[0]
    assert close(fast, stacked(slow))
    assert by_rows == (
        len(calls) if reason else len(calls) * predictor.nfe // predictor.evaluations
    )
    if "strength" in given:  # two of the three intervals, of three calls each
        assert len(calls) in (6, 12)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LongCat-Image, edited", "it takes one prompt a call"),
        ("Qwen-Image, layered", "it takes one prompt a call"),
        ("FIBO, edited", "its prompts are instructions in JSON"),
        ("Stable unCLIP from an image", "its negative prompts have no picture"),
        ("Ideogram 4", "a network of its own stands for the negative prompt"),
    ],
)
def test_negative_prompts_that_cannot_be_rows_are_refused(name: str, why: str) -> None:
    maker, given = VARIANTS[name]
    pipe = maker()
    with pytest.raises(ValueError, match=f"cannot take guidance as rows: {why}"):
        parallel(pipe, learned(pipe, "epd"), guidance="rows")
    if "one prompt" in why:
        with pytest.raises(ValueError, match="mixes 2 prompts of a call up: give one a call"):
            parallel(pipe, learned(pipe, "epd"))(**given | {"prompt": [TEXT, "a dog"]})


def test_depth_has_the_guidance_of_its_picture() -> None:
    pipe = VARIANTS["LDM3D"][0]()
    pipe.set_progress_bar_config(disable=True)
    given = {"negative_prompt": "bad", "guidance_scale": 4.0, "output_type": "np", **SIZE}
    ours, theirs = (
        parallel(pipe, learned(pipe, "epd"), guidance=way)(TEXT, **given, generator=drawn(3))
        for way in ("rows", "pipeline")
    )
    assert all(close(stacked(ours[i]), stacked(theirs[i])) for i in (0, 1))


def test_what_needs_a_picture_is_no_backend_and_says_so() -> None:
    for maker, _ in (VARIANTS[name] for name in ("SDXL from an image", "Wan from an image")):
        with pytest.raises(ValueError, match="it needs image besides the prompt: use parallel"):
            any_backend(maker(), CPU, SMALL)


def test_what_is_for_prompts_alone_does_not_reach_their_negatives() -> None:
    """Sana's instruction, which is eight lines long, and clip_skip."""
    pipe, seen = twins.twin("sana"), []
    pipe.set_progress_bar_config(disable=True)
    embed = pipe._get_gemma_prompt_embeds

    def spy(prompt: Any, **more: Any) -> Any:
        seen.append((prompt, more["complex_human_instruction"]))
        return embed(prompt, **more)

    pipe._get_gemma_prompt_embeds = spy
    given = {"height": 32, "width": 32, "output_type": "latent", "use_resolution_binning": False}
    lines = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    parallel(pipe, learned(pipe, "epd"))([f"p{i}" for i in range(len(lines))], **given)
    assert all(shown == lines for prompt, shown in seen if prompt != [""])
    seen.clear()
    parallel(pipe, learned(pipe, "epd"), guidance="rows")(TEXT, negative_prompt="bad", **given)
    assert [bool(shown) for prompt, shown in seen] == ["bad" not in prompt for prompt, _ in seen]
    pipe = twins.sdxl()
    pipe.set_progress_bar_config(disable=True)
    given = {"negative_prompt": "bad", "clip_skip": 1, "guidance_scale": 5.0, **SIZE}
    ours, theirs = (
        parallel(pipe, learned(pipe, "epd"), guidance=way)(
            TEXT, output_type="latent", generator=drawn(3), **given
        )[0]
        for way in ("rows", "pipeline")
    )
    assert close(ours, theirs)


def test_a_tokenizer_that_is_a_processor_has_no_words_of_its_own() -> None:
    from transformers import ProcessorMixin  # noqa: PLC0415

    pipe = twins.twin("flux2")
    pipe.set_progress_bar_config(disable=True)
    fast, given = parallel(pipe, learned(pipe, "epd")), {"output_type": "latent", **SIZE}
    before = fast(prompt=TEXT, **given, generator=drawn(3))[0]
    pipe.tokenizer = type("PixtralProcessor", (ProcessorMixin,), {"__init__": lambda _: None})()
    assert torch.equal(fast(prompt=TEXT, **given, generator=drawn(3))[0], before)


def test_a_pipeline_that_steps_in_float32_gets_its_latents_so() -> None:
    """Z-Image from an image in bfloat16, which asserts it."""
    base = twins.twin("z_image")
    encode = base._encode_prompt
    pipe = diffusers.ZImageImg2ImgPipeline(**base.components)
    pipe._encode_prompt = lambda prompt, **more: [e.bfloat16() for e in encode(prompt, **more)]
    pipe.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    given = {**FROM, **SIZE, "strength": 1.0, "output_type": "latent", "guidance_scale": 3.0}
    images = parallel(pipe, learned(pipe, "epd"))(TEXT, **given, generator=drawn(3))[0]
    assert bool(images.isfinite().all())


def test_an_edit_of_embeddings_does_not_reach_the_next_call() -> None:
    pipe = twins.flux()
    pipe.set_progress_bar_config(disable=True)

    def spoil(_p: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].zero_()}

    fast = parallel(pipe, learned(pipe, "epd"), points="sequence")
    more = {"callback_on_step_end": spoil}
    more |= {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    before, _, after = (
        fast(TEXT, output_type="latent", **SIZE, **each, generator=drawn(3))[0]
        for each in ({}, more, {})
    )
    assert torch.equal(before, after)


def test_hand_made_solvers_of_two_calls_cut_a_strength_as_diffusers_do() -> None:
    pipe, calls = of("StableDiffusionImg2ImgPipeline", "sd")(), []
    pipe.set_progress_bar_config(disable=True)
    theirs = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for scheduler in (theirs, EPDScheduler.from_solver("heun", like=theirs)):
        calls.clear()
        pipe.scheduler = scheduler
        pipe(
            TEXT, num_inference_steps=10, output_type="latent", generator=drawn(3), **FROM, **SIZE
        )
        counts.append(len(calls))
    assert counts[0] in (counts[1], counts[1] + 1)  # theirs ends at 0


@pytest.mark.parametrize(
    ("maker", "given", "ways", "message"),
    [
        (twins.sdxl, {"negative_original_size": (512, 512)}, {}, "another order"),
        (VARIANTS["Ideogram 4"][0], {"guidance_schedule": [7.0] * 6}, {}, "a rate for each step"),
        (twins.sd, {"eta": 1.0}, {}, "eta does not go .* draw no noise"),
        (of("BriaPipeline", "bria"), {"negative_prompt": ""}, {"guidance": "rows"}, "for nothing"),
        (of("BriaFiboPipeline", "bria_fibo"), {}, {"guidance": "rows"}, "no text for nothing"),
        (
            VARIANTS["FLUX.1 Fill"][0],
            {"prompt": ["a", "b"], "image": IMAGE[..., :16, :16].repeat(2, 1, 1, 1),
             "mask_image": torch.ones(2, 1, 16, 16)},
            {}, "several pictures",
        ),
    ],
)  # fmt: skip
def test_calls_that_rows_cannot_take_are_one_line(
    maker: Callable[[], Any], given: dict[str, Any], ways: dict[str, Any], message: str
) -> None:
    pipe = maker()
    with pytest.raises(ValueError, match=message):
        parallel(pipe, learned(pipe, "epd"), **ways)(**{"prompt": TEXT, **SIZE, **given})


def test_free_init_is_refused_and_so_is_a_control_that_pools() -> None:
    pipe = twins.twin("animate_diff")
    pipe.enable_free_init(num_iters=2)
    with pytest.raises(ValueError, match=r"FreeInit is not served.*disable_free_init"):
        parallel(pipe, learned(pipe, "epd"))(TEXT, num_frames=2, **SIZE)
    pipe = controlled()
    pipe.controlnet.register_to_config(global_pool_conditions=True)
    with pytest.raises(ValueError, match=r"half of the rows alone.*sequence"):
        parallel(pipe, learned(pipe, "epd"))(TEXT, image=FROM["image"], **SIZE)


def test_a_video_is_decoded_once_under_guidance_as_rows() -> None:
    pipe = twins.twin("ltx", vae={"timestep_conditioning": True})
    pipe.set_progress_bar_config(disable=True)
    given = {"height": 64, "width": 64, "num_frames": 9, "output_type": "pt"}
    fast = parallel(pipe, learned(pipe, "epd"), guidance="rows")
    assert len(fast(TEXT, **given, generator=drawn(3))[0]) == 1


def test_keys_that_a_schedulers_class_does_not_have_do_nothing() -> None:
    """As `from_config` of another's leaves them."""
    ddim = diffusers.DDIMScheduler(clip_sample=True)
    euler = diffusers.EulerDiscreteScheduler.from_config(ddim.config)
    assert (parametrization_of(ddim).clip, parametrization_of(euler).clip) == (1.0, None)
    unipc = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(unipc.config, shift=8.0)
    assert shifted_end(flow) == shifted_end(diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0))


def test_multistep_tables_begin_at_the_start_alone() -> None:
    """Whose calls need the slopes of those before."""
    name = "exps/tiny-sd3/epd-multistep-k2-5nfe-emoji.pkl"
    like = twins.sd3(scheduler={"shift": 1}).scheduler
    scheduler = EPDScheduler.from_predictor(name, like=like)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"at timestep 2 of \d+: each call .* needs those before"):
        scheduler.set_begin_index(2)
    scheduler.set_begin_index(0)
