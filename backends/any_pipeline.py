"""A backend of any diffusers pipeline, by its own code: no family has an adapter here.

A call of the pipeline with a scheduler of one timestep is a call of the network at any levels,
one a row; with a scheduler of none it is the way from latents to images. Prompts, guidance,
rounding and the layout of latents stay the pipeline's. A latent is what its loop steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from backends import families
from backends.base import Backend, ModelOptions, Prompt
from backends.latents import prepare_vae, texts_of, usual_text
from backends.lending import CachedPrompts, LengthsDiffer, lent, lock_of, with_latents
from backends.parametrization import (
    Parametrization,
    levels_of,
    parametrization_of,
    plain_like,
    spread_of,
)
from solvers.field import Condition, Denoiser

PLAIN = {
    "use_resolution_binning": False,
    "cfg_truncation": 2.0,  # none
    "enable_prompt_rewrite": False,
    "use_pe": False,
}
"""Arguments by which pipelines change neither sizes nor prompts by themselves."""
GUIDERS = ("guider", "ocr_guider")
LEAST_RATE = 1.0
"""Of guidance: pipelines take what is below it for none."""
IN_ITS_OWN_CALL = {
    "prepare_audio_latents": "it steps sound together with its pictures",
    "generate_prior_tokens": "a language model draws tokens in every call of it",
}
"""What keeps a pipeline from being asked call by call, by the method that shows it."""
NO_BACKEND = {
    "StableUnCLIP": "a prior of its own makes latents too",
    "StableDiffusionLDM3D": "its pictures have a depth beside them",
}
"""What keeps other pipelines from it, by their names."""


@dataclass
class OneCall:
    """A scheduler whose timesteps are those of one call, or of none, and what it was handed."""

    like: Any
    model: Parametrization
    sigma: Tensor | None = None  # [R]
    columns: int = 1  # how often the rows stand in the network's batch
    rows: bool = True  # whether each row has a time of its own
    sample: Tensor | None = None
    output: Tensor | None = None
    mu: float | None = None
    order: int = 1
    init_noise_sigma: float = 1.0
    timesteps: Tensor = field(default_factory=lambda: torch.zeros(0))
    sigmas: Tensor = field(default_factory=lambda: torch.zeros(2))

    @property
    def config(self) -> Any:
        """The config of the pipeline's own scheduler."""
        return self.like.config

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Take note of how levels are given."""
        self.mu = mu
        if sigmas is not None and timesteps is not None:
            self.model = replace(self.model, spread=spread_of(self.like, mu))
        if self.sigma is not None:
            t = self.model.timesteps(self.sigma.double()).float()
            t = t.repeat(self.columns)[None] if self.rows else t[:1]
            self.timesteps = t.to(device)
            self.sigmas = torch.tensor([float(self.sigma[0]), 0.0])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one call."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network sees, reckoned in float32: sigma^2 has no place in half precision."""
        assert self.sigma is not None
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        sigma = self.sigma.to(x).repeat(len(x) // len(self.sigma))
        return self.model.seen(x, sigma).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Keep the network's output; with times by token it comes with the other sign."""
        self.sample = sample
        self.output = model_output if per_token_timesteps is None else -model_output
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


@dataclass
class Opened:
    """A pipeline, its own scheduler, and the texts met so far."""

    pipe: Any
    options: ModelOptions
    like: Any
    model: Parametrization
    prompts: CachedPrompts
    texts: list[str] = field(default_factory=lambda: [""])  # by the number that stands for each
    first: dict[str, Any] = field(default_factory=dict)  # what prepare_latents took and gave
    by_text: bool = False  # whether a call has one text, as lengths of embeddings differ

    def call(
        self, scheduler: OneCall, texts: Sequence[str], x: Tensor | None, given: dict[str, Any]
    ) -> Any:
        """What the pipeline returns with this scheduler, from latents x if they are given."""
        names = families.parameters_of(self.pipe)
        given = given | {name: value for name, value in PLAIN.items() if name in names}
        given |= dict(zip(("height", "width"), self.options.size or (), strict=False))
        alone = families.family_of(self.pipe) in families.ALONE and len(texts) == 1
        given |= {"prompt": texts[0] if alone else list(texts)}
        given |= {"generator": torch.Generator(self.pipe.device)}

        scaled = families.scales(self.pipe) or scheduler.sigma is None

        def before(arguments: dict[str, Any]) -> None:
            self.first |= {n: arguments[n] for n in ("height", "width") if n in arguments}

        def after(latents: Tensor, others: list[Any]) -> list[Any]:
            self.first["latents"] = latents
            if x is None:
                return [latents, *others]
            shown = x if scaled else scheduler.scale_model_input(x)
            return [shown.to(latents.dtype, copy=True), *others]

        parts: dict[str, Any] = {"scheduler": scheduler}
        with lock_of(self.pipe), torch.no_grad():
            if name := families.preparer(self.pipe):
                parts[name] = with_latents(getattr(self.pipe, name), before, after)
            elif x is not None:
                (given["latents"],) = after(x, [])
            if callable(getattr(self.pipe, "encode_prompt", None)):
                parts["encode_prompt"] = self.prompts.installed()
            parts |= {name: given.pop(name) for name in GUIDERS if name in given}
            with lent(self.pipe, parts):
                return self.pipe(**given, return_dict=False)[0]

    def look(self, steps: int) -> OneCall:
        """What the pipeline hands its scheduler for so many steps.

        Without a network call where its latents are seen before any.
        """
        hidden = families.preparer(self.pipe) is None
        sigma = torch.ones(1) if hidden else None
        scheduler = OneCall(self.like, self.model, sigma, rows=False)
        given = {"num_inference_steps": steps, "output_type": "latent"}
        self.call(scheduler, [""], None, given | self.guidance(1.0, 1))
        if hidden:
            self.first["latents"] = scheduler.sample
        return scheduler

    def denoise(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> E[x0 | x, sigma] [B, *]; ValueError where x needs gradients."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("a pipeline gives no gradients: learn by --method fit")
        given = cond.given if cond else {}
        texts = [self.texts[i] for i in given.get("prompt", torch.zeros(len(x))).int().tolist()]
        rates = given.get("rate", torch.ones(len(x))).tolist()
        rows = families.one_time(self.pipe) is None
        times = [None if rows else level for level in sigma.tolist()]
        kinds = list(zip(rates, times, texts if self.by_text else [""] * len(x), strict=True))
        if families.family_of(self.pipe) in families.ALONE:
            kinds = list(range(len(x)))
        x0 = torch.empty_like(x)
        for kind in dict.fromkeys(kinds):  # what one call can have one of
            at = [i for i, other in enumerate(kinds) if other == kind]
            where = slice(None) if len(at) == len(x) else at
            own = [texts[i] for i in at]
            try:
                with lock_of(self.pipe):
                    x0[where] = self.ask(x[where], sigma[where], own, rates[at[0]], rows)
            except LengthsDiffer:
                self.by_text = True
                return self.denoise(x, sigma, cond)
        return x0

    def ask(self, x: Tensor, sigma: Tensor, texts: list[str], rate: float, rows: bool) -> Tensor:
        """x0 by one call of the pipeline; ValueError for a rate that it takes for no guidance."""
        columns = 2 if rate > 1 and families.family_of(self.pipe) in families.STACKED else 1
        scheduler = OneCall(self.like, self.model, sigma, columns, rows)
        arguments = self.guidance(rate, len(x)) | {"output_type": "latent"}
        self.call(scheduler, texts, x, arguments)
        embedded = families.family_of(self.pipe) in families.EMBEDDED
        if rate > 1 and not embedded and not getattr(self.pipe, "do_classifier_free_guidance", 1):
            raise ValueError(
                f"guidance_rate {rate}: {type(self.pipe).__name__} begins to guide above it: "
                "take 1 (none), or more"
            )
        assert scheduler.output is not None
        return scheduler.model.clean(x, sigma, scheduler.output)

    def guidance(self, rate: float, rows: int) -> dict[str, Any]:
        """The pipeline's arguments for a guidance rate, 1 being none."""
        name, family = families.guidance_name(self.pipe), families.family_of(self.pipe)
        guiders = {n: self.pipe.components.get(n) for n in GUIDERS}
        given: dict[str, Any] = {
            n: guider.new(guidance_scale=rate) for n, guider in guiders.items() if guider
        }
        if name is not None:
            given[name] = rate - 1 if family in families.FROM_ZERO else rate
        if not given:
            return {}
        negative = self.options.negative_prompt
        if negative is None and name == "true_cfg_scale":
            negative = ""  # such pipelines guide where there is one
        if rate > 1 and negative is not None:
            given["negative_prompt"] = [negative] * rows
        return given

    def guide(self, network: Denoiser, rate: float, _cond: Condition | None) -> Denoiser:
        """The denoiser under the pipeline's own guidance; ValueError for a rate that it lacks."""
        if rate != 1 and (rate < LEAST_RATE or not self.guidance(rate, 1)):
            raise ValueError(f"guidance_rate {rate}: this pipeline has 1 (none), or more")

        def guided(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            rates = (rate,) if cond is None or cond.rates is None else cond.rates
            if not isinstance(rates, Tensor):
                rates = torch.tensor(rates).repeat_interleave(len(x) // len(rates))
            given = cond.given if cond else {}
            return network(x, sigma, Condition({**given, "rate": rates.cpu()}))

        return guided

    def encode(self, prompts: Sequence[Prompt]) -> Condition | None:
        """The texts' numbers, encoded later, once each; ValueError for prompts that are none."""
        texts = texts_of(prompts)
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return Condition({"prompt": torch.tensor([self.texts.index(text) for text in texts])})

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *] -> images [B, 3, H, W] in [0, 1]; a video's frames side by side."""
        scheduler = OneCall(self.like, self.model)
        images = self.call(scheduler, [""] * len(latents), latents, {"output_type": "pt"})
        images = images if isinstance(images, Tensor) else torch.stack(list(images))
        if images.ndim == 5:
            images = torch.cat(images.unbind(1), -1)
        if families.family_of(self.pipe) in families.SIGNED:
            images = images / 2 + 0.5
        return images.float().clamp(0, 1)


def any_backend(pipe: Any, device: torch.device, options: ModelOptions) -> Backend:
    """The backend of a text-to-image or text-to-video pipeline, whose parts it shares.

    Raises ValueError, with the reason, for one that cannot be asked at levels of our choice.
    """
    name, names = type(pipe).__name__, families.parameters_of(pipe)
    families.check_served(pipe)
    like = getattr(pipe.scheduler, "like", pipe.scheduler)  # that which ours was made like
    model = parametrization_of(like)
    if min(options.size or (1,)) < 1:
        raise ValueError(f"resolution {options.size} is no size of a picture")
    hidden = families.preparer(pipe) is None and "latents" not in names
    if "prompt" not in names or hidden:
        raise ValueError(f"{name} is not served: it takes no prompt, or hides its latents")
    shown = {n: why for n, why in IN_ITS_OWN_CALL.items() if callable(getattr(pipe, n, None))}
    for reason in (*shown.values(), NO_BACKEND.get(name.removesuffix("Pipeline"))):
        if reason:
            raise ValueError(f"{name} is not served here, {reason}: use parallel(pipe, predictor)")
    if options.encode_first:
        raise ValueError(f"{name} keeps its text encoders: take --cpu_offload for memory")
    if options.negative_prompt and (
        "negative_prompt" not in names or families.family_of(pipe) in families.EMBEDDED
    ):
        raise ValueError(f"{name} takes no negative prompt: its guidance is part of the network")
    if options.vae_tiling or options.vae_slicing:
        prepare_vae(pipe.vae, options)
    opened = Opened(pipe, options, like, model, CachedPrompts(pipe, apart=True))
    try:
        steps = names["num_inference_steps"]
        levels = levels_of(like, model, opened.look(steps).mu)
        first, asked = opened.first, options.size or (names.get("height"), names.get("width"))
        size = tuple(
            int(first.get(n, s) or 0) for n, s in zip(("height", "width"), asked, strict=True)
        )
        if options.size and size != options.size:
            said = "x".join(map(str, size))
            raise ValueError(
                f"it makes pictures of {said}: leave the resolution out, or give that"
            )
        return Backend(
            family=name,
            denoise=opened.denoise,
            encode=opened.encode,
            decode=opened.decode,
            guide=opened.guide,
            levels=levels,
            shape=tuple(first["latents"].shape[1:]),
            size=(size[0], size[1]),
            device=device,
            dtype=families.network_of(pipe).dtype,
            usual_prompt=usual_text,
            least_rate=LEAST_RATE,
            config={"scheduler": plain_like(like)},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        kinds = ("image", "video", "control_image")
        pictures = [n for n in kinds if n in names] or [n for n in ("image_embeds",) if n in names]
        reason = (
            f"it needs {' or '.join(pictures)} besides the prompt: use parallel(pipe, predictor) "
            f"({first_line(error)})"
            if pictures
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise ValueError(f"{name} is not served here: {reason}") from error


def first_line(error: BaseException) -> str:
    """The start of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
