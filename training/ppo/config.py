"""What a run of stage 2 is given: a file of YAML under overrides -> `Config`, checked at once.

Each key stands beside its bound, and README.md says what every key does. Where None is the
default, the predictor's recipe or the model's family decides.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from solvers.recipe import FLOW_BACKENDS, Recipe
from solvers.schedules import SCHEDULES
from src.files import nearest, read_text
from src.options import DTYPES
from src.runs import NAME
from src.seeds import MAX_SEED

EXAMPLE = "training/ppo/cfgs/sd3_512.yaml"
MULTI = "multi"
PROMPTS = "src/prompts/train.txt"
PUBLISHED = {
    "model_id": "model",
    "model_name_or_path": "model",
    "resolution": "resolution",
    "torch_dtype": "backend_options.dtype",
    "enable_model_cpu_offload": "backend_options.cpu_offload",
}
"""Names in the published `model.backend_options`, and where the value stands here."""

OF_PPO_ALONE = (
    *("antithetic", "baseline", "clip_range", "entropy_by_interval", "entropy_coef", "kl_coef"),
    *("learning_by_interval", "max_grad_norm", "ppo_epochs"),
)
"""Keys that other methods cannot honour."""
UNBOUNDED = {"low": -math.inf, "above": -math.inf, "high": math.inf}
NOT_NEGATIVE = UNBOUNDED | {"low": 0}


def key(
    default: Any,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    of: Sequence[str] = (),
) -> Any:
    """A key's default with its bounds (`above` itself is out) or its choices."""
    return field(default=default, metadata={"low": low, "above": above, "high": high, "of": of})


@dataclass(frozen=True)
class Data:
    """Where training starts, and the prompts that it sees and never sees."""

    predictor_snapshot: str
    prompt_csv: str | None = None  # None: PROMPTS
    heldout_prompts: str | None = None  # None: as many of prompt_csv as evaluations need


@dataclass(frozen=True)
class BackendOptions:
    """How a model is opened; the names are those of sample.py's options."""

    dtype: str = key("float32", of=("auto", *DTYPES))
    model_config: str | None = None
    negative_prompt: str | None = None
    cpu_offload: bool = False
    vae_tiling: bool = False
    vae_slicing: bool = False
    release_encoders: bool = False
    points_chunk: int | None = key(None, low=1)
    max_batch_size: int = key(16, low=1)  # images denoised at once on a rank
    decode_batch: int = key(8, low=1)  # latents decoded at once
    flowmatch_mu: float | None = None  # must be the predictor's, as all below
    flowmatch_shift: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None


@dataclass(frozen=True)
class ModelSettings:
    """The backbone and the grid; what is given must be as in the predictor's recipe."""

    model: str | None = None  # folder, file, or name on the hub; None: the predictor's
    dataset_name: str | None = None
    backend: str | None = None
    resolution: int | None = key(None, low=1)
    guidance_type: str | None = key(None, of=("cfg",))
    guidance_rate: float | None = key(None, low=0)
    schedule_type: str | None = key(None, of=(*SCHEDULES, "custom"))
    schedule_rho: float | None = key(None, above=0)
    num_steps: int | None = key(None, low=2)
    num_points: int | None = key(None, low=1)
    backend_options: BackendOptions = field(default_factory=BackendOptions)


@dataclass(frozen=True)
class Multi:
    """Weights by reward, of `type: multi`; of weight zero are neither loaded nor needed."""

    weights: dict[str, float] = field(default_factory=dict, metadata=NOT_NEGATIVE)


@dataclass(frozen=True)
class RewardSettings:
    """What the policy is raised by, and what is only looked at."""

    type: str
    multi: Multi = field(default_factory=Multi)
    batch_size: int = key(8, low=1)  # images scored at once
    weights_path: str | dict[str, str] | None = None  # of the one reward, or by name
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

    steps: int = key(1000, low=1)
    rollout_batch_size: int = key(16, low=2)
    rloo_k: int = key(4, low=2)
    ppo_epochs: int = key(1, low=1)
    minibatch_size: int = key(4, low=1)
    learning_rate: float = key(7e-5, above=0, high=1)
    clip_range: float = key(0.2, above=0, high=1)
    kl_coef: float = key(0.0, low=0)
    entropy_coef: float = key(0.0, low=0)
    max_grad_norm: float = key(1.0, above=0)
    dirichlet_concentration: float = key(10.0, above=0)
    decode_rgb: bool = True
    method: str = key("ppo", of=("ppo", "cma", "quotients"))
    baseline: str = key("rloo", of=("rloo", "james-stein", "mixed"))
    grouping: str = key("crn", of=("crn", "prompt", "mixed"))
    antithetic: bool = False
    train_points: bool = True
    train_weights: bool = True
    train_grid: bool = False
    train_scale_dir: bool = False
    train_scale_time: bool = False
    train_guidance: bool = False
    scale_std: float = key(0.05, above=0, high=1)
    guidance_std: float = key(0.15, above=0, high=1)
    guidance_interval: list[float] = field(default_factory=list, metadata=NOT_NEGATIVE)
    grid_concentration: float = key(200.0, above=0)
    effect: float = key(0.03, above=0, high=1)
    learning_by_interval: list[float] = field(default_factory=list, metadata=NOT_NEGATIVE)
    entropy_by_interval: list[float] = field(default_factory=list, metadata=NOT_NEGATIVE)
    pull_coef: float = key(0.0, low=0)
    features: str | None = None
    eval_interval: int = key(50, low=0)
    eval_prompts: int = key(32, low=2)
    eval_seeds: int = key(1, low=1)
    early_stop: int = key(0, low=0)
    watch: str | None = None
    nonfinite_budget: int = key(16, low=0)


@dataclass(frozen=True)
class Logging:
    """How often a run writes its numbers, and what it keeps."""

    log_interval: int = key(1, low=1)
    save_interval: int = key(50, low=1)
    keep_last: int = key(3, low=1)
    tensorboard: bool = True


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, and the seed that all its randomness hangs on."""

    run_name: str = "ppo"
    output_root: str = "exps"
    seed: int = key(0, low=0, high=MAX_SEED)


@dataclass(frozen=True)
class Config:
    """A file of training/ppo/cfgs."""

    data: Data
    reward: RewardSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    ppo: Ppo = field(default_factory=Ppo)
    logging: Logging = field(default_factory=Logging)
    run: RunSettings = field(default_factory=RunSettings)


# --- reading ------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a file under `overrides`, each `section.key=value`, checked.

    Raises ValueError in one line that names the key, its value and what would do: for a file
    that cannot be read, a key that is unknown, missing or of another type, a number out of range
    or NaN, and settings that contradict each other.
    """
    for text in overrides:
        name, equals, _ = text.partition("=")
        if not equals or "." not in name or not all(name.split(".")):
            raise ValueError(f"--override {text!r} is not section.key=value: ppo.steps=100, say")
    text, layers, where = read_text(path), [], f"{path} is not YAML that can be read"
    try:
        layers.append(OmegaConf.create(text))
        for override in overrides:
            where = f"--override {override!r} cannot be read"
            layer = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
            layers.append(OmegaConf.create(at_our_places(layer)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(layers[0]):
        raise ValueError(f"{path} holds no sections: see {EXAMPLE}")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or path}: {str(error).splitlines()[0]}") from error
    config = build(Config, at_our_places(tree))
    check_settings(config)
    return config


def at_our_places(tree: Any) -> Any:
    """Settings with what has a published name at our place, where that is empty."""
    model: Any = tree.get("model")
    options: Any = model.get("backend_options") if isinstance(model, dict) else None
    for name, place in PUBLISHED.items():
        if isinstance(options, dict) and name in options:
            section = options if place.startswith("backend_options.") else model
            value, key = options.pop(name), place.rpartition(".")[2]
            section[key] = value if section.get(key) is None else section[key]
    return tree


def build(kind: Any, tree: Any, above: str = "") -> Any:
    """A section of nested dicts; ValueError by the key's name for whatever is wrong in it."""
    hints = typing.get_type_hints(kind)
    if not isinstance(tree, dict):
        keys = ", ".join(hints)
        raise ValueError(f"{above[:-1]} {tree!r} is no section: it has the keys {keys}")
    for name in tree:
        if name not in hints:
            near = nearest(f"{above}{name}", [above + other for other in hints])
            raise ValueError(f"unknown key '{above}{name}': did you mean {near}?")
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        name, hint = above + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            values[entry.name] = build(hint, tree.get(entry.name, {}), f"{name}.")
        elif entry.name in tree:
            values[entry.name] = checked(name, tree[entry.name], hint, entry.metadata)
        elif entry.default is entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name} is missing: see {EXAMPLE}")
    return kind(**values)


def checked(name: str, value: Any, hint: Any, about: Mapping[str, Any]) -> Any:
    """The value as the type of its key, ints as floats where floats belong.

    Raises ValueError for another type, a number out of range, an unknown choice, empty text.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    outers = [typing.get_origin(kind) or kind for kind in kinds]
    if float in outers and type(value) is int:
        value = float(value)
    if type(value) not in outers:
        wanted = " or ".join(o.__name__.replace("NoneType", "null") for o in outers)
        raise ValueError(f"{name} is {str(value)[:80]!r}, where {wanted} belongs")
    inner = typing.get_args(kinds[outers.index(type(value))])
    if isinstance(value, list):
        return [checked(name, part, inner[0], about) for part in value]
    if isinstance(value, dict):
        return {str(k): checked(f"{name}.{k}", v, inner[1], about) for k, v in value.items()}
    if isinstance(value, str):
        of = about.get("of") or [value]
        if value not in of:
            said = f"did you mean {nearest(value, of)}? There are {', '.join(of)}"
            raise ValueError(f"unknown {name} {value!r}: {said}")
        if value == "" and name != "model.backend_options.negative_prompt":
            raise ValueError(f"{name} is empty: give it, or leave the key out")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low, above, high = (about.get(bound, end) for bound, end in UNBOUNDED.items())
        if not (math.isfinite(value) and low <= value <= high and above < value):
            least = f"above {above:g}" if above > -math.inf else f"{low:g} or more"
            said = least if high == math.inf else f"{least}, {high:g} at most"
            raise ValueError(f"{name} {value} is out of range: {said}")
    return value


# --- what must fit ------------------------------------------------------------------------


def check_settings(config: Config) -> None:
    """ValueError where settings contradict each other."""
    ppo, reward, run = config.ppo, config.reward, config.run
    batch, rewards = ppo.rollout_batch_size, (reward.type, reward.name, *reward.judges)
    between = ppo.guidance_interval
    for name in ("rloo_k", *(["minibatch_size"] * (ppo.method == "ppo"))):
        size = getattr(ppo, name)
        if batch % size:
            said = f"ppo.{name} {size} does not divide ppo.rollout_batch_size {batch}"
            raise ValueError(f"{said}: set ppo.rollout_batch_size={-(-batch // size) * size}")
    usual = vars(Ppo())
    for name in OF_PPO_ALONE if ppo.method != "ppo" else ():
        pairs = name == "antithetic" and ppo.method == "quotients"  # which always draws them
        if getattr(ppo, name) != usual[name] and not pairs:
            said = f"ppo.{name} does nothing for ppo.method {ppo.method}"
            raise ValueError(f"{said}: set ppo.{name}={usual[name]}, or ppo.method=ppo")
    wrong = {
        "there is nothing to train: set ppo.train_points=true, say": not any(
            value for name, value in vars(ppo).items() if name.startswith("train_")
        ),
        "ppo.decode_rgb false cannot be: every reward looks at decoded images": not ppo.decode_rgb,
        f"ppo.early_stop {ppo.early_stop} needs ppo.eval_interval above 0": ppo.early_stop
        and not ppo.eval_interval,
        f"ppo.rloo_k {ppo.rloo_k} is odd, and tables are drawn in pairs: make it even": (
            ppo.antithetic or ppo.method == "quotients"
        )
        and ppo.rloo_k % 2,
        f"ppo.method {ppo.method} compares tables on equal noise: set ppo.grouping=crn": (
            ppo.method != "ppo" and ppo.grouping != "crn"
        ),
        f"ppo.baseline {ppo.baseline} does nothing for ppo.grouping mixed: set that to mixed": (
            ppo.baseline == "james-stein" and ppo.grouping == "mixed"
        ),
        "ppo.entropy_by_interval does nothing at ppo.entropy_coef 0: set that too": (
            ppo.entropy_by_interval and not ppo.entropy_coef
        ),
        f"ppo.features {ppo.features} do nothing: set ppo.pull_coef, or ppo.eval_seeds above 1": (
            ppo.features and not ppo.pull_coef and ppo.eval_seeds < 2
        ),
        f"ppo.watch {ppo.watch!r} is neither the reward nor a judge: {', '.join(rewards)}": (
            ppo.watch is not None and ppo.watch not in rewards
        ),
        f"ppo.guidance_interval {between} is no pair, low first, or nothing is guided": (
            between and not (ppo.train_guidance and between == sorted(between)[:2] and between[1:])
        ),
        "reward.multi.weights are all 0: give one above 0": reward.multi.weights
        and not any(reward.multi.weights.values()),
        f"reward.weights_path {reward.weights_path!r} is one path for several: write hps: PATH": (
            isinstance(reward.weights_path, str) and reward.type == MULTI
        ),
        f"run.run_name {run.run_name!r} cannot name a folder: letters, digits, '.', '_', '-'": (
            not NAME.fullmatch(run.run_name)
        ),
    }
    for said, holds in wrong.items():
        if holds:
            raise ValueError(said)


def check_ranks(ppo: Ppo, ranks: int) -> None:
    """ValueError where a rank would have no image."""
    if ranks > ppo.rollout_batch_size:
        said = f"{ranks} ranks are more than ppo.rollout_batch_size {ppo.rollout_batch_size}"
        raise ValueError(f"{said}: lower --nproc_per_node, or raise it")


def resolved(config: Config, recipe: Recipe) -> Config:
    """The settings with what they leave to the predictor's recipe, or to the backend, filled in.

    The size counts where the model takes one: recipes of LDMs give latents or another's size.

    Raises ValueError, with both values, where settings and recipe disagree.
    """
    model, where = config.model, config.data.predictor_snapshot
    names = "num_steps num_points schedule_type schedule_rho backend guidance_rate guidance_type"
    theirs = {name: getattr(recipe, name) for name in names.split()}
    if recipe.backend in FLOW_BACKENDS and recipe.img_resolution is not None:
        theirs["resolution"] = recipe.img_resolution
    shifts = {n: getattr(recipe, n) for n in ("flowmatch_mu", "flowmatch_shift")}
    ranges = {n: getattr(recipe, n) for n in ("sigma_min", "sigma_max")}
    inside = {f"backend_options.{n}": value for n, value in (shifts | ranges).items()}
    for name, value in (theirs | inside).items():
        section = model.backend_options if "." in name else model
        ours = getattr(section, name.rpartition(".")[2])
        if ours is not None and ours != value:
            theirs_in_yaml = "null" if value is None else value
            said = f"model.{name} {ours} is not that of {where}, which is {theirs_in_yaml}"
            fix = f"set model.{name}={theirs_in_yaml}, or choose another predictor"
            raise ValueError(f"{said}: {fix}")
    for name_by in ("learning_by_interval", "entropy_by_interval"):
        count = len(getattr(config.ppo, name_by))
        if count not in (0, recipe.num_steps - 1):
            said = f"ppo.{name_by} has {count} numbers"
            raise ValueError(f"{said}: {where} has {recipe.num_steps - 1} intervals")
    data = replace(config.data, prompt_csv=config.data.prompt_csv or PROMPTS)
    return replace(config, data=data, model=replace(model, **theirs))


def to_yaml(config: Config) -> str:
    """The settings as a file that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
