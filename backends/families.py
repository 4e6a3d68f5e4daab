"""What sets families of diffusers pipelines apart for us, each line held by a test of the table.

All else is the same for every family, and left to the pipeline's own code.
"""

import inspect
from collections.abc import Mapping
from typing import Any

STACKED = (
    *("StableDiffusion", "StableDiffusionXL", "StableDiffusion3"),
    *("LTX", "Sana", "SanaVideo", "PixArtSigma", "PixArtAlpha", "Mochi", "Bria"),
    "Kolors",
)
"""Families whose pipelines put the rows of the negative prompt into one batch with the others."""
APART = (
    *("Flux", "Flux2", "QwenImage", "Chroma", "Wan", "Lumina2", "HunyuanVideo"),
    *("CogView4", "ZImage", "SkyReelsV2", "OvisImage", "Flux2Klein"),
)
"""Families that call their network once more for guidance, or need no such rows."""
VARIANTS = ("", "Img2Img", "ControlNet", "ControlNetImg2Img")
ONE_TIME = {
    "AuraFlow": "it makes one number of a timestep",
    "Kandinsky5T2I": "it repeats its timestep for every row",
    "Kandinsky5T2V": "it repeats its timestep for every row",
    "PRX": "it makes one number of a timestep",
    "Cosmos2TextToImage": "it makes one number of a timestep",
    "Allegro": "it makes one video a prompt",
    "AnimateDiff": "it makes one video a prompt",
    "CogVideoX": "it makes one video a prompt",
    "HunyuanDiT": "it makes one number of a timestep",
    "Latte": "it cuts all prompts to one length",
    "LTXImageToVideo": "it steps a part of its latents",
    "WanVideoToVideo": "it makes one video a prompt",
}
EMBEDDED = ("Flux", "Flux2", "HunyuanVideo")
"""Families whose network is told the guidance."""
RESCALING = ("QwenImage", "Lumina2")
"""Families that rescale what guidance gives."""
FROM_ZERO = ("ZImage",)
"""Families that count guidance from 0: theirs is ours less 1."""

OWN_LEVELS, ENDS = "a predictor has levels of its own", "it cuts a predictor's levels"
HALF, MIXED = "it asks half of the rows alone", "the solver mixes guidance"
REFUSED = {
    **dict.fromkeys(("sigmas", "timesteps"), OWN_LEVELS),
    **dict.fromkeys(("denoising_start", "denoising_end"), ENDS),
}
"""Arguments of calls that no predictor goes with, and why."""
REFUSED_BY_ROWS = {
    **dict.fromkeys(("guess_mode", "skip_guidance_layers"), HALF),
    "callback": "it is deprecated: use callback_on_step_end",
}
"""Those that do not go with points as rows."""
REFUSED_BY_GUIDANCE = {
    **dict.fromkeys(("guidance_rescale", "cfg_normalization"), MIXED),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), MIXED),
    **dict.fromkeys(("negative_original_size", "negative_target_size"), MIXED),
    "negative_prompt_embeds": "it takes texts",
}
"""Those that do not go with guidance as rows."""


def check_given(given: Mapping[str, Any], *tables: Mapping[str, str]) -> None:
    """ValueError, with the reason, for an argument of a call that one of the tables refuses."""
    for name, why in (item for table in tables for item in table.items()):
        value = given.get(name)
        if value is not None and not (isinstance(value, bool | int | float) and not value):
            raise ValueError(f"{name} does not go with this predictor: {why}")


def network_of(pipe: Any) -> Any:
    """A pipeline's network, which may have no truth value where it is compiled."""
    network = pipe.components.get("transformer")
    return pipe.unet if network is None else network


def family_of(pipe: Any) -> str:
    """The family of a pipeline's class: "Flux" of FluxImg2ImgPipeline; its own name if unknown."""
    name = type(pipe).__name__.removesuffix("Pipeline")
    return {f"{f}{v}": f for f in (*STACKED, *APART) for v in VARIANTS}.get(name, name)


def check_served(pipe: Any) -> None:
    """ValueError, with the reason, for a pipeline whose scheduler steps other states than x."""
    if type(pipe).__name__ in ("TextToVideoSDPipeline", "VideoToVideoSDPipeline"):
        name = type(pipe).__name__
        raise ValueError(f"{name} is not served: it steps each frame of a video by itself")


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


def parameters_of(pipe: Any) -> dict[str, Any]:
    """The names of the arguments of a pipeline's call, and their defaults."""
    return {n: p.default for n, p in inspect.signature(pipe.__call__).parameters.items()}


def guidance_name(pipe: Any) -> str | None:
    """What a pipeline calls its guidance rate; None for one without."""
    names = parameters_of(pipe)
    if names.get("guidance_scale") is None and "true_cfg_scale" in names:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in names else None
