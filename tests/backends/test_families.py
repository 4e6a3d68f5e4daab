"""Every family of pipelines that diffusers has and that can be built tiny, one row a family.

K = 2 points as rows, one after another, and by our loop over the network that a backend of any
pipeline finds give the same latents; a solver by name is the pipeline's own of equal order;
guidance as rows is the pipeline's guidance. Where a family cannot, it says why.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from backends.any_pipeline import any_backend
from backends.base import ModelOptions
from backends.families import EMBEDDED, FROM_ZERO, RESCALING, family_of, guidance_name, one_time
from backends.parallel import parallel
from backends.parametrization import parametrization_of
from backends.scheduler import EPDScheduler
from solvers.epd import Directions, MultistepTable
from solvers.field import Field
from solvers.predictor import Predictor
from solvers.recipe import Recipe
from tests import twins

diffusers = twins.diffusers
TEXT = "a red fox"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A family's twin, how it is called, and its own solver by our name."""

    maker: Callable[..., Any]
    size: int = 16
    given: dict[str, Any] = field(default_factory=dict)
    solver: str = "euler"
    calls: int = 6  # of the network for EPD of 3 intervals; twice as many with guidance apart


FAMILIES = {
    "SD1.5": Row(twins.sd),
    "SDXL": Row(twins.sdxl),
    "SD3": Row(twins.sd3),
    "FLUX.1": Row(twins.flux),
    "FLUX.2": Row(twins.flux2),
    "PixArt": Row(twins.pixart, given={"use_resolution_binning": False}, solver="dpmpp-2"),
    "Qwen-Image": Row(twins.qwen, given={"negative_prompt": "bad"}, calls=12),
    "Chroma": Row(twins.chroma, calls=12),
    "Wan 2.1": Row(twins.wan, 32, {"num_frames": 5}, "unipc-2", 12),
    "LTX": Row(twins.ltx, 64, {"num_frames": 9}),
    "Sana": Row(twins.sana, 32, {"use_resolution_binning": False}, "dpmpp-2"),
    "Lumina2": Row(twins.lumina2, 32, calls=12),
    "HunyuanVideo": Row(twins.hunyuan_video, 32, {"num_frames": 5}),
    "CogView4": Row(twins.cogview4, calls=12),
    "Z-Image": Row(twins.z_image),
    "Mochi": Row(twins.mochi, 32, {"num_frames": 7}),
    "AuraFlow": Row(twins.aura_flow),
    "Kandinsky5": Row(twins.kandinsky5),
}
families = pytest.mark.parametrize("name", FAMILIES)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "Future", "User")
]


@cache
def twin(name: str) -> Any:
    pipe = FAMILIES[name].maker()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(pipe: Any, kind: str, mu: float | None = None, n: int = 3, k: int = 2) -> Predictor:
    """A table that nobody learned, of this kind, for a pipeline's process."""
    flow = parametrization_of(pipe.scheduler).process.name == "flow"
    schedule, process = ("flowmatch", "flow") if flow else ("discrete", "ve")
    recipe = Recipe(
        n + 1, k, schedule, backend=type(pipe).__name__, process=process, solver=kind,
        flowmatch_mu=mu,
    )  # fmt: skip
    r = random(n, k).sort(1)[0]
    if kind == "epd-multistep":
        a, b = random(n, 3, seed=2) - 0.3, random(n, 3, seed=3) * 0.2
        table = MultistepTable(a, r, torch.full((n, k), 0.5).double(), b, torch.ones(n, k))
        return Predictor(table, recipe)
    weight = torch.softmax(random(n, k, seed=4), 1)
    scales = (0.9 + 0.2 * random(n, k, seed=seed) for seed in (5, 6))
    return Predictor(Directions(r, weight, *scales), recipe)


def drawn(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipe: Any, name: str, caller: Any = None, **more: Any) -> Tensor:
    """Latents by a pipeline, or by what is called like it."""
    row, rate = FAMILIES[name], guidance_name(pipe)
    given = {"height": row.size, "width": row.size, "output_type": "latent", **row.given}
    given |= {rate: 3.0} if rate and family_of(pipe) not in EMBEDDED else {}
    given |= {"generator": drawn(3), "prompt": TEXT, **more}
    return (caller or pipe)(**given)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def by_scheduler(name: str, scheduler: EPDScheduler, **more: Any) -> Tensor:
    pipe, own = twin(name), twin(name).scheduler
    try:
        pipe.scheduler = scheduler
        return call(pipe, name, **more)
    finally:
        pipe.scheduler = own


@families
@pytest.mark.parametrize("kind", ["epd", "epd-multistep"])
def test_points_as_rows_are_points_one_by_one(name: str, kind: str) -> None:
    pipe = twin(name)
    predictor, calls = learned(pipe, kind), [0]
    if reason := one_time(pipe):
        with pytest.raises(ValueError, match="cannot take points as rows") as error:
            parallel(pipe, predictor, points="rows")
        assert reason in str(error.value)
    given: dict[str, Any] = {}
    if kind == "epd" and name != "Kandinsky5":  # two prompts of two lengths
        given = {"prompt": [TEXT, "a dog"], "generator": drawn(3, 4)}
    if name == "Qwen-Image":
        given["negative_prompt"] = ["bad"] * len(given.get("generator", "1"))
    network = pipe.components.get("transformer") or pipe.unet
    hook = network.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    fast = call(pipe, name, parallel(pipe, predictor), **given)
    hook.remove()
    if not reason:
        assert calls[0] == FAMILIES[name].calls // (2 if kind == "epd-multistep" else 1)
    if "generator" in given:
        given["generator"] = drawn(3, 4)
    scheduler = EPDScheduler.from_predictor(predictor, like=pipe.scheduler)
    steps = predictor.evaluations if reason else predictor.nfe  # FLUX.2's levels depend on it
    assert close(fast, by_scheduler(name, scheduler, num_inference_steps=steps, **given))


@pytest.mark.parametrize("kind", ["epd", "epd-multistep"])
def test_one_point_needs_no_rows_and_no_call_more(kind: str) -> None:
    pipe, calls = twins.sd3(), []
    pipe.set_progress_bar_config(disable=True)
    predictor = learned(pipe, kind, k=1)
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    fast = call(pipe, "SD3", parallel(pipe, predictor))
    assert len(calls) == predictor.nfe
    assert close(fast, call(pipe, "SD3", parallel(pipe, predictor, points="sequence")))


@families
def test_they_are_our_loop_over_the_network_of_any_pipeline(name: str) -> None:
    pipe, row = twin(name), FAMILIES[name]
    options = ModelOptions((row.size, row.size), row.given.get("negative_prompt"))
    backend = any_backend(pipe, CPU, options)
    predictor = learned(pipe, "epd", backend.levels.mu)
    sampler = predictor.sampler(backend.levels)
    noise = torch.randn(1, *backend.shape, generator=torch.Generator().manual_seed(5))
    rate = 3.0 if family_of(pipe) not in EMBEDDED else 1.0
    theirs = rate - 1 if family_of(pipe) in FROM_ZERO else rate
    cond = backend.encode([TEXT])
    *_, ours = sampler.states(Field(backend.guided(rate, cond), cond), noise * sampler.sigmas[0])
    given = {guidance_name(pipe): theirs, "latents": noise}
    if name == "FLUX.2":  # its pipeline packs latents that it is given
        given["latents"] = noise.reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    frames = {n: v.default for n, v in twins.call_of(pipe).items() if n == "num_frames"}
    assert close(call(pipe, name, parallel(pipe, predictor), **given, **frames), ours)
    images = backend.decode(ours)
    assert images.shape[:2] == (1, 3)
    assert bool(((images >= 0) & (images <= 1)).all())


@families
def test_a_solver_by_name_is_the_pipelines_own(name: str) -> None:
    scheduler = EPDScheduler.from_solver(FAMILIES[name].solver, like=twin(name).scheduler)
    theirs = call(twin(name), name, num_inference_steps=4)
    assert close(by_scheduler(name, scheduler, num_inference_steps=4), theirs)


@families
def test_guidance_as_rows_is_the_pipelines_guidance(name: str) -> None:
    pipe = twin(name)
    predictor = learned(pipe, "epd")
    reasons = {"part of the network": EMBEDDED, "rescales what guidance gives": RESCALING}
    for words, names in reasons.items():
        if family_of(pipe) in names:
            with pytest.raises(ValueError, match=words):
                parallel(pipe, predictor, guidance="rows")
            return
    if one_time(pipe):
        with pytest.raises(ValueError, match="cannot take guidance as rows"):
            parallel(pipe, predictor, guidance="rows")
        return
    given = {"negative_prompt": "a dog"}
    rows = call(pipe, name, parallel(pipe, predictor, guidance="rows"), **given)
    theirs = call(pipe, name, parallel(pipe, predictor), **given)
    tolerance = 1e-4 if name == "Chroma" else 1e-5
    assert close(rows, theirs, tolerance)


# --- variants -----------------------------------------------------------------------------

IMAGE = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
SIZE = {"height": 16, "width": 16}
FROM = {"image": IMAGE[..., :16, :16], "strength": 2 / 3}


def controlled() -> Any:
    pipe = twins.sd()
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(8, 8)
    )
    for parameter in control.controlnet_down_blocks.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=control, requires_safety_checker=False
    )


def of(kind: str, maker: Any) -> Callable[[], Any]:
    """Another pipeline of a twin's parts."""

    def build() -> Any:
        pipe = maker()
        names = inspect.signature(getattr(diffusers, kind).__init__).parameters
        other = getattr(diffusers, kind)(
            **{n: v for n, v in pipe.components.items() if n in names}
        )
        replaced = {n: v for n, v in vars(pipe).items() if n.startswith("_get_")}
        vars(other).update(replaced)
        return other

    return build


VARIANTS = {
    "SDXL from an image": (of("StableDiffusionXLImg2ImgPipeline", twins.sdxl), FROM),
    "SD3 from an image": (of("StableDiffusion3Img2ImgPipeline", twins.sd3), FROM | SIZE),
    "FLUX.1 from an image": (of("FluxImg2ImgPipeline", twins.flux), FROM | SIZE),
    "Qwen-Image from an image": (
        of("QwenImageImg2ImgPipeline", twins.qwen), FROM | SIZE | {"negative_prompt": "bad"}
    ),
    "SD1.5 with ControlNet": (controlled, {"image": FROM["image"], **SIZE}),
    "LTX from an image": (
        of("LTXImageToVideoPipeline", twins.ltx),
        {"image": IMAGE, "height": 64, "width": 64, "num_frames": 9},
    ),
    "Wan from a video": (
        of("WanVideoToVideoPipeline", twins.wan),
        {"video": [Image.new("RGB", (32, 32), (90, 50, 10))] * 5, "strength": 2 / 3,
         "height": 32, "width": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_take_points_as_rows_or_one_by_one(name: str) -> None:
    maker, given = VARIANTS[name]
    pipe, calls = maker(), []
    pipe.set_progress_bar_config(disable=True)
    predictor = learned(pipe, "epd")
    given = {**given, "prompt": TEXT, "output_type": "latent"}
    fast = parallel(pipe, predictor)(**given, generator=drawn(3))[0]
    pipe.scheduler = EPDScheduler.from_predictor(predictor, like=pipe.scheduler)
    network = pipe.components.get("transformer") or pipe.unet
    network.register_forward_hook(lambda *_: calls.append(1))
    slow = pipe(**given, generator=drawn(3), num_inference_steps=predictor.evaluations)[0]
    assert close(fast, slow)
    if "strength" in given:  # two of the three intervals, of three calls each
        assert len(calls) in (6, 12)
