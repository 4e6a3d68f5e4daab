"""EPD in stock diffusers pipelines.

    pipe.scheduler = EPDScheduler.from_predictor("sd3-512-best", like=pipe.scheduler)
    image = pipe("a red fox", height=512, width=512, guidance_scale=4.5).images[0]

takes the K points of a step one after another, as timesteps of their own. To take them in one
call:

    image, = parallel_pipeline(pipe, "sd3-512-best", size=(512, 512))(["a red fox"], seeds=[0])
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from PIL import Image
from torch import Tensor

from backends import flow, vp
from backends.base import Backend, ModelOptions, NoiseLevels
from backends.flow import flow_levels
from backends.generate import Job, Method, generate
from backends.interleaved import Interleaved
from backends.methods import check_fit, predictor_method, recipe_sigmas
from backends.pipelines import wrap
from solvers.epd import EPD, Directions
from solvers.predictor import (
    Predictor,
    find_predictor,
    from_content,
    load_predictor,
    to_content,
)
from solvers.recipe import for_flow
from src.images import to_bytes
from src.text import meet

Betas: TypeAlias = list[float] | None
FAMILIES: dict[str, dict[str, Any]] = {
    "ldm": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "sd3": {"shift": 3.0},
    "flux": {"shift": 3.0, "use_dynamic_shifting": True},
}
"""What the schedulers of the published models say, by the recipe's backend."""


class EPDScheduler(SchedulerMixin, ConfigMixin):
    """A predictor as a scheduler; the predictor decides the timesteps, whatever is asked for.

    `num_inference_steps` and `sigmas` of a call change nothing. Of a pipeline from image to
    image, `strength` must start at the start of an interval, and is refused elsewhere.
    """

    order = 1

    @register_to_config
    def __init__(  # noqa: PLR0913 (diffusers' configs are flat, and pipelines read them)
        self,
        predictor: Mapping[str, Any],
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
    ) -> None:
        """`predictor` is the content of a predictor's JSON file; the rest is the model's."""
        self.learned = from_content(dict(predictor))
        if not isinstance(self.learned.table, Directions):
            raise ValueError("a stock pipeline steps by EPD alone: use parallel_pipeline")
        if self.learned.table.history:
            raise ValueError("a stock pipeline keeps no known slopes: use parallel_pipeline")
        self.timesteps = torch.zeros(0)
        self.interleaved: Interleaved | None = None

    @classmethod
    def from_predictor(
        cls, predictor: str | Predictor, like: SchedulerMixin | None = None
    ) -> "EPDScheduler":
        """A predictor (or its file, or its name within exps/) for a model.

        `like` is the pipeline's own scheduler, which knows the model's levels; without it they
        are those of the published SD 1.5, SD3 or FLUX. ValueError for other predictors.
        """
        learned = opened(predictor)
        if like is None:
            if learned.recipe.backend not in FAMILIES:
                raise ValueError(f"a predictor for {learned.recipe.backend!r} needs like=...")
            model = FAMILIES[learned.recipe.backend]
        else:
            names = inspect.signature(cls).parameters.keys() - {"predictor"}
            model = {n: v for n, v in config_of(like).items() if n in names}
        return cls(as_plain(learned), **model)

    # --- what pipelines ask for -----------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Start a picture; of the arguments only the device and `mu`, by resolution, matter."""
        recipe = self.learned.recipe
        levels = self.levels(mu)
        solver = self.learned.solver(levels.process)
        assert isinstance(solver, EPD)
        self.interleaved = Interleaved(
            table=solver.table,
            base=solver.base,
            sigmas=tuple(recipe_sigmas(recipe, levels).tolist()),
            process=levels.process,
            afs=recipe.afs,
        )
        told = torch.tensor([call.told for call in self.interleaved.calls], dtype=torch.float64)
        self.timesteps = self.clock(told).float().to(device)
        self.num_inference_steps = len(self.timesteps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this timestep; ValueError inside an interval, whose start is not there."""
        self.running.begin(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network sees of x."""
        x = self.running.seen(sample)
        if for_flow(self.learned.recipe):
            return x
        told = x.new_full((len(x),), self.running.now.told, dtype=torch.float32)
        return vp.scaled(x.float(), told).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next place that the network is asked at, or, after the last point, the next x."""
        following = self.running.step(sample, lambda x, told: self.clean(x, told, model_output))
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    @property
    def init_noise_sigma(self) -> float:
        """The strength of the noise that x starts as; some pipelines ask before all else."""
        if self.interleaved is None:
            self.set_timesteps()
        return self.running.sigmas[0]

    @property
    def begin_index(self) -> int:
        """The timestep of the first call."""
        return self.running.first

    @property
    def step_index(self) -> int:
        """The timestep of the next call."""
        return self.running.index

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """x at the level of the first timestep, from an image to start from."""
        sigma = self.running.now.start
        alpha = 1 - sigma if for_flow(self.learned.recipe) else 1.0
        return alpha * original + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """The same, under the name that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    # --- what they stand on ---------------------------------------------------------------

    @property
    def running(self) -> Interleaved:
        """The picture under way; ValueError before `set_timesteps`."""
        if self.interleaved is None:
            raise ValueError("call set_timesteps first")
        return self.interleaved

    def levels(self, mu: float | None) -> NoiseLevels:
        """The model's."""
        if not for_flow(self.learned.recipe):
            return vp.table_of(config_of(self)).levels
        levels = flow_levels(config_of(self), config_of(self)["base_image_seq_len"])
        return levels if mu is None or levels.mu is None else replace(levels, mu=mu)

    def clock(self, sigmas: Tensor) -> Tensor:
        """Levels as the network's timesteps."""
        if for_flow(self.learned.recipe):
            return sigmas * flow.CLOCK
        return vp.table_of(config_of(self)).sigma_inv(sigmas)

    def clean(self, x: Tensor, told: Tensor, output: Tensor) -> Tensor:
        """The network's output for x [B, *], told these levels [B], as x0."""
        if for_flow(self.learned.recipe):
            return flow.clean(x, told, output)
        return vp.clean(x, told, output, vp.prediction_of(config_of(self)))


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """A scheduler's config."""
    return scheduler.config


def opened(predictor: str | Predictor) -> Predictor:
    """A predictor as it is, or from its file or name."""
    if isinstance(predictor, Predictor):
        return predictor
    return load_predictor(find_predictor(predictor))


def as_plain(predictor: Predictor) -> dict[str, Any]:
    """What its JSON file would hold."""
    content = to_content(predictor)
    return content | {"table": {name: t.tolist() for name, t in content["table"].items()}}


@dataclass(frozen=True)
class ParallelPipeline:
    """An open pipeline that takes the K points of every step in one call."""

    backend: Backend
    method: Method

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], batch: int = 4
    ) -> list[Image.Image]:
        """A picture a seed, the i-th prompt for the i-th seed, again from the first.

        Raises ValueError for more prompts than seeds.
        """
        jobs = [Job(seed, prompt) for seed, prompt in meet(seeds, prompts)]
        made = generate(self.backend, self.method, jobs, batch=batch)
        return [picture(image) for part in made for image in part.images]


def picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as PIL has it."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).cpu().numpy())


def parallel_pipeline(
    pipe: Any,
    predictor: str | Predictor,
    *,
    size: tuple[int, int] | None = None,
    negative_prompt: str | None = None,
) -> ParallelPipeline:
    """A stock pipeline (SD 1.x, SD3, FLUX) with a predictor, its parts shared.

    Raises ValueError where the predictor was learned for another process or resolution than
    the model's at `size` (height, width).
    """
    options = ModelOptions(size=size, negative_prompt=negative_prompt)
    backend = wrap(pipe, torch.device(pipe._execution_device), options)
    learned = opened(predictor)
    check_fit(learned.recipe, backend)
    return ParallelPipeline(backend, predictor_method(learned, backend.levels))
