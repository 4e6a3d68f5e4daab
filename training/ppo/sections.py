"""The sections of a file of training/ppo/cfgs; README.md beside says what every key does."""

from dataclasses import dataclass, field
from typing import Any

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
    max_batch_size: int = 16  # images denoised at once on a rank
    decode_batch: int = 8  # latents decoded at once


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
    judges: list[str] = field(default_factory=list)  # scored and logged, never trained on

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
