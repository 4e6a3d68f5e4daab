"""What a diffusers scheduler says of its model: its levels, its timesteps, what is answered.

A pipeline's own scheduler (`like`) is asked, not imitated: shifts, dynamic shifts, terminal
shifts, Karras, beta and exponential spacings, spacing of timesteps and inverted sigmas are right
because its own `set_timesteps` made them. What a solver of ours cannot honour is refused by name.

Flow matching: x at level sigma is (1 - sigma) x0 + sigma eps, and the network estimates
v = eps - x0 (Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206).
"""

import copy
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers import vp
from solvers.process import FLOW, VE, Process
from solvers.recipe import Recipe
from solvers.schedules import NoiseLevels

FLOW_STEPS = 1000
"""Flow-matching networks are usually given sigma times this."""
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
BETA_SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"),
        *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("DPMSolverSDE", "UniPCMultistep", "DEISMultistep", "SASolver"),
    )
)
TOKENS = "it steps discrete tokens, which have no level of noise"
NOISY = "its model is made for a few steps that draw noise on the way"
STAGE = "it draws noise on the way, of a stage whose result is no picture yet"
OWN_LEVELS = "its levels run from 80 or more by its own scaling, not by a table of timesteps"
NO_SIGNAL = "it shifts its levels to one without signal"
UNSERVED = {
    **dict.fromkeys(("Amused", "VQDiffusion", "BlockRefinement"), TOKENS),
    **dict.fromkeys(("DiscreteDDIM", "EntropyBound"), TOKENS),
    **dict.fromkeys(("LCM", "TCD", "FlowMatchLCM", "SCM", "CMStochasticIterative"), NOISY),
    **dict.fromkeys(("LTXEulerAncestralRF", "HeliosDMD"), NOISY),
    **dict.fromkeys(("DDPMWuerstchen", "UnCLIP"), STAGE),
    **dict.fromkeys(("EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep"), OWN_LEVELS),
    **dict.fromkeys(("CogVideoXDDIM", "CogVideoXDPM"), NO_SIGNAL),
    **dict.fromkeys(("FlowMapEulerDiscrete", "Piflow"), "its network is told where a step ends"),
    "Helios": "it makes a video section by section",
    "IPNDM": "it has levels of its own",
}
"""Why schedulers of diffusers are not served, by their classes."""
SPACINGS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("shift_terminal", "invert_sigmas", "use_flow_sigmas"),
)
NEAR_NOISE = 0.99  # a first level of flow matching above this stands for pure noise
NEAR_DATA = 0.02  # a last level of a table's grid must not leave more noise than this


@dataclass(frozen=True)
class Parametrization:
    """Which timesteps stand for levels, what a network sees of x, and what its answers mean.

    `spread` is for pipelines that give timesteps apart from their shifted levels (CogView4):
    what the shift multiplied the odds of a level by.
    """

    process: Process
    prediction: str  # epsilon, v_prediction, sample; flow matching: flow
    steps: int = FLOW_STEPS
    table: vp.Table | None = None  # of the VP process
    inverted: bool = False  # Mochi: time runs from noise at 0 to data at 1, and so does velocity
    spread: float = 1.0
    clip: float | None = None  # DDIM's clip_sample
    threshold: tuple[float, float] | None = None  # thresholding's share of values, and largest

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Levels [n] in float64 -> what the pipeline gives its network [n]."""
        if self.table:
            return self.table.sigma_inv(sigma)
        plain = sigma / (sigma + self.spread * (1 - sigma))
        return (1 - plain if self.inverted else plain) * self.steps

    def seen(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees of x [B, *] at these levels [B]."""
        return vp.scaled(x, sigma) if self.table else x

    def clean(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """The network's output for x [B, *] at the levels sigma [B], as x0 [B, *]."""
        if self.table:
            own = output[:, : x.shape[1]]  # some networks' variances follow
            x0 = vp.clean(x, sigma, own, self.prediction)
        else:
            x0 = flow_clean(x, -sigma if self.inverted else sigma, output)
        if self.threshold:  # Saharia et al. 2022, arXiv:2205.11487, Section 2.3
            share, largest = self.threshold
            end = x0.flatten(1).abs().float().quantile(share, 1).clamp(1, max(largest, 1))
            end = vp.wide(end.to(x0), x0)
            return x0.clamp(-end, end) / end
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x0 [B, *] and noise mixed at sigma [B or 1]."""
        wide = vp.wide(sigma.to(x0), x0)
        return self.process.alpha(wide) * x0 + wide * noise


def flow_clean(x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """x0 = x - sigma v for x [B, *], sigma [B]."""
    return x - vp.wide(sigma, x) * velocity.to(x.dtype)


def heeded(like: Any) -> dict[str, Any]:
    """The part of a scheduler's config that its class knows; ValueError as `check_shift`.

    `from_config` of another's config keeps the other's keys, which do nothing there.
    """
    check_shift(like)
    parameters = inspect.signature(type(like).__init__).parameters
    return {key: value for key, value in like.config.items() if key in parameters}


def check_shift(like: Any) -> None:
    """ValueError where `set_shift` has moved a scheduler away from its config."""
    if "shift" in vars(type(like)) and like.shift != like.config.get("shift"):
        again = f"{type(like).__name__}.from_config(config, shift={like.shift:g})"
        raise ValueError(f"set_shift({like.shift:g}) moves a part of its levels: make it {again}")


def parametrization_of(like: Any) -> Parametrization:
    """That of a scheduler's model; ValueError names what cannot be served."""
    like = getattr(like, "like", like)  # that which ours was made like
    name, config = type(like).__name__, heeded(like)
    if name not in (*FLOW_SCHEDULERS, *BETA_SCHEDULERS):
        served = "flow matching (Euler, Heun) and the discrete VP schedulers are"
        reason = UNSERVED.get(name.removesuffix("Scheduler"), served)
        raise ValueError(f"{name} is not served: {reason}")
    flow = name in FLOW_SCHEDULERS or config.get("use_flow_sigmas")
    if config.get("stochastic_sampling"):
        raise ValueError(f"{name} with stochastic_sampling is not served: it draws noise")
    for key in ("sigma_min", "sigma_max"):  # of the pipeline (Cosmos 2), or of its spacing alone
        if name in FLOW_SCHEDULERS and like.config.get(key):
            own = f"{name} with {key}={like.config[key]}"
            raise ValueError(f"{own} is not served: it has levels of its own")
    prediction = config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", FLOW_STEPS)
    if config.get("use_flow_sigmas") and prediction != "flow_prediction":
        raise ValueError(f"{name} with use_flow_sigmas needs flow_prediction, not {prediction!r}")
    threshold = None
    if config.get("thresholding"):
        threshold = config["dynamic_thresholding_ratio"], config["sample_max_value"]
    if flow:
        inverted = config.get("invert_sigmas", False)
        return Parametrization(FLOW, "flow", steps, inverted=inverted, threshold=threshold)
    for key, usual in (("timestep_type", "discrete"), ("interpolation_type", "linear")):
        if config.get(key, usual) != usual:
            raise ValueError(f"{name} with {key}={config[key]} is not served")
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", False) else None
    table, prediction = vp.table_of(config), vp.prediction_of(config)
    return Parametrization(VE, prediction, steps, table, clip=clip, threshold=threshold)


def without_signal(recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """What is wrong where of a predictor's model and another one only one starts without signal.

    `config` is that of the other's scheduler.
    """
    key = "rescale_betas_zero_snr"
    own, other = (bool(c.get(key)) for c in (recipe.backend_config.get("scheduler", {}), config))
    return None if own == other else f"was learned with {key}={own}, the model has {other}"


def plain_like(like: Any) -> dict[str, Any]:
    """A scheduler's class (`_class_name`) and config as JSON has them; of ours, its model's."""
    like = getattr(like, "like", like)
    check_shift(like)
    config = {k: v for k, v in like.config.items() if not k.startswith("_")}
    return json.loads(json.dumps({"_class_name": type(like).__name__, **config}, default=list))


@dataclass(frozen=True)
class Course:
    """A scheduler's own way from noise to data: N + 1 falling levels, timesteps for N of them."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    first: float  # what its pipeline multiplies noise by
    last: float  # what its own last state is of ours: x / sqrt(1 + sigma^2) where it is VP's


def course_of(
    like: Any,
    model: Parametrization,
    steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Course:
    """The scheduler's own way for these arguments; ValueError for one that it does not take."""
    own = copy.deepcopy(like)
    if "skip_prk_steps" in own.config:
        own.register_to_config(skip_prk_steps=True)  # PNDM's half steps are no levels of a grid
    given = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
    takes = inspect.signature(own.set_timesteps).parameters
    given = {name: value for name, value in given.items() if value is not None}
    if "mu" not in takes:
        given.pop("mu", None)  # pipelines hand it to schedulers that shift and those that do not
    for name in given.keys() - takes.keys():
        raise ValueError(f"{type(like).__name__} takes no {name}: leave them out")
    if own.config.get("use_dynamic_shifting") and "mu" in takes and mu is None:
        raise ValueError(
            "use_dynamic_shifting needs a mu, which this pipeline gives to its own scheduler "
            "alone: make that with use_dynamic_shifting=False and a shift"
        )
    own.set_timesteps(steps, **given)
    times = [float(t) for t in own.timesteps]
    if isinstance(getattr(own, "sigmas", None), Tensor):
        levels = [1 - float(s) if model.inverted else float(s) for s in own.sigmas]
    else:
        last_alpha = getattr(own, "final_alpha_cumprod", torch.ones(()))
        alphas = torch.cat([own.alphas_cumprod[own.timesteps], last_alpha.reshape(1)])
        alphas = alphas.clamp(min=vp.LEAST_ALPHA)  # 0 where the first level has no signal
        levels = (1 / alphas.double() - 1).sqrt().tolist()
    n = len(levels)  # Heun's stand twice, the second time with their own timestep
    kept = [i for i, s in enumerate(levels) if i + 1 == n or s != levels[i + 1]]
    levels = [levels[i] for i in kept]
    first, last = float(getattr(own, "init_noise_sigma", 1.0)), 1.0
    if model.table and first == 1.0:
        first, last = (1 + levels[0] ** 2) ** 0.5, (1 + levels[-1] ** 2) ** -0.5
    return Course(tuple(levels), tuple(times[i] for i in kept[: len(levels) - 1]), first, last)


def spread_of(like: Any, mu: float | None) -> float:
    """What a scheduler's shift multiplies the odds sigma / (1 - sigma) by."""
    config = heeded(like)
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", 1.0)
    assert mu is not None  # pipelines that shift dynamically give it
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def shifted_end(like: Any) -> float:
    """The level of a scheduler's first timestep, the lowest that its model was trained on."""
    config = heeded(like)
    steps = config.get("num_train_timesteps", FLOW_STEPS)
    end = 1 / (FLOW_STEPS if steps == 1 else steps)  # OmniGen's times are levels
    shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
    return end if config.get("use_dynamic_shifting") else shift * end / (1 + (shift - 1) * end)


def levels_of(like: Any, model: Parametrization, mu: float | None = None) -> NoiseLevels:
    """The levels of a pipeline's model; `flowmatch` is its scheduler's own spacing, at this mu."""
    if model.table:
        return model.table.levels
    grid = partial(table_grid, like, model)
    return NoiseLevels(FLOW, shifted_end(like), 1.0, mu=mu, own=grid)


def levels_at(like: Any, tokens: int) -> NoiseLevels:
    """The levels of a flow-matching model for so many tokens; ValueError if it is not served."""
    like = getattr(like, "like", like)
    config, mu = heeded(like), None
    if config.get("use_dynamic_shifting"):
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        first, last = (
            config.get(f"{n}_image_seq_len", d) for n, d in (("base", 256), ("max", 4096))
        )
        mu = low + (high - low) / (last - first) * (tokens - first)
    model = parametrization_of(like)
    if model.inverted:
        raise ValueError("invert_sigmas in the scheduler's config is not served for this model")
    levels = levels_of(like, model, mu)
    linear = config.get("time_shift_type", "exponential") != "exponential"
    if linear or any(config.get(name) for name in SPACINGS) or model.steps != FLOW_STEPS:
        return levels
    return replace(levels, own=None, shift=config.get("shift", 1.0) if mu is None else 1.0)


def table_grid(like: Any, model: Parametrization, num_steps: int, mu: float | None) -> list[float]:
    """The levels [num_steps] of a table on a scheduler's spacing; ValueError if it has none."""

    def spaced(n: int) -> tuple[float, ...]:
        even = [1 - i / n for i in range(n)] if model.steps == 1 else None  # as OmniGen gives them
        return course_of(like, model, n, sigmas=even, mu=mu).sigmas

    *levels, _ = spaced(num_steps)
    if levels[-1] > NEAR_DATA or len(levels) != num_steps:
        end = shifted_end(like)
        *levels, _ = spaced(num_steps - 1)
        levels = [*(s for s in levels if s > end), end]
    if levels[0] > NEAR_NOISE:
        levels[0] = 1.0
    if len(levels) != num_steps or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"{type(like).__name__} has no {num_steps} falling levels: {levels}")
    return levels
