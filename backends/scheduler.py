"""Learned and hand-made solvers as a scheduler of stock diffusers pipelines.

    pipe.scheduler = EPDScheduler.from_predictor("sd3-512-best", like=pipe.scheduler)
    image = pipe("a red fox", height=512, width=512, guidance_scale=4.5).images[0]

takes the K points of a step one after another, as timesteps of their own; `parallel` takes them
in one call (`backends.parallel`). `EPDScheduler.from_solver("unipc-2", like=pipe.scheduler)` is
any solver of ours on the levels of the pipeline's own scheduler.
"""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import diffusers as library
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from backends.parametrization import (
    BETA_SCHEDULERS,
    FLOW_SCHEDULERS,
    Parametrization,
    course_of,
    heeded,
    levels_of,
    parametrization_of,
    plain_like,
    shifted_end,
    spread_of,
    without_signal,
)
from backends.trajectory import Trajectory
from solvers import vp
from solvers.predictor import Predictor, from_content, load_predictor, to_content, validate
from solvers.predictor import levels_of as own_levels
from solvers.process import FLOW
from solvers.recipe import FLOW_BACKENDS, Recipe, for_flow
from solvers.sampler import SOLVERS, Sampler, SolverOptions, make_solver, parse_name
from src.files import find_predictors

diffusers: Any = library  # its own annotations are not those of what it returns
PUBLISHED = {"sd3": {"shift": 3.0}, "flux": {"shift": 3.0, "use_dynamic_shifting": True}}
"""What the schedulers of the published flow-matching models say."""
LOG = logging.getLogger(__name__)
TIMES_APART = 0.01  # of 1000, by rounding
FEW = 15  # steps of DPM-Solver++ whose last ones diffusers lowers
MOST_HALF = 65504 / 6  # noise of six deviations stays in half precision
POINTS = ("sequence", "rows")
PredictorLike: TypeAlias = str | Path | Predictor


class EPDScheduler(SchedulerMixin, ConfigMixin):
    """A predictor, or a solver by name, as a scheduler.

    A predictor decides its timesteps: of a call's `num_inference_steps`, `sigmas` and `timesteps`
    only the number matters, and that only to choose among several predictors. A solver by name
    takes the levels that the pipeline's own scheduler makes of all of them.
    """

    _compatibles: ClassVar = [*FLOW_SCHEDULERS, *BETA_SCHEDULERS]

    @register_to_config
    def __init__(
        self,
        predictors: Sequence[Mapping[str, Any]] = (),
        solver: str | None = None,
        like_class: str = "FlowMatchEulerDiscreteScheduler",
        like_config: Mapping[str, Any] | None = None,
        points: str = "sequence",
        columns: int | None = None,
    ) -> None:
        """`predictors` are contents of their JSON files; `like_*` is the pipeline's scheduler.

        With points="rows" each timestep is a row of `columns` levels, one for every row of the
        network's batch, and the pipeline is called with K copies of each image side by side
        (num_images_per_prompt); `parallel` does both. Raises ValueError for what is not served.
        """
        if bool(predictors) == bool(solver):
            raise ValueError("give predictors or a solver: use from_predictor or from_solver")
        if points not in POINTS:
            raise ValueError(f"points is {points!r}: sequence or rows")
        if (made_by := getattr(diffusers, like_class, None)) is None:
            raise ValueError(f"diffusers has no scheduler {like_class!r}")
        self.like = made_by.from_config(dict(like_config or {}))
        self.model = parametrization_of(self.like)
        self.learned = [validate(from_content(dict(content))) for content in predictors]
        for predictor in self.learned:
            check_like(predictor.recipe, self.like, self.model)
        if solver:
            make_solver(solver, SolverOptions(process=self.model.process))
        self.timesteps, self.sigmas = torch.zeros(0), torch.zeros(0)
        self.num_inference_steps: int | None = None
        self.under_way: Trajectory | None = None
        self.located = False  # whether the pipeline has said where it starts
        self.noise_sigma: float | None = None
        self.asked_sigma: float | None = None  # the noise_sigma that the pipeline was told last
        self.last_scale = 1.0
        self.prepares = False  # whether `prepare` will be called
        self.preparing = False  # whether the pipeline is at that which it hands `prepare`
        self.noised = False  # whether x begins as an image with noise, by `add_noise`
        self.plain = False  # whether the pipeline hands its network x as it gets it
        self.scaled: Tensor | None = None  # what its network sees, once it has asked
        self.prepared: tuple[Tensor, Tensor] | None = None  # what `prepare` took and gave
        self.rate: float | None = None  # of guidance by rows
        self.embeds_rates = False  # whether the network is told the table's own guidance
        theirs = {k: v for k, v in self.like.config.items() if not k.startswith("_")}
        self.register_to_config(**theirs)  # pipelines read them

    @classmethod
    def from_predictor(
        cls,
        predictor: PredictorLike | Sequence[PredictorLike],
        like: Any = None,
        *,
        points: str = "sequence",
        columns: int | None = None,
    ) -> "EPDScheduler":
        """A scheduler of predictors: each a value, a file, a name within exps/, or a pattern.

        `like` is the pipeline's own scheduler, which knows the model's levels; without it they
        are those of the published SD 1.5, LSUN, SD3 or FLUX. Of several, `num_inference_steps`
        chooses by the number of sequential calls, the first of equal numbers. Raises ValueError
        for a predictor of another kind of model, or a scheduler that is not served; the pipeline's
        call does for a table with guidance rates of its own, which `parallel` takes.
        """
        learned = opened(predictor)
        name, config = config_of(learned[0].recipe if like is None else like)
        contents = [to_content(each) for each in learned]
        for content in contents:
            content["table"] = {name: t.tolist() for name, t in content["table"].items()}
        # by name: what is given by place, diffusers' configs take for a default
        return cls(
            predictors=contents,
            like_class=name,
            like_config=config,
            points=points,
            columns=columns,
        )

    @classmethod
    def from_solver(cls, solver: str, like: Any) -> "EPDScheduler":
        """A solver by name ("unipc-2") on the levels of `like`; ValueError for what is unknown."""
        name, config = config_of(like)
        return cls(solver=solver, like_class=name, like_config=config)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The scheduler of a config; of another's, with `solver` or `predictors`, one like it.

        More arguments change the config of the pipeline's own scheduler (shift=5.0). Raises
        ValueError for another's that does not say whose it is, and for what it does not know.
        """
        config = args[0] if args else kwargs.get("config")
        own = {*inspect.signature(cls.__init__).parameters, "config", "return_unused_kwargs"}
        changes = {n: kwargs.pop(n) for n in [*kwargs] if n not in own and n[:1] != "_"}
        if isinstance(config, dict) and not {"like_class", "solver"} & config.keys():
            if (name := config.get("_class_name")) is None:
                raise ValueError("this config has no _class_name: use from_solver or "
                                 "from_predictor with like=pipe.scheduler")  # fmt: skip
            # a loaded config names the keys that its file lacked, which would not count then
            plain = {key: value for key, value in config.items() if key[:1] != "_"}
            kwargs = {"like_class": name, "like_config": plain, **kwargs}
        if changes:
            of = {**(config if isinstance(config, dict) else {}), **kwargs}
            made_by = getattr(library, str(of.get("like_class")), cls)
            for unknown in changes.keys() - inspect.signature(made_by.__init__).parameters.keys():
                raise ValueError(f"{made_by.__name__} has no {unknown}: leave it out")
            kwargs["like_config"] = {**(of.get("like_config") or {}), **changes}
        if isinstance(config, dict):  # whose other keys are registered as pipelines read them
            args, kwargs["config"] = (), {**config, **changes}
        return super().from_config(*args, **kwargs)

    # --- what pipelines ask for -----------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Start images, at the resolution's `mu`; see the class for what else counts.

        Raises ValueError for a number of steps that no predictor has, or a table that guides.
        """
        both = sigmas is not None and timesteps is not None
        model = replace(self.model, spread=spread_of(self.like, mu)) if both else self.model
        asked = next((len(s) for s in (sigmas, timesteps) if s is not None), num_inference_steps)
        exact: dict[float, float] = {}
        if self.learned:
            recipe = (predictor := chosen(self.learned, asked)).recipe
            mu = mu if recipe.flowmatch_mu is None else recipe.flowmatch_mu
            sampler = predictor.sampler(levels_of(self.like, model, mu))
            self.noise_sigma = sampler.sigmas[0] if model.table else 1.0
            copies = recipe.num_points if self.by_rows else 1
        else:
            given: dict[str, Any] = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
            course = course_of(self.like, model, num_inference_steps, **given)
            twice = not model.table and heeded(self.like).get("final_sigmas_type") == "sigma_min"
            if twice and self.config["solver"].startswith("unipc"):
                raise ValueError(
                    "unipc needs final_sigmas_type='zero' for flow matching, not sigma_min: "
                    "it corrects at a last level that stands twice"
                )
            lowers = len(course.timesteps) < FEW or not self.config["solver"].startswith("dpmpp")
            options = SolverOptions(
                process=model.process, lower_order_final=lowers, count_zero=True
            )  # as theirs
            solver = make_solver(self.config["solver"], options)
            sampler, copies = Sampler(solver, course.sigmas, model.process), 1
            exact = dict(zip(course.sigmas, course.timesteps, strict=False))
            self.noise_sigma, self.last_scale = course.first, course.last
        if self.rate is None and not self.embeds_rates and sampler.own_rates:
            raise ValueError("this predictor guides by itself: use parallel(pipe, predictor)")
        still = self.plain or (model.table is None and not self.prepares)
        run = Trajectory(sampler, model, copies, still, self.rate)
        levels = run.network_sigma.flatten()
        pairs = zip(levels.tolist(), model.timesteps(levels).tolist(), strict=True)
        times = torch.tensor([exact.get(level, t) for level, t in pairs], device=device).float()
        rows = times.reshape(-1, copies)
        columns = self.config["columns"] or copies
        self.timesteps = times if copies == 1 else rows.repeat(1, columns // copies)
        shown = run.at if model.table else run.network_sigma  # Cosmos takes them for its times
        self.sigmas = torch.tensor([*shown[:, 0].tolist(), sampler.sigmas[-1]])
        # pipelines that hand over sigmas or timesteps count ours from then on
        self.num_inference_steps = asked if asked == num_inference_steps else len(rows)
        self.under_way, self.located, self.scaled, self.noised = run, False, None, False
        self.noise_sigma *= self.shown
        self.place()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this timestep; ValueError inside an interval, whose start is not there."""
        self.located = True
        calls, asked = len(self.timesteps), self.num_inference_steps or 0
        if not self.running.beginnings[1:]:
            self.running.begin(begin_index)
        begins = self.config["solver"] and begin_index in self.running.beginnings
        if begin_index and not begins and calls != self.order * asked - (self.order - 1):
            raise ValueError(
                f"num_inference_steps {asked} and a strength below 1, but this solver takes "
                f"{calls} timesteps: give num_inference_steps={calls}"
            )
        self.running.begin(begin_index)
        self.place()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network sees of a pipeline's rows; ValueError for noise beyond float16."""
        if self.plain:
            return sample
        if sample.dtype == torch.float16 and self.overflows:
            raise ValueError("float16 has no room for this model's noise: use parallel(pipe, "
                             "predictor), or bfloat16")  # fmt: skip
        self.locate(timestep)
        self.scaled = self.running.seen(sample)
        return self.scaled

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next place that the network is asked at, or, after the last call, the image.

        Raises ValueError for tokens at times of their own, but for those that stay, at 0, for an
        eta above 0, as no step draws noise, and for x with the noise of another number of steps.
        What is clipped is clipped by the model's config.
        """
        if eta:
            raise ValueError(f"eta {eta}: the steps draw no noise, leave it out")
        if per_token_timesteps is not None:
            times = torch.as_tensor(timestep).to(per_token_timesteps)
            moving = (per_token_timesteps - times).abs() <= TIMES_APART
            if not bool((moving | (per_token_timesteps == 0)).all()):
                raise ValueError("tokens with times of their own are not served: give strength=1")
            model_output = -model_output  # such steps go by the level now less the next
        self.locate(timestep)
        run, asked, self.asked_sigma = self.running, self.asked_sigma, None
        if asked not in (None, self.noise_sigma) and not self.noised:
            raise ValueError("x has the noise of another number of steps: call "
                             "scheduler.set_timesteps(num_inference_steps) first")  # fmt: skip
        if self.model.table and not self.plain and (self.scaled is None or sample is self.scaled):
            raise ValueError(
                "this pipeline steps x as its network sees it: use parallel(pipe, predictor)"
            )
        following = run.answer(sample, model_output, self.shown)
        following = following * (self.shown if run.index < len(run.calls) else self.last_scale)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)  # as some pipelines expect
        following = following.to(dtype, copy=True)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    @property
    def order(self) -> int:
        """The timesteps of a step that was asked for: pipelines cut a strength by it."""
        solver = self.config["solver"]
        return SOLVERS[parse_name(solver)[0]].calls if solver else 1

    @property
    def shown(self) -> float:
        """What x is multiplied by for a pipeline that hands it to its network as it is."""
        sigma = float(self.running.network_sigma[self.running.index, 0]) if self.plain else 0.0
        return (1 + sigma**2) ** -0.5

    @property
    def overflows(self) -> bool:
        """Whether the model's noise is beyond half precision, as DeepFloyd IF's is."""
        return self.model.table is not None and self.model.table.levels.sigma_max > MOST_HALF

    @property
    def init_noise_sigma(self) -> float:
        """The strength of the noise that x starts as; some pipelines ask before all else.

        Raises ValueError before `set_timesteps` where it hangs on the number of steps.
        """
        if self.noised or (self.noise_sigma is None and self.model.table is None):
            return 1.0
        if self.noise_sigma is None:
            if len(self.learned) != 1:
                raise ValueError("the strength of the noise hangs on num_inference_steps: call "
                                 "scheduler.set_timesteps(num_inference_steps) first")  # fmt: skip
            self.set_timesteps()
        assert self.noise_sigma is not None
        self.asked_sigma = self.noise_sigma
        return self.noise_sigma

    def __len__(self) -> int:
        """The timesteps that the model was trained at."""
        return self.model.steps if self.model.table is None else len(self.model.table.log_sigmas)

    @property
    def branches(self) -> int:
        """Rows of a point: with its negative one where guidance is rows."""
        return 1 if self.rate is None else 2

    @property
    def begin_index(self) -> int:
        """The timestep of the first call."""
        return self.running.first

    @property
    def step_index(self) -> int:
        """The timestep of the next call."""
        return self.running.index

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """x at the level of the next call, whatever `timesteps`, from an image to keep."""
        self.locate(timesteps)
        self.noised = True
        levels = self.running.level()
        rows = noise.new_tensor(levels if len(noise) % len(levels) == 0 else levels[:1])
        x = self.running.model.noised(original, noise, rows.repeat(len(noise) // len(rows)))
        return x * self.shown

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """The same, under the name that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def locate(self, timestep: Any) -> None:
        """Start where a pipeline does that cuts the timesteps and says nothing of it."""
        if self.located or self.running.loop is not None:
            return
        first = self.timesteps.reshape(len(self.timesteps), -1)[:, 0]
        same = first == torch.as_tensor(timestep, device=first.device).flatten()[:1]
        places = same.nonzero()[:, 0].tolist()
        starts = [i for i in places if i in self.running.beginnings]
        self.set_begin_index((starts or places or [0])[0])

    # --- what `parallel` asks for ---------------------------------------------------------

    def prepare(self, latents: Tensor) -> Tensor:
        """Latents [B, *] that a pipeline starts from -> its rows, at the places first asked."""
        rows = torch.cat([latents.repeat_interleave(self.copies, 0)] * self.branches)
        self.prepared = latents, rows
        self.place()
        return rows

    def place(self) -> None:
        """Move the prepared rows to where the first call is, if both are there."""
        if self.prepared and self.under_way and self.under_way.loop is None:
            latents, rows = self.prepared
            rows.copy_(self.under_way.start(latents))

    @property
    def by_rows(self) -> bool:
        """Whether points are rows."""
        return self.config["points"] == "rows"

    @property
    def copies(self) -> int:
        """How many rows an image has, where there is one predictor."""
        return self.learned[0].recipe.num_points if self.by_rows else 1

    @property
    def running(self) -> Trajectory:
        """The images under way; ValueError before `set_timesteps`."""
        if self.under_way is None:
            raise ValueError("call set_timesteps first")
        return self.under_way


def chosen(learned: Sequence[Predictor], calls: int | None, *, strict: bool = False) -> Predictor:
    """The predictor with so many sequential calls, or the only one; ValueError without it."""
    only = learned[0]
    any_number = calls is None or not strict
    if len(learned) == 1 and (any_number or calls in (only.nfe, only.evaluations)):
        return only
    asked = [predictor for predictor in learned if predictor.nfe == calls]
    if not asked:
        there = ", ".join(map(str, sorted({predictor.nfe for predictor in learned})))
        what = "several predictors" if calls is None else f"no predictor of {calls} calls"
        raise ValueError(f"{what}: num_inference_steps may be {there}")
    if len(asked) > 1:
        LOG.warning("%d predictors of %d calls: the first of them is taken", len(asked), calls)
    return asked[0]


def check_like(recipe: Recipe, like: Any, model: Parametrization) -> None:
    """ValueError where a scheduler is not of the kind that a predictor was learned for."""
    name, is_flow = type(like).__name__, model.process == FLOW
    levels, end = levels_of(like, model), shifted_end(like)
    config = heeded(like)
    reason = without_signal(recipe, config)
    if for_flow(recipe) != is_flow:
        reason = (
            f"is not for {name}, which is for {'flow matching' if is_flow else 'a VP process'}"
        )
    elif not is_flow:
        known = own_levels(recipe) if recipe.sigma_max is None else None
        start = known.sigma_max if known else recipe.sigma_max
        if start is not None and start > 1.01 * levels.sigma_max:
            ends = f"{start:.4g}, those of {name} at {levels.sigma_max:.4g}"
            reason = f"has levels that start at {ends}"
    elif recipe.sigmas is None:
        kinds, dynamic = ("one shift", "a dynamic shift"), recipe.flowmatch_mu is not None
        theirs = bool(config.get("use_dynamic_shifting"))
        published = recipe.backend in FLOW_BACKENDS
        if published and theirs != dynamic:
            reason = f"was learned with {kinds[dynamic]}, and {name} has {kinds[theirs]}"
        elif published and dynamic and config.get("time_shift_type") == "linear":
            reason = f"was learned with an exponential shift, and {name} has a linear one"
        elif published and dynamic and config.get("shift_terminal"):
            reason = f"was learned without shift_terminal, and {name} has one"
        elif recipe.sigma_min is not None and not math.isclose(
            recipe.sigma_min, end, rel_tol=0.01
        ):
            ends = f"{recipe.sigma_min:.4g}, those of {name} at {end:.4g}"
            reason = f"has levels that end at {ends}: its shift is another"
    if reason:
        raise ValueError(f"a predictor for {recipe.backend} ({recipe.schedule_type}) {reason}")


def config_of(like: Any) -> tuple[str, dict[str, Any]]:
    """Class and config of a scheduler, or of a recipe's model; ValueError where it tells none."""
    if not isinstance(like, Recipe):
        if not isinstance(like, SchedulerMixin):
            raise ValueError(f"like is a {type(like).__name__}: give pipe.scheduler")
        config = plain_like(like)
        return config.pop("_class_name"), config
    if "scheduler" in like.backend_config:
        config = dict(like.backend_config["scheduler"])
        return config.pop("_class_name"), config
    if like.backend == "ldm" and like.dataset_name in vp.PUBLISHED:
        ends = {"clip_sample": False, "set_alpha_to_one": False}
        return "DDIMScheduler", vp.PUBLISHED[like.dataset_name] | ends
    shift = {} if like.flowmatch_shift is None else {"shift": like.flowmatch_shift}
    if like.backend in PUBLISHED and (shift or like.dataset_name == "ms_coco"):
        return "FlowMatchEulerDiscreteScheduler", PUBLISHED[like.backend] | shift
    raise ValueError(
        f"a predictor for {like.dataset_name} ({like.backend}) needs the scheduler of its "
        "model: like=pipe.scheduler"
    )


def opened(predictor: PredictorLike | Sequence[PredictorLike]) -> list[Predictor]:
    """Predictors as they are, or from their files, names or patterns; ValueError for none."""
    if isinstance(predictor, Predictor):
        return [predictor]
    if isinstance(predictor, list | tuple) and predictor:
        return [p for each in predictor for p in opened(each)]
    if not isinstance(predictor, str | Path):
        raise ValueError(f"a predictor is a file, a name or a Predictor, not {predictor!r}")
    return [load_predictor(file) for file in find_predictors(str(predictor))]
