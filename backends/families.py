"""What sets families of diffusers pipelines apart for us, each line held by a test of the table.

All else is the same for every family, and left to the pipeline's own code.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from backends.parametrization import parametrization_of
from solvers.recipe import Recipe

STACKED = (
    *("StableDiffusion", "StableDiffusionXL", "StableDiffusion3"),
    *("LTX", "Sana", "SanaVideo", "PixArtSigma", "PixArtAlpha", "Mochi", "Bria"),
    *("Kolors", "BriaFibo", "BriaFiboEdit", "IF", "StableUnCLIPImg2Img"),
)
"""Families whose pipelines put the rows of the negative prompt into one batch with the others."""
APART = (
    *("Flux", "Flux2", "QwenImage", "Chroma", "Wan", "Lumina2", "HunyuanVideo"),
    *("CogView4", "ZImage", "SkyReelsV2", "OvisImage", "Flux2Klein"),
    *("HunyuanImage", "Krea2", "NucleusMoEImage", "MotifVideo"),
    *("LongCatImageEdit", "QwenImageLayered", "Ideogram4"),
)
"""Families that call their network once more for guidance, or need no such rows."""
VARIANTS = ("", "Img2Img", "ControlNet", "ControlNetImg2Img")
OTHERS = {
    **dict.fromkeys(("FluxKontext", "FluxFill", "FluxControl", "FluxControlImg2Img"), "Flux"),
    **dict.fromkeys(("QwenImageEdit", "QwenImageEditPlus"), "QwenImage"),
    "StableDiffusionLDM3D": "StableDiffusion",
}
"""Pipelines of those families under names of their own."""
ONE_NUMBER = "it makes one number of a timestep"
EVERY_ROW, ONE_VIDEO = "it repeats its timestep for every row", "it makes one video a prompt"
SHAPED = "it gives its latents a shape before it asks for them"
ONE_TIME = {
    **dict.fromkeys(("AuraFlow", "PRX", "Cosmos2TextToImage"), ONE_NUMBER),
    **dict.fromkeys(("HunyuanDiT", "EasyAnimate"), ONE_NUMBER),
    **dict.fromkeys((f"Kandinsky5{kind}" for kind in ("T2I", "T2V", "I2V", "I2I")), EVERY_ROW),
    **dict.fromkeys(("Allegro", "AnimateDiff", "AnimateDiffSDXL", "CogVideoX"), ONE_VIDEO),
    **dict.fromkeys(("CogVideoXImageToVideo", "HunyuanVideo15"), ONE_VIDEO),
    **dict.fromkeys(("HunyuanVideoFramepack", "WanVideoToVideo"), ONE_VIDEO),
    "SkyReelsV2ImageToVideo": ONE_VIDEO,
    **dict.fromkeys(("Kandinsky", "KandinskyV22", "Kandinsky3", "StableUnCLIP"), SHAPED),
    "HunyuanVideoImageToVideo": "it steps a part of its latents",
    "LTXImageToVideo": "it steps a part of its latents",
    "Lumina": "it scales its places by one time",
    "Latte": "it cuts all prompts to one length",
    "LongCatImage": "it has one negative prompt for all",
    "QwenImage21": "it keeps what its first call made of the prompts",
    "ErnieImage": "it draws its latents within its call",
    "StableDiffusionGLIGEN": "it grounds a share of its calls",
    "DreamLite": "it makes one image a prompt",
    "OmniGen": "it guides at any rate",
}
UNSERVED = {
    "I2VGenXL": "it steps each frame of a video by itself",
    "IFSuperResolution": "it scales its picture as if it were a part of x",
    "IFImg2ImgSuperResolution": "it scales its picture as if it were a part of x",
    "IFInpaintingSuperResolution": "it scales its picture as if it were a part of x",
    "IFInpainting": "it keeps its picture in the scale of its own scheduler",
    "StableDiffusionDiffEdit": "it keeps its picture in the scale of its own scheduler",
    "CycleDiffusion": "it asks for the alphas of its own scheduler",
    "LTXI2VLongMultiPrompt": "it leaves out its scheduler's last timestep",
    "TextToVideoSD": "it steps each frame of a video by itself",
    "VideoToVideoSD": "it steps each frame of a video by itself",
    "TextToVideoZero": "it goes back to noise on the way",
    "TextToVideoZeroSDXL": "it goes back to noise on the way",
    "SkyReelsV2DiffusionForcing": "it has a scheduler for every frame",
    "SkyReelsV2DiffusionForcingImageToVideo": "it has a scheduler for every frame",
    "SkyReelsV2DiffusionForcingVideoToVideo": "it has a scheduler for every frame",
    "StableDiffusionPanorama": "it steps each window of an image by itself",
    "StableDiffusionSAG": "it asks for the betas of its own scheduler",
    "StableDiffusionParadigms": "it steps many timesteps at once",
    "StableDiffusionAttendAndExcite": "it asks its network about x that nobody has scaled",
    "UniDiffuser": "it guides away from noise that it draws in every call",
    "KandinskyImg2Img": "it noises its picture by levels of its own",
    "StableDiffusionLatentUpscale": "it scales x by levels of its own",
}
BACKENDS = {"ldm": ("StableDiffusion", "LDM"), "sd3": ("StableDiffusion3",), "flux": ("Flux",)}
"""The families of pipelines of our own backends."""
ROOTS = ("AnimateDiff", "CogVideoX", "HunyuanDiT", "Kandinsky5", "KandinskyV22", "PRX")
"""More names that variants of a family begin with."""
EMBEDDED = ("Flux", "Flux2", "HunyuanVideo")
"""Families whose network is told the guidance."""
RESCALING = ("QwenImage", "Lumina2", "NucleusMoEImage")
"""Families that rescale what guidance gives."""
SIGNED = ("IF", "Kandinsky3", "PRXPixel")
"""Families whose tensors of pictures lie in [-1, 1]."""
FROM_ZERO = ("ZImage", "ZImageOmni", "Kandinsky3", "Krea2", "Cosmos2_5_PredictBase")
"""Families that count guidance from 0: theirs is ours less 1."""
ALONE = (
    *("Latte", "WanVACE", "PRX", "PRXPixel"),
    *("LongCatImageEdit", "QwenImageLayered", "DreamLite"),
)
"""Families that take one prompt a call, or mix those of a call up."""
NO_NEGATIVES = {
    **dict.fromkeys(ALONE, "it takes one prompt a call"),
    "BriaFiboEdit": "its prompts are instructions in JSON, and its negatives are not",
    "CogView4": "it makes negative prompts as long as the others",
    "StableUnCLIPImg2Img": "its negative prompts have no picture",
    "Ideogram4": "a network of its own stands for the negative prompt",
}
"""Families whose negative prompts cannot be rows beside the others, and why."""

OWN_LEVELS, ENDS = "a predictor has levels of its own", "it cuts a predictor's levels"
HALF, MIXED = "it asks half of the rows alone", "the solver mixes guidance"
ORDER = "it puts the rows in another order"
REFUSED = {
    **dict.fromkeys(("sigmas", "timesteps"), OWN_LEVELS),
    **dict.fromkeys(("denoising_start", "denoising_end"), ENDS),
    "guidance_schedule": "it has a rate for each step of the pipeline's own",
    "std": OWN_LEVELS,
    "eta": "its steps draw no noise",
}
"""Arguments of calls that no predictor goes with, and why."""
REFUSED_BY_ROWS = {
    **dict.fromkeys(("guess_mode", "skip_guidance_layers"), HALF),
    **dict.fromkeys(("negative_original_size", "negative_target_size"), ORDER),
    "callback": "it is deprecated: use callback_on_step_end",
    "normalize": "it takes all rows together",
}
"""Those that do not go with points as rows."""
REFUSED_BY_GUIDANCE = {
    **dict.fromkeys(("guidance_rescale", "cfg_normalization"), MIXED),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), MIXED),
    **dict.fromkeys(("clip_value", "normalize"), MIXED),
    "negative_prompt_embeds": "it takes texts",
}
"""Those that do not go with guidance as rows."""


STARTED = tuple(
    f"{name}Img2ImgPipeline"
    for name in ("StableDiffusionXL", "StableDiffusion3", "StableDiffusionControlNet",
                 "StableDiffusionXLControlNet", "Kolors", "StableUnCLIP")
)  # fmt: skip
"""Those that lay out no rows of latents that they are given."""


def check_given(given: Mapping[str, Any], *tables: Mapping[str, str]) -> None:
    """ValueError, with the reason, for an argument of a call that one of the tables refuses."""
    for name, why in (item for table in tables for item in table.items()):
        value = given.get(name)
        if value is not None and not (isinstance(value, bool | int | float) and not value):
            raise ValueError(f"{name} does not go with this predictor: {why}")


def family_of(pipe: Any) -> str:
    """The family of a pipeline's class: "Flux" of FluxImg2ImgPipeline; its own name if unknown."""
    name = type(pipe).__name__.removesuffix("Pipeline")
    names = {f"{f}{v}": f for f in (*STACKED, *APART) for v in VARIANTS}
    return (names | OTHERS).get(name, name)


def check_family(pipe: Any, recipe: Recipe) -> None:
    """ValueError where a predictor was learned for another family than the pipeline's."""
    backend = recipe.backend
    names = [kind.__name__ for kind in type(pipe).__mro__ if kind.__name__.endswith("Pipeline")]
    wanted = BACKENDS.get(backend, (backend.removesuffix("Pipeline"),))
    if backend not in BACKENDS and not backend.endswith("Pipeline"):
        return  # it names no family of pipelines
    there = {root_of(name.removesuffix("Pipeline")) for name in (type(pipe).__name__, *names)}
    if there.isdisjoint(map(root_of, wanted)):
        said = f"the predictor is for {backend} ({recipe.dataset_name}), not {type(pipe).__name__}"
        raise ValueError(f"{said}: give any_family=True to try it")


def root_of(name: str) -> str:
    """The longest family that a pipeline's name begins with: "Flux" of FluxInpaint."""
    begins = [family for family in (*STACKED, *APART, *ROOTS) if name.startswith(family)]
    return max(begins, key=len, default=OTHERS.get(name, name))


def check_served(pipe: Any) -> None:
    """ValueError, with the reason, for a pipeline that no scheduler of ours can lead."""
    name, parts = type(pipe).__name__, pipe.components
    inner = sorted(n for n, value in vars(pipe).items() if isinstance(value, DiffusionPipeline))
    guider, network = parts.get("guider"), network_of(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    reason = UNSERVED.get(name.removesuffix("Pipeline"))
    if inner:
        reason = f"it is two pipelines in one ({', '.join(inner)}): give one of them"
    elif scheduler is not None and reason is None:
        parametrization_of(scheduler)
    if reason is None and (scheduler is None or network is None):
        reason = "it has no network called transformer or unet, or no scheduler for it"
    elif network is not None and network.config.get("use_meanflow"):
        reason = "its network is told where a step ends, and not its slope"
    elif guider is not None and not plain(guider):
        kind = type(guider).__name__
        reason = f"its {kind} counts steps: take a ClassifierFreeGuidance without start and stop"
    if reason:
        raise ValueError(f"{name} is not served: {reason}")


def plain(guider: Any) -> bool:
    """Whether a guider guides every step alike."""
    config = guider.config
    whole = (config.get("start", 0.0), config.get("stop", 1.0)) == (0.0, 1.0)
    return type(guider).__name__ == "ClassifierFreeGuidance" and whole


def network_of(pipe: Any) -> Any:
    """The network that a scheduler steps (it may lack a truth value); None under another name."""
    names = ("transformer", "unet", "transformer_2")
    return next((pipe.components[n] for n in names if pipe.components.get(n) is not None), None)


def preparer(pipe: Any) -> str | None:
    """The method by which a pipeline makes what its loop starts from, if it has one."""
    names = ("prepare_latents", "prepare_intermediate_images")
    return next((name for name in names if callable(getattr(pipe, name, None))), None)


def scales(pipe: Any) -> bool:
    """Whether a pipeline asks its scheduler how to scale x: what its network sees, and its noise.

    In its call or elsewhere in its classes: one's own may wrap a call, or loop in a method.
    """
    parts = (part for kind in type(pipe).__mro__ for part in vars(kind).values())
    functions = filter(inspect.isfunction, map(inspect.unwrap, filter(callable, parts)))
    names = {name for function in functions for name in function.__code__.co_names}
    return "scale_model_input" in names and bool(names & {"init_noise_sigma", "add_noise"})


def one_time(pipe: Any) -> str | None:
    """Why a pipeline cannot take a time for each row; None where it can."""
    name = type(pipe).__name__.removesuffix("Pipeline")
    if name in ONE_TIME:
        return ONE_TIME[name]
    if "Inpaint" in name:
        return "it noises what it keeps to one level"
    if pipe.config.get("expand_timesteps") or pipe.config.get("boundary_ratio") is not None:
        return "it has a time for each place, or two networks by time"
    if family_of(pipe) not in (*STACKED, *APART):
        return "it was never tried with a time for each row"
    return None


signature_of = cache(inspect.signature)  # a pipeline's call asks for its own several times


def parameters_of(pipe: Any) -> dict[str, Any]:
    """The names of the arguments of a pipeline's call, and their defaults."""
    parameters = list(signature_of(type(pipe).__call__).parameters.values())[1:]  # without self
    return {parameter.name: parameter.default for parameter in parameters}


def guidance_name(pipe: Any) -> str | None:
    """What a pipeline calls its guidance rate; None for one without."""
    names = parameters_of(pipe)
    if names.get("guidance_scale") is None and "true_cfg_scale" in names:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in names else None
