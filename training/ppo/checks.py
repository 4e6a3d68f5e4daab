"""What the settings of PPO may be: every refusal names the key, its value and what would do."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from solvers.predictor import FLOW_BACKENDS, SCHEDULES, Recipe
from src.files import nearest
from src.seeds import MAX_SEED
from training.ppo.sections import MULTI, Config, Ppo, RewardSettings

BACKENDS = ("edm", "analytic", "ldm", "sd3", "flux")
DTYPES = ("float32", "float64", "bfloat16", "float16")
GROUPINGS = ("crn", "prompt", "mixed")
GUIDANCE = ("cfg",)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Bound:
    """Which numbers a key takes."""

    low: float = 0
    high: float = math.inf
    above: bool = False  # low itself is out

    def holds(self, value: float) -> bool:
        """Whether a number is one of them; NaN and infinity never are."""
        over = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and over and value <= self.high

    @property
    def said(self) -> str:
        """For an error."""
        low = f"above {self.low}" if self.above else f"{self.low} or more"
        return low if self.high == math.inf else f"{low}, {self.high} at most"


POSITIVE, COUNT = Bound(0, above=True), Bound(1)
BOUNDS = {
    "model.num_steps": Bound(2),
    "model.num_points": Bound(1, 8),
    "model.guidance_rate": Bound(0),
    "model.schedule_rho": POSITIVE,
    "model.resolution": COUNT,
    "model.backend_options.points_chunk": COUNT,
    "model.backend_options.max_batch_size": COUNT,
    "model.backend_options.decode_batch": COUNT,
    "reward.batch_size": COUNT,
    "ppo.steps": COUNT,
    "ppo.rollout_batch_size": Bound(2),
    "ppo.rloo_k": Bound(2),
    "ppo.ppo_epochs": COUNT,
    "ppo.minibatch_size": COUNT,
    "ppo.learning_rate": Bound(0, 1, above=True),
    "ppo.clip_range": Bound(0, 1, above=True),
    "ppo.kl_coef": Bound(0),
    "ppo.entropy_coef": Bound(0),
    "ppo.max_grad_norm": POSITIVE,
    "ppo.dirichlet_concentration": POSITIVE,
    "ppo.scale_std": Bound(0, 1, above=True),
    "ppo.eval_interval": Bound(0),
    "ppo.eval_prompts": Bound(2),
    "ppo.early_stop": Bound(0),
    "ppo.nonfinite_budget": Bound(0),
    "logging.log_interval": COUNT,
    "logging.save_interval": COUNT,
    "logging.keep_last": COUNT,
    "run.seed": Bound(0, MAX_SEED),
}
CHOICES = {
    "model.backend": BACKENDS,
    "model.schedule_type": SCHEDULES,
    "model.guidance_type": GUIDANCE,
    "model.backend_options.dtype": DTYPES,
    "ppo.grouping": GROUPINGS,
}


def leaves(section: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Each key by its dotted name, with its value."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{above}{entry.name}.")
        else:
            yield above + entry.name, value


def checked(config: Config) -> Config:
    """The settings themselves; ValueError for values that no run can be made of."""
    for name, value in leaves(config):
        check_value(name, value)
    check_reward(config.reward)
    check_ppo(config.ppo)
    return config


def check_value(name: str, value: Any) -> None:
    """ValueError for a number out of range, an unknown choice, and text that is empty."""
    if value is None:
        return
    bound = BOUNDS.get(name)
    if bound and not bound.holds(value):
        raise ValueError(f"{name} {value} is out of range: {bound.said}")
    choices = CHOICES.get(name)
    if choices and value not in choices:
        near = nearest(value, choices)
        said = f"did you mean {near}? There are {', '.join(choices)}"
        raise ValueError(f"unknown {name} {value!r}: {said}")
    if value == "" and name != "model.backend_options.negative_prompt":
        raise ValueError(f"{name} is empty: give it, or leave the key out")
    if name == "run.run_name" and not NAME.fullmatch(value):
        raise ValueError(f"{name} {value!r} cannot name a folder: letters, digits, '.', '_', '-'")


def check_reward(reward: RewardSettings) -> None:
    """ValueError for weights that no mean can be made of, and for paths that are no text."""
    weights = reward.multi.weights
    for name, weight in weights.items():
        if not Bound().holds(weight):
            raise ValueError(f"reward.multi.weights.{name} {weight} is out of range: 0 or more")
    if weights and not any(weights.values()):
        raise ValueError("reward.multi.weights are all 0: give one above 0")
    if weights and reward.type != MULTI:
        said = f"reward.multi.weights do nothing for reward.type {reward.type}"
        raise ValueError(f"{said}: leave them out, or set reward.type=multi")
    path = reward.weights_path
    paths = path.values() if isinstance(path, dict) else [path or "none"]
    if not all(isinstance(part, str) for part in paths):
        raise ValueError(f"reward.weights_path {path!r} is no path: write it, or NAME: PATH lines")
    if isinstance(path, str) and reward.type == MULTI:
        raise ValueError(f"reward.weights_path {path!r} is one path for several: write hps: PATH")


def check_ppo(ppo: Ppo) -> None:
    """ValueError where the batch does not divide, or pixels are not wanted."""
    batch = ppo.rollout_batch_size
    for name in ("rloo_k", "minibatch_size"):
        size = getattr(ppo, name)
        if batch % size:
            said = f"ppo.{name} {size} does not divide ppo.rollout_batch_size {batch}"
            raise ValueError(f"{said}: set ppo.rollout_batch_size={-(-batch // size) * size}")
    if not ppo.decode_rgb:
        raise ValueError("ppo.decode_rgb false cannot be: every reward looks at decoded images")
    if ppo.early_stop and not ppo.eval_interval:
        raise ValueError(f"ppo.early_stop {ppo.early_stop} needs ppo.eval_interval above 0")


def check_ranks(ppo: Ppo, ranks: int) -> None:
    """ValueError where a rank would have no image."""
    if ranks > ppo.rollout_batch_size:
        said = f"{ranks} ranks are more than ppo.rollout_batch_size {ppo.rollout_batch_size}"
        raise ValueError(f"{said}: lower --nproc_per_node, or raise it")


def check_against(config: Config, recipe: Recipe) -> None:
    """ValueError, with both values, where a file and its predictor's recipe disagree.

    The size counts where the model takes one: recipes of LDMs give latents or another's size.
    """
    model, where = config.model, config.data.predictor_snapshot
    sized = recipe.backend in FLOW_BACKENDS and recipe.img_resolution is not None
    pairs = {
        "num_steps": (model.num_steps, recipe.num_steps),
        "num_points": (model.num_points, recipe.num_points),
        "schedule_type": (model.schedule_type, recipe.schedule_type),
        "schedule_rho": (model.schedule_rho, recipe.schedule_rho),
        "backend": (model.backend, recipe.backend),
        "guidance_rate": (model.guidance_rate, recipe.guidance_rate),
        "guidance_type": (model.guidance_type, recipe.guidance_type),
        "resolution": (model.resolution, recipe.img_resolution) if sized else (None, None),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            said = f"model.{name} {ours} is not that of {where}, which is {theirs}"
            raise ValueError(f"{said}: set model.{name}={theirs}, or choose another predictor")
    if recipe.solver != "epd":
        said = f"data.predictor_snapshot {where} is of {recipe.solver}"
        raise ValueError(f"{said}: the policy is over tables of epd")
