"""What sets families of diffusers pipelines apart for us, each line held by a test of the table.

All else is the same for every family, and left to the pipeline's own code.
"""

import inspect
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
