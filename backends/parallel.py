"""Stock diffusers pipelines that take the K points of a step in one call of their network.

    fast = parallel(pipe, "sd3-512-best")
    image = fast("a red fox", height=512, width=512, guidance_scale=4.5).images[0]

Points are rows of the batch: the pipeline is asked for K images instead of each, its scheduler
tells every row a level of its own. Where the K rows are the same the network is run on one.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from backends import families
from backends.base import Backend, ModelOptions
from backends.generate import Job, generate
from backends.hooks import given_alone, run_once, share, tell_guidance
from backends.lending import COUNTS, CachedPrompts, bound, lent, lock_of, with_latents
from backends.load import check_fit
from backends.parametrization import parametrization_of
from backends.pipelines import wrap
from backends.scheduler import EPDScheduler, PredictorLike, chosen, opened
from backends.sd3 import folding
from solvers.predictor import Predictor
from src.images import to_bytes
from src.text import meet


def parallel(
    pipe: Any,
    predictor: PredictorLike | Sequence[PredictorLike],
    *,
    points: str | None = None,
    guidance: str | None = None,
    mesh: DeviceMesh | None = None,
    any_family: bool = False,
) -> "Parallel":
    """A stock pipeline with a predictor, called like the pipeline with the pipeline's arguments.

    `points` is "rows" or "sequence" (one after another); None is rows where the pipeline takes
    them. guidance="rows" makes the negative prompt rows of the batch as well, mixed by the
    predictor's solver; "pipeline" leaves it to the pipeline. None is rows where the table guides
    by itself; a network that is told its guidance (FLUX.1) is told the table's. With a `mesh`
    the ranks of its dimension `points` share the rows of each call: each calls this, and what it
    gives, with the same arguments. Raises ValueError, with the reason, for what the pipeline
    cannot do, and for a predictor of another family without `any_family`.
    """
    families.check_served(pipe)
    learned = opened(predictor)
    guides = any(p.table.guidance is not None for p in learned)
    family = families.family_of(pipe)
    embedded = guides and family in families.EMBEDDED
    guidance = guidance or ("rows" if guides and not embedded else "pipeline")
    if (reason := families.one_time(pipe)) and points == "rows":
        raise ValueError(f"{type(pipe).__name__} cannot take points as rows ({reason}): "
                         'use points="sequence"')  # fmt: skip
    points = points or ("sequence" if reason else "rows")
    if points not in ("rows", "sequence"):
        raise ValueError(f"points is {points!r}: rows or sequence")
    if guidance not in ("pipeline", "rows"):
        raise ValueError(f"guidance is {guidance!r}: pipeline or rows")
    embeds = embedded and families.network_of(pipe).config.get("guidance_embeds")
    if embedded and (getattr(pipe, "controlnet", None) or not embeds):
        raise ValueError("the predictor guides by itself: this pipeline's networks cannot be told")
    if guides and not embedded and guidance == "pipeline":
        raise ValueError('the predictor guides by itself, not the pipeline: guidance="rows"')
    model = parametrization_of(pipe.scheduler)
    if guidance == "rows":
        refused = {
            "its guidance is part of the network": family in families.EMBEDDED,
            "it rescales what guidance gives": family in families.RESCALING,
            "it is distilled, and takes none": (
                family == "Flux2Klein" and pipe.config.get("is_distilled")
            ),
            "its scheduler limits what guidance gives": model.clip or model.threshold,
            "its guider guides": pipe.components.get("guider") is not None,
            "its negative prompts have an aesthetic score of their own": (
                pipe.config.get("requires_aesthetics_score")
            ),
            families.NO_NEGATIVES.get(family, ""): family in families.NO_NEGATIVES,
            reason or "": points != "rows",
        }
        for why in (why for why, holds in refused.items() if holds):
            raise ValueError(f"{type(pipe).__name__} cannot take guidance as rows: {why}")
    EPDScheduler.from_predictor(learned, like=pipe.scheduler)
    for one in learned if not any_family else ():
        families.check_family(pipe, one.recipe)
    return Parallel(pipe, tuple(learned), CachedPrompts(pipe), points, guidance == "rows", mesh)


@dataclass(frozen=True)
class Parallel:
    """A pipeline and predictors for it; see `parallel`."""

    pipe: Any
    learned: tuple[Predictor, ...]
    prompts: CachedPrompts
    points: str = "rows"
    rows_of_guidance: bool = False
    mesh: DeviceMesh | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline returns; ValueError, with the reason, for arguments not served.

        Calls from several threads wait for each other, as a pipeline holds one scheduler.
        """
        with lock_of(self.pipe):
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The call itself."""
        kind, family = type(self.pipe).__name__, families.family_of(self.pipe)
        defaults = families.parameters_of(self.pipe)
        given = bound(inspect.signature(self.pipe.__call__), args, kwargs)
        predictor = chosen(self.learned, given.get("num_inference_steps"), strict=True)
        rows = self.points == "rows"
        tables = (families.REFUSED, families.REFUSED_BY_ROWS, families.REFUSED_BY_GUIDANCE)
        families.check_given(given, *tables[: 1 + rows + self.rows_of_guidance])
        if (texts := prompts_of(given)) > 1 and family in families.ALONE:
            raise ValueError(f"{kind} mixes {texts} prompts of a call up: give one a call")
        check_pictures(self.pipe, given, rows=rows)
        if rows and given.get("latents") is not None and kind in families.STARTED:
            raise ValueError('latents of a pipeline from an image take points="sequence"')
        copies = predictor.recipe.num_points if rows else 1
        self.prompts.negatives = texts if self.rows_of_guidance else 0
        name, rate = families.guidance_name(self.pipe), None
        scale = 1.0 if name is None else given.get(name, defaults[name])
        if self.rows_of_guidance:
            from_zero = family in families.FROM_ZERO
            rate = max(1.0, scale + from_zero)  # pipelines take what is below for none
            given |= decoding(self.pipe, given, images_of(given, defaults))
            given |= with_negatives(self.pipe, given)
            scale = 0.0
        elif rows and isinstance(given.get("prompt"), list | tuple):
            # one for all has as many rows as one prompt in some pipelines (FLUX.1)
            for key, text in given.items():
                if key.startswith("negative_prompt") and isinstance(text, str):
                    given[key] = [text] * len(given["prompt"])
        columns = images_of(given, defaults) * copies
        for name in (name for name in COUNTS if name in defaults):
            given[name] = copies * given.get(name, 1)
        if "cfg_truncation" in defaults and rows:
            given.setdefault("cfg_truncation", 2.0)  # 1, its default, truncates nothing either
            if given["cfg_truncation"] <= 1:
                raise ValueError('cfg_truncation compares one time: use points="sequence"')
        stacks = family in families.STACKED and scale > 1
        columns *= 2 if stacks else 1
        scheduler = EPDScheduler.from_predictor(
            predictor, self.pipe.scheduler, points=self.points, columns=columns
        )
        given |= folding(self.pipe, given, columns)
        scheduler.rate = rate
        scheduler.embeds_rates = rate is None and predictor.table.guidance is not None
        given |= {"guidance_scale": 1.0} if scheduler.embeds_rates else {}  # times the rates
        half = families.network_of(self.pipe).dtype == torch.float16
        unscaled = (half and scheduler.overflows) or not families.scales(self.pipe)
        scheduler.plain = scheduler.model.table is not None and unscaled
        given["num_inference_steps"] = predictor.nfe if rows else predictor.evaluations
        callback = given.get("callback_on_step_end")
        if callback is not None and rows:
            name = "callback_on_step_end_tensor_inputs"
            asked = getattr(callback, "tensor_inputs", None) or given.get(name, ["latents"])
            guides = stacks or self.rows_of_guidance
            given["callback_on_step_end"] = per_image(callback, scheduler, asked, guides=guides)
            given[name] = list(dict.fromkeys([*asked, "latents"]))
        if self.mesh and given.get("generator") is None and given.get("latents") is None:
            raise ValueError("ranks need the same noise: give generator=torch.Generator()")
        with installed(self.pipe, scheduler, self.prompts, self.mesh):
            return self.pipe(**given)


def with_negatives(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that ask for negative prompts too, guidance off; ValueError without texts."""
    texts, names = given.get("prompt"), families.parameters_of(pipe)
    if texts is None:
        raise ValueError("guidance as rows takes texts: give prompt, not its embeddings")
    negative, bria = given.get("negative_prompt"), families.family_of(pipe) in ("Bria", "BriaFibo")
    zeros = negative is None and pipe.config.get("force_zeros_for_empty_prompt")
    if zeros or (bria and not negative):
        raise ValueError("this pipeline has no text for nothing: give negative_prompt for rows")
    count = prompts_of(given)

    def of_each(name: str, texts: str | Sequence[str]) -> list[str]:
        texts = [texts] * count if isinstance(texts, str) else list(texts)
        if len(texts) != count:
            raise ValueError(f"{name} has {len(texts)} texts for {count} prompts")
        return texts

    off = 0.0 if families.family_of(pipe) in families.FROM_ZERO else 1.0
    result: dict[str, Any] = {families.guidance_name(pipe) or "guidance_scale": off}
    for nth in ("", "_2", "_3"):  # of pipelines with several text encoders
        pair = f"prompt{nth}", f"negative_prompt{nth}"
        if any(given.get(name) for name in pair) or not nth:
            usual = [given.get(name) or given.get(name.removesuffix(nth)) or "" for name in pair]
            result[pair[0]] = [*of_each(pair[0], usual[0]), *of_each(pair[1], usual[1])]
            result |= {pair[1]: None} if pair[1] in names else {}
    return result


def check_pictures(pipe: Any, given: Mapping[str, Any], *, rows: bool) -> None:
    """ValueError for a way with pictures, or with noise, that goes beyond a scheduler."""
    nets = getattr(pipe, "controlnet", None)
    nets = getattr(nets, "nets", [nets] if nets is not None else [])
    pictures = [given.get(name) for name in ("image", "mask_image", "masked_image_latents")]
    several = any(isinstance(p, Tensor | list) and len(p) > 1 for p in pictures)
    by_rows = {
        "it lays several pictures out in another order": several
        and type(pipe).__name__ == "FluxFillPipeline",
        "its cache asks for one time": getattr(
            getattr(families.network_of(pipe), "_cache_config", None),
            "current_timestep_callback",
            None,
        )
        is not None,
        "its ControlNet asks half of the rows alone": any(
            net.config.get("global_pool_conditions") for net in nets
        ),
    }
    for why in (why for why, holds in by_rows.items() if rows and holds):
        raise ValueError(f'points as rows do not go with this: {why}: use points="sequence"')
    if getattr(pipe, "free_init_enabled", False):
        raise ValueError(
            "FreeInit is not served, as it noises anew: call pipe.disable_free_init()"
        )


def decoding(pipe: Any, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Arguments of a decoder that takes a time, which LTX counts by prompts, negatives too."""
    vae, names = getattr(pipe, "vae", None), ("decode_timestep", "decode_noise_scale")
    if vae is None or not vae.config.get("timestep_conditioning"):
        return {}
    values = {name: given.get(name, families.parameters_of(pipe).get(name)) for name in names}
    return {n: [v] * count for n, v in values.items() if isinstance(v, int | float)}


def prompts_of(given: dict[str, Any]) -> int:
    """How many prompts a call has, or embeddings in their place."""
    prompt = given.get("prompt")
    if prompt is not None:
        return len(prompt) if isinstance(prompt, list | tuple) else 1
    of = ("prompt_embeds", "image_embeds")
    embeds = [v for n, v in given.items() if n.startswith(of) and v is not None]
    return len(embeds[0]) if embeds else 1


def images_of(given: dict[str, Any], names: Any) -> int:
    """For how many rows a call asks."""
    return prompts_of(given) * next((given.get(name, 1) for name in COUNTS if name in names), 1)


def per_image(
    callback: Any, scheduler: EPDScheduler, asked: Sequence[str], *, guides: bool
) -> Callable[..., dict[str, Any]]:
    """A callback that sees a row of each image, whose edits reach all its rows.

    It gets the tensors it `asked` for. Where it interrupts the pipeline, a row an image is left;
    ValueError where it switches guidance that has rows (`guides`).
    """

    def called(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        rows, run = tensors["latents"], scheduler.running
        done = run.index == len(run.calls)
        before = rows if done else run.images(rows)
        shown = {**tensors, "latents": before.clone()}
        shown = {name: value for name, value in shown.items() if name in asked}
        names = ("do_classifier_free_guidance", "_guidance_scale")
        guided = [getattr(pipe, name, None) for name in names]
        changed = {**shown, **callback(pipe, step, time.reshape(-1)[0], shown)}
        if guides and guided != [getattr(pipe, name, None) for name in names]:
            raise ValueError('a callback switches guidance: use points="sequence"')
        after = changed.get("latents", before)
        if not done and not getattr(pipe, "interrupt", False):
            edit = (after - before).repeat_interleave(scheduler.copies, 0)
            after = rows + torch.cat([edit] * run.branches)
        return {**changed, "latents": after}

    return called


@contextmanager
def installed(
    pipe: Any, scheduler: EPDScheduler, prompts: CachedPrompts, mesh: DeviceMesh | None
) -> Iterator[None]:
    """A pipeline with this scheduler, its latents laid out as rows; as it was afterwards.

    With a mesh, its ranks share the network's rows. Raises ValueError where the pipeline ended
    before the predictor did.
    """
    parts: dict[str, Any] = {"scheduler": scheduler}
    if callable(getattr(pipe, "encode_prompt", None)):
        parts["encode_prompt"] = prompts.installed()
    vae, encode = getattr(pipe, "vae", None), {}
    if scheduler.by_rows:
        scheduler.prepares = True
        prepare = families.preparer(pipe) or "prepare_latents"
        parts[prepare] = laid_out(getattr(pipe, prepare), scheduler)
        if vae is not None:
            encode = {"encode": encoded_once(vae.encode, scheduler)}
        cut = getattr(pipe, "get_timesteps", None)  # of pipelines from an image
        if cut is not None:

            def as_times(*args: Any, **kwargs: Any) -> tuple[Times, int]:
                timesteps, steps = cut(*args, **kwargs)
                return Times(timesteps), steps

            parts["get_timesteps"] = as_times
    network = families.network_of(pipe)
    handles = share(network, mesh) if mesh else []
    handles += run_once(network, scheduler) if scheduler.by_rows else []
    handles += given_alone(network, scheduler)
    if scheduler.embeds_rates:
        handles.append(tell_guidance(network, scheduler))
    try:
        with lent(pipe, parts), lent(vae, encode):
            yield
            left = len(scheduler.running.calls) - scheduler.running.index
            if left and not getattr(pipe, "interrupt", False):
                name = type(pipe).__name__
                raise ValueError(f"{name} ended {left} calls before the predictor: not served")
    finally:
        for handle in handles:
            handle.remove()


class Times(list[Tensor]):
    """Timesteps of which each is a row, for pipelines that ask one of them for every image."""

    def __getitem__(self, at: Any) -> Any:
        part = super().__getitem__(at)
        return Times(part) if isinstance(at, slice) else part

    def repeat(self, count: int) -> Tensor:
        """The first one's first time, so often."""
        return self[0].reshape(-1)[:1].repeat(count)


def laid_out(prepare: Callable[..., Any], scheduler: EPDScheduler) -> Callable[..., Any]:
    """A pipeline's prepare_latents that makes one latent an image, and rows of them all."""
    copies, branches = scheduler.copies, scheduler.branches

    def before(arguments: dict[str, Any]) -> None:
        scheduler.preparing = True
        counts = [name for name in COUNTS if name in arguments]
        for name in counts:
            arguments[name] //= copies
        arguments["batch_size"] //= branches if counts else branches * copies

    def after(latents: Tensor, others: list[Any]) -> list[Any]:
        def as_rows(value: Any) -> Any:
            if not isinstance(value, Tensor) or len(value) != images or value.shape[1:] == (3,):
                return value  # places of tokens are [S, 3]
            return torch.cat([value.repeat_interleave(copies, 0)] * branches)

        images = len(latents)
        scheduler.preparing = False
        return [scheduler.prepare(latents), *map(as_rows, others)]

    return with_latents(prepare, before, after)


@dataclass(frozen=True)
class DrawnOnce:
    """A VAE's distribution for images whose copies share what is drawn."""

    of_images: Any
    copies: int

    def sample(self, generator: Any = None) -> Tensor:
        """Latents, the copies of an image side by side."""
        return self.of_images.sample(generator).repeat_interleave(self.copies, 0)

    def mode(self) -> Tensor:
        """The most probable ones."""
        return self.of_images.mode().repeat_interleave(self.copies, 0)


def encoded_once(encode: Callable[..., Any], scheduler: EPDScheduler) -> Callable[..., Any]:
    """A VAE's encode by which the rows of a picture that goes with an image are one draw."""
    copies = scheduler.copies

    def encoded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        one = x[::copies]
        if scheduler.preparing or not torch.equal(one.repeat_interleave(copies, 0), x):
            return encode(x, *args, **kwargs)
        result = encode(one, *args, **kwargs)
        if not isinstance(result, AutoencoderKLOutput):
            return encode(x, *args, **kwargs)
        distribution: Any = DrawnOnce(result.latent_dist, copies)
        return AutoencoderKLOutput(latent_dist=distribution)

    return encoded


# --- our own loop on a pipeline's parts ---------------------------------------------------


def parallel_pipeline(
    pipe: Any,
    predictor: PredictorLike,
    *,
    size: tuple[int, int] | None = None,
    negative_prompt: str | None = None,
) -> Callable[..., list[Image.Image]]:
    """A function of (prompts, seeds, batch=4) that gives a picture a seed, by our own loop.

    The i-th prompt is for the i-th seed, again from the first. The pipeline's parts are taken as
    they are in every call, LoRA included. Raises ValueError where the predictor was learned for
    another process or resolution than the model's at `size` (height, width), and for
    IP-Adapters, whose pictures `parallel` takes.
    """
    options = ModelOptions(size=size, negative_prompt=negative_prompt)
    (learned,) = opened(predictor)

    def backend_of_today() -> Backend:
        if getattr(families.network_of(pipe), "encoder_hid_proj", None) is not None:
            raise ValueError("this pipeline has an IP-Adapter: use parallel(pipe, predictor)")
        return wrap(pipe, torch.device(pipe._execution_device), options)

    def pictures(
        prompts: str | Sequence[str], seeds: Sequence[int], batch: int = 4
    ) -> list[Image.Image]:
        backend, texts = backend_of_today(), [prompts] if isinstance(prompts, str) else prompts
        jobs = [Job(seed, prompt) for seed, prompt in meet(seeds, texts)]
        parts = generate(backend, learned.sampler(backend.levels), jobs, batch=batch)
        images = (to_bytes(image).permute(1, 2, 0) for part in parts for image in part.images)
        return [Image.fromarray(image.cpu().numpy()) for image in images]

    backend = backend_of_today()
    check_fit(learned.recipe, backend)
    learned.sampler(backend.levels)
    return pictures
