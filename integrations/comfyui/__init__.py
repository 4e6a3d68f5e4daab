"""ComfyUI: a learned predictor as SAMPLER, SIGMAS and the guidance that it was learned under.

Copy or link this folder into ComfyUI/custom_nodes. The code that it stands on is this
repository's: installed (`pip install -e PATH`), linked to, or named by the variable EPD_SOLVER.
"""

import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

HERE = Path(__file__).resolve()
if not any((Path(place) / "solvers" / "predictor.py").is_file() for place in sys.path):
    homes = [Path(os.environ.get("EPD_SOLVER", HERE.parents[2])), *HERE.parents]
    sys.path += [str(home) for home in homes if (home / "solvers" / "predictor.py").is_file()][:1]

from backends.k_diffusion import learned_sigmas, sample_epd  # noqa: E402
from solvers.predictor import Predictor, find_predictor, load_predictor  # noqa: E402
from solvers.recipe import for_flow  # noqa: E402
from solvers.vp import Table  # noqa: E402

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
SAME_END = 0.05
"""By how much a model's highest level may differ from the predictor's."""
NO_SIGNAL = 1000.0
"""Highest levels above this are of models of zero terminal SNR, each cut where its host does."""


class EPDPredictor:
    """A predictor's file, or its name within exps/, for SamplerCustom and its guiders."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS", "FLOAT")
    RETURN_NAMES = ("sampler", "sigmas", "guidance")
    FUNCTION = "load"
    CATEGORY = "sampling/custom_sampling"
    DESCRIPTION: ClassVar = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes."""
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "predictor": ("STRING", {"default": "sd15-best"}),
                "denoise": ("FLOAT", denoise),
            },
            "optional": {"points": (["rows", "sequence"],)},
        }

    def load(
        self, model: Any, predictor: str, denoise: float, points: str = "rows"
    ) -> tuple[Any, Tensor, float]:
        """The sampler, the levels for it (with a last 0 that it leaves out) and the guidance.

        Below 1, `denoise` is the share of the steps that is taken, from an image. Raises
        ValueError for a predictor of another kind of model.
        """
        import comfy.samplers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        learned = load_predictor(find_predictor(predictor))
        sigmas = levels(learned, model.get_model_object("model_sampling"))
        taken = round(denoise * (len(sigmas) - 1))
        sigmas = sigmas[len(sigmas) - 1 - taken :] if taken else ()
        options = {"predictor": learned, "denoise_last": False, "points": points}
        sampler = comfy.samplers.KSAMPLER(sample_epd, options)
        cut = torch.tensor([*sigmas, 0.0] if taken else [])
        return sampler, cut, learned.recipe.guidance_rate


def levels(learned: Predictor, sampling: Any) -> tuple[float, ...]:
    """A predictor's levels on a model; ValueError where those of the model begin elsewhere."""
    own, highest = learned_sigmas(learned), float(sampling.sigma_max)
    if own is None and for_flow(learned.recipe):
        raise ValueError("this predictor holds no levels of its own: distil it again")
    if own is None:
        table = Table(torch.as_tensor(sampling.sigmas).double().log().cpu())
        own = learned.sampler(table.levels).sigmas
    if abs(own[0] / highest - 1) > SAME_END and min(own[0], highest) < NO_SIGNAL:
        kind = learned.recipe.backend
        raise ValueError(
            f"this predictor is for another model ({learned.recipe.dataset_name}, {kind}): "
            f"its levels begin at {own[0]:.4g}, the model's at {highest:.4g}"
        )
    return own


NODE_CLASS_MAPPINGS = {"EPDPredictor": EPDPredictor}
NODE_DISPLAY_NAME_MAPPINGS = {"EPDPredictor": "EPD predictor"}
