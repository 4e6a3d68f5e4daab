"""What a run of PPO is told: plain values by section, checked before anything is loaded."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from solvers.recipe import SCHEDULES, Recipe
from src.files import nearest, read_text

BACKENDS = ("edm", "analytic", "ldm", "sd3", "flux")
DTYPES = ("float32", "float64", "bfloat16", "float16")
GROUPINGS = ("crn", "prompt", "mixed")
GUIDANCE = ("cfg",)
MULTI = "multi"


@dataclass(frozen=True)
class Data:
    """Where training starts, and the prompts that it sees and never sees."""

    predictor_snapshot: str
    prompt_csv: str
    heldout_prompts: str | None = None  # None: as many of prompt_csv as evaluation needs


@dataclass(frozen=True)
class BackendOptions:
    """How a model is opened; the names are those of sample.py's options."""

    dtype: str = "float32"
    model_config: str | None = None
    negative_prompt: str | None = None
    cpu_offload: bool = False
    vae_tiling: bool = False
    vae_slicing: bool = False
    release_encoders: bool = False
    points_chunk: int | None = None


@dataclass(frozen=True)
class Model:
    """The backbone and the grid, which must be those of the predictor's recipe."""

    model: str  # folder, file, or name on the hub, as in sample.py
    backend: str
    schedule_type: str
    num_steps: int
    num_points: int
    dataset_name: str = "unknown"
    guidance_type: str | None = None
    guidance_rate: float = 1.0
    resolution: int | None = None
    schedule_rho: float = 1.0
    backend_options: BackendOptions = field(default_factory=BackendOptions)


@dataclass(frozen=True)
class Multi:
    """Weights by reward, of `type: multi`; of weight zero are neither loaded nor needed."""

    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardSettings:
    """What the policy is raised by, and what is only looked at."""

    type: str
    multi: Multi = field(default_factory=Multi)
    batch_size: int = 8  # images scored at once
    weights_path: Any = None  # of the one reward, or by the names of rewards.weights
    enable_amp: bool = False
    judges: list[str] = field(default_factory=list)  # scored at evaluations, never trained on

    @property
    def name(self) -> str:
        """The reward as `rewards.registry` calls it: `hps`, or `multi:hps=1.0,clip=0.5`."""
        if self.type != MULTI or not self.multi.weights:
            return self.type
        return MULTI + ":" + ",".join(f"{n}={w}" for n, w in self.multi.weights.items())


@dataclass(frozen=True)
class Ppo:
    """The policy and its training; numbers of images are over all ranks together."""

    steps: int = 1000
    rollout_batch_size: int = 16
    rloo_k: int = 4
    ppo_epochs: int = 1
    minibatch_size: int = 4
    learning_rate: float = 7e-5
    clip_range: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    dirichlet_concentration: float = 10.0
    decode_rgb: bool = True
    train_scale_dir: bool = False
    train_scale_time: bool = False
    scale_std: float = 0.05
    grouping: str = "crn"
    eval_interval: int = 50
    eval_prompts: int = 32
    early_stop: int = 0  # evaluations in a row without a new best; 0 goes on to the end
    nonfinite_budget: int = 16


@dataclass(frozen=True)
class Logging:
    """How often a run tells, and keeps what it has."""

    log_interval: int = 1
    save_interval: int = 50
    keep_last: int = 3
    tensorboard: bool = True


@dataclass(frozen=True)
class Run:
    """Where a run writes, and the seed that all its randomness hangs on."""

    run_name: str
    output_root: str = "exps"
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A file of training/ppo/cfgs."""

    data: Data
    model: Model
    reward: RewardSettings
    run: Run
    ppo: Ppo = field(default_factory=Ppo)
    logging: Logging = field(default_factory=Logging)


@dataclass(frozen=True)
class Bound:
    """Which numbers a key takes."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False  # low itself is out

    def holds(self, value: float) -> bool:
        """Whether a number is one of them; NaN and infinity never are."""
        over = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and over and value <= self.high

    @property
    def said(self) -> str:
        """For an error."""
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low}, {self.high:g} at most"


POSITIVE, COUNT = Bound(0, above=True), Bound(1)
BOUNDS = {
    "model.num_steps": Bound(2),
    "model.num_points": Bound(1, 8),
    "model.guidance_rate": Bound(0),
    "model.schedule_rho": POSITIVE,
    "model.resolution": COUNT,
    "model.backend_options.points_chunk": COUNT,
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
    "run.seed": Bound(0, 2**31 - 1),
}
CHOICES = {
    "model.backend": BACKENDS,
    "model.schedule_type": SCHEDULES,
    "model.guidance_type": GUIDANCE,
    "model.backend_options.dtype": DTYPES,
    "ppo.grouping": GROUPINGS,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a file under `overrides`, each `section.key=value`, checked.

    Raises ValueError in one line that names the key, its value and what would do: for a file
    that cannot be read, a key that is unknown, missing or of another type, a number out of range
    or NaN, and settings that contradict each other.
    """
    told = (parsed(read_text(path), str(path)), *(override(text) for text in overrides))
    try:
        for layer in told:
            check_keys(OmegaConf.to_container(layer, resolve=False))
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *told))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: give it in {path}") from error
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{error.full_key or path}: {said}") from error
    assert isinstance(found, Config)
    return checked(found)


def parsed(text: str, name: str) -> Any:
    """YAML as a tree of OmegaConf; ValueError where it is broken or no sections."""
    try:
        tree = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{name} is not YAML that can be read: {said}") from error
    if not isinstance(OmegaConf.to_container(tree), dict):
        raise ValueError(f"{name} holds no sections: see training/ppo/cfgs/sd3_512.yaml")
    return tree


def override(text: str) -> Any:
    """`section.key=value` as a tree; ValueError for anything else."""
    key, equals, _ = text.partition("=")
    if not equals or "." not in key or not all(key.split(".")):
        raise ValueError(f"--override {text!r} is not section.key=value: ppo.steps=100, say")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"--override {text!r} cannot be read: {said}") from error


def check_keys(tree: Any, kind: type = Config, above: str = "") -> None:
    """ValueError for a key that is not there, naming the nearest of all that are."""
    hints = typing.get_type_hints(kind)
    for key, value in tree.items():
        name = f"{above}{key}"
        if key not in hints:
            near = nearest(name, [above + known for known in hints])
            raise ValueError(f"unknown key {name!r}: did you mean {near}?")
        if not dataclasses.is_dataclass(hints[key]):
            continue
        if not isinstance(value, Mapping):
            keys = ", ".join(f.name for f in dataclasses.fields(hints[key]))
            raise ValueError(f"{name} {value!r} is no section: it has the keys {keys}")
        check_keys(value, typing.cast(type, hints[key]), f"{name}.")


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
            raise ValueError(f"{said}: make it {size * max(1, round(batch / size))}, say")
    if not ppo.decode_rgb:
        raise ValueError("ppo.decode_rgb false cannot be: every reward looks at decoded images")
    if ppo.early_stop and not ppo.eval_interval:
        raise ValueError(f"ppo.early_stop {ppo.early_stop} needs ppo.eval_interval above 0")


def check_ranks(ppo: Ppo, ranks: int) -> None:
    """ValueError where images cannot be shared out evenly."""
    for name in ("rollout_batch_size", "minibatch_size"):
        size = getattr(ppo, name)
        if size % ranks:
            said = f"ppo.{name} {size} does not divide by {ranks} ranks"
            raise ValueError(f"{said}: make it {-(-size // ranks) * ranks}, or change the ranks")


def check_against(config: Config, recipe: Recipe) -> None:
    """ValueError, with both values, where a file and its predictor's recipe disagree.

    Recipes of LDMs give latents or a size that is not theirs, so that their size is not compared.
    """
    model, where = config.model, config.data.predictor_snapshot
    sized = recipe.backend != "ldm" and None not in (recipe.img_resolution, model.resolution)
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
