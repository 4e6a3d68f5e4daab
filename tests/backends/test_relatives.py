"""More pipelines of diffusers on the parts of a family: edits, adapters, masks, videos.

None is named in our code. Under a solver by name each is what its own Euler makes (DDIM of VP
models), and a predictor by `parallel` is the same predictor as a scheduler.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from backends.families import one_time, scales
from backends.parallel import parallel
from backends.scheduler import EPDScheduler
from tests import twins
from tests.backends.test_families import TEXT, close, drawn, learned
from tests.backends.test_variants import FROM, IMAGE, MASKED, SIZE, of, stacked

diffusers = twins.diffusers
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "Future", "User")
]
BETAS = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "trained_betas")
PLAIN = {"requires_safety_checker": False}
PICTURE = {"image": FROM["image"]}
WHOLE = MASKED | {"strength": 1.0}
SMALL, LARGE = (Image.new("RGB", (side, side), (90, 50, 10)) for side in (16, 32))
CLIP = {"height": 32, "width": 32, "num_frames": 5}


def adapted() -> Any:
    kind = {"channels": (8, 16), "num_res_blocks": 1, "downscale_factor": 2}
    adapter = twins.seeded(diffusers.T2IAdapter(in_channels=3, **kind))
    return of("StableDiffusionAdapterPipeline", "sd", adapter=adapter, **PLAIN)()


def controlled(kind: str, family: str, **more: Any) -> Callable[[], Any]:
    def build() -> Any:
        unet = twins.twin(family).unet
        control = diffusers.ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 8)
        )
        for parameter in control.controlnet_down_blocks.parameters():
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        return of(kind, family, controlnet=control, **more)()

    return build


def ltx2(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        pipe = of(kind, "ltx2")()
        pipe.vae_spatial_compression_ratio = 32  # its tiny VAE says 64
        return pipe

    return build


def sd(kind: str, **changes: Any) -> Callable[[], Any]:
    return of(f"StableDiffusion{kind}Pipeline", "sd", **PLAIN, **changes)


UPSCALED = {"unet": {"in_channels": 7, "num_class_embeds": 1000}}
UPSCALED |= {"low_res_scheduler": diffusers.DDPMScheduler()}
LTX2 = {"height": 64, "width": 64, "num_frames": 17}
RELATIVES = {
    "SD1.5 with perturbed attention": (sd("PAG"), SIZE),
    "SD1.5 by instructions": (sd("InstructPix2Pix", unet={"in_channels": 8}), PICTURE),
    "SDXL by instructions": (
        of("StableDiffusionXLInstructPix2PixPipeline", "sdxl", unet={"in_channels": 8}),
        SIZE | PICTURE,
    ),
    "SD1.5, a part, by its own network": (sd("Inpaint", unet={"in_channels": 9}), WHOLE),
    "SD1.5 with an adapter": (adapted, SIZE | {"image": SMALL}),
    "SD1.5 with ControlNet, a part": (
        controlled("StableDiffusionControlNetInpaintPipeline", "sd", **PLAIN),
        WHOLE | {"control_image": IMAGE[..., :16, :16]},
    ),
    "SDXL with ControlNet": (
        controlled("StableDiffusionXLControlNetPipeline", "sdxl"), SIZE | PICTURE
    ),
    "SD upscaled": (
        of("StableDiffusionUpscalePipeline", "sd", **UPSCALED),
        {"image": IMAGE[..., :8, :8]},
    ),
    "Kolors from an image": (of("KolorsImg2ImgPipeline", "kolors"), PICTURE | {"strength": 1.0}),
    "Kolors with perturbed attention": (of("KolorsPAGPipeline", "kolors"), SIZE),
    "SD3 with perturbed attention": (of("StableDiffusion3PAGPipeline", "sd3"), SIZE),
    "FLUX.1, a part": (of("FluxInpaintPipeline", "flux"), WHOLE),
    "FLUX.1 Control, a part": (
        of("FluxControlInpaintPipeline", "flux", transformer={"in_channels": 32,
           "out_channels": 16}),
        WHOLE | {"control_image": IMAGE[..., :16, :16]},
    ),
    "FLUX.2 Klein, a part": (
        of("Flux2KleinInpaintPipeline", "flux2_klein"),
        SIZE | {"image": SMALL, "mask_image": Image.new("L", (16, 16), 200), "strength": 1.0},
    ),
    "FLUX.2 Klein with its cache": (of("Flux2KleinKVPipeline", "flux2_klein"), SIZE),
    "Qwen-Image, a part": (of("QwenImageInpaintPipeline", "qwen"), WHOLE),
    "AnimateDiff from a video": (
        of("AnimateDiffVideoToVideoPipeline", "animate_diff"),
        SIZE | {"video": [SMALL] * 2, "strength": 1.0},
    ),
    "AnimateDiff with perturbed attention": (
        of("AnimateDiffPAGPipeline", "animate_diff"), SIZE | {"num_frames": 2}
    ),
    "Sana-Video from an image": (
        of("SanaImageToVideoPipeline", "sana_video"),
        {"image": LARGE, "height": 32, "width": 32, "frames": 5, "use_resolution_binning": False},
    ),
    "Motif-Video from an image": (
        of("MotifVideoImage2VideoPipeline", "motif"), CLIP | {"image": LARGE}
    ),
    "LTX-2 from conditions": (ltx2("LTX2ConditionPipeline"), LTX2),
    "LTX-2 in context": (ltx2("LTX2InContextPipeline"), LTX2),
    "Lucy, a video edited": (
        of("LucyEditPipeline", "wan", transformer={"in_channels": 8}),
        CLIP | {"video": [LARGE] * 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVES)
def test_a_pipeline_that_nobody_named_is_its_own_and_takes_a_predictor(name: str) -> None:
    maker, given = RELATIVES[name]
    pipe = maker()
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": TEXT, "output_type": "latent", **given}
    config = pipe.scheduler.config
    if type(pipe.scheduler).__name__.startswith("Flow") or config.get("use_flow_sigmas"):
        like = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    else:
        betas = {key: config[key] for key in BETAS}
        like = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)

    def made(scheduler: Any, caller: Any = pipe, **more: Any) -> torch.Tensor:
        pipe.scheduler = scheduler
        if isinstance(scheduler, EPDScheduler):
            scheduler.plain = scheduler.model.table is not None and not scales(pipe)
        return stacked(caller(**given, generator=drawn(3)[0], **more)[0])

    wanted = made(like, num_inference_steps=6)
    assert close(made(EPDScheduler.from_solver("euler", like), num_inference_steps=6), wanted)
    predictor = learned(pipe, "epd")
    fast = made(like, parallel(pipe, predictor))
    scheduler = EPDScheduler.from_predictor(predictor, like)
    assert close(made(scheduler, num_inference_steps=predictor.evaluations), fast)
    assert (one_time(pipe) is None) == (name in ("Kolors from an image", "SDXL with ControlNet"))
