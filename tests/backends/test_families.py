"""Every family of pipelines that diffusers has and that can be built tiny, one row a family.

K = 2 points as rows, one after another, and by our loop over the network that a backend of any
pipeline finds give the same latents; a solver by name is the pipeline's own of equal order;
guidance as rows is the pipeline's guidance. Where a family cannot, it says why.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.any_pipeline import any_backend
from backends.base import ModelOptions
from backends.families import EMBEDDED, FROM_ZERO, RESCALING, family_of, guidance_name, one_time
from backends.lending import COUNTS
from backends.parallel import parallel
from backends.parametrization import parametrization_of
from backends.scheduler import EPDScheduler
from solvers.classic import Euler
from solvers.epd import Directions, MultistepTable
from solvers.field import Field
from solvers.predictor import Predictor
from solvers.recipe import Recipe
from solvers.sampler import Sampler
from tests import twins

diffusers = twins.diffusers
TEXT = "a red fox"
CPU = torch.device("cpu")
SMALL = ModelOptions((16, 16))


@dataclass(frozen=True)
class Row:
    """How a family's twin is called, and its own solver by our name."""

    size: int = 16
    given: dict[str, Any] = field(default_factory=dict)
    solver: str | None = "euler"  # None where its own draws noise on the way
    calls: int = 6  # of the network for EPD of 3 intervals; twice as many with guidance apart


FRAMES = ("num_frames", "frames", "video_length")
NO_BINS = {"use_resolution_binning": False}
FAMILIES = {
    "sd": Row(),
    "sdxl": Row(),
    "sd3": Row(),
    "flux": Row(),
    "flux2": Row(),
    "pixart": Row(given=NO_BINS, solver="dpmpp-2"),
    "qwen": Row(given={"negative_prompt": "bad"}, calls=12),
    "chroma": Row(calls=12),
    "wan": Row(32, {"num_frames": 5}, "unipc-2", 12),
    "ltx": Row(64, {"num_frames": 9}),
    "sana": Row(32, NO_BINS, "dpmpp-2"),
    "lumina2": Row(32, calls=12),
    "hunyuan_video": Row(32, {"num_frames": 5}),
    "cogview4": Row(calls=12),
    "z_image": Row(),
    "mochi": Row(32, {"num_frames": 7}),
    "aura_flow": Row(),
    "kandinsky5": Row(),
    "pixart_alpha": Row(given=NO_BINS, solver="dpmpp-2"),
    "flux2_klein": Row(calls=12),
    "skyreels": Row(32, {"num_frames": 5}, "unipc-2", 12),
    "sana_video": Row(32, NO_BINS | {"frames": 5}, "dpmpp-2"),
    "latte": Row(),
    "allegro": Row(64, {"num_frames": 5}, None),
    "bria": Row(32),
    "animate_diff": Row(given={"num_frames": 2}),
    "cogvideox": Row(given={"num_frames": 5}, solver="dpmpp-2"),
    "kolors": Row(),
    "prx": Row(given=NO_BINS),
    "ovis": Row(32, calls=12),
    "hunyuan_dit": Row(given=NO_BINS, solver=None),
    "hidream": Row(),
    "hunyuan_video15": Row(32, {"num_frames": 5}),
    "hunyuan_image": Row(calls=12),
    "easy_animate": Row(32, {"num_frames": 5}),
    "lumina": Row(),
    "kandinsky3": Row(solver=None),
    "longcat": Row(given={"enable_prompt_rewrite": False}),
    "krea2": Row(calls=12),
    "qwen21": Row(32, {"negative_prompt": "bad"}),
    "nucleus": Row(calls=12),
    "glm": Row(),
    "if": Row(given={"output_type": "pt"}, solver="dpmpp-2"),
    "bria_fibo": Row(32),
    "prx_pixel": Row(given=NO_BINS),
    "motif": Row(32, {"num_frames": 5}, calls=12),
    "ernie": Row(32, {"use_pe": False}),
    "wan22": Row(32, {"num_frames": 5}, "unipc-2"),
    "wan22_5b": Row(32, {"num_frames": 5}, "unipc-2"),
    "vace": Row(32, {"num_frames": 5}, "unipc-2"),
    "cosmos25": Row(32, {"num_frames": 5}, "unipc-2"),
    "ltx2": Row(64, {"num_frames": 9}),
    "omnigen": Row(32),
}
ONE_PROMPT = ("kandinsky5", "latte", "prx", "prx_pixel", "vace")
ONE_IMAGE = ("prx", "prx_pixel", "vace", "allegro", "animate_diff", "cogvideox", "hunyuan_video15")
BY_CALL = {
    "glm": "a language model draws tokens in every call",
    "ltx2": "it steps sound together with its pictures",
}
families = pytest.mark.parametrize("name", FAMILIES)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "Future", "User")
]


@cache
def twin(name: str) -> Any:
    return twins.twin(name)


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
    if name == "vace":
        given["generator"] = given["generator"][0]
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


def bare(kind: str, scheduler: str | None = None, **parts: Any) -> Any:
    """A pipeline with nothing but a scheduler."""
    made_by = getattr(diffusers, f"{kind}Pipeline")
    for name, argument in list(inspect.signature(made_by.__init__).parameters.items())[1:]:
        parts.setdefault(name, None if argument.default is argument.empty else argument.default)
    if scheduler:
        options = {"mask_token_id": 0} if scheduler == "Amused" else {}
        parts["scheduler"] = getattr(diffusers, f"{scheduler}Scheduler")(**options)
    return made_by(**parts)


def unidiffuser() -> Any:
    sizes = {"prefix_inner_dim": 16, "prefix_hidden_dim": 16, "n_embd": 16, "n_layer": 1}
    decoder = diffusers.UniDiffuserTextDecoder(prefix_length=4, n_head=2, vocab_size=60, **sizes)
    parts = {"text_encoder": twins.clip(), "text_tokenizer": twins.tokenizer()}
    parts |= {"image_encoder": twins.clip("CLIPTextModelWithProjection"), "vae": twins.vae()}
    unet = twin("sd").unet
    return bare("UniDiffuser", "DDIM", **parts, text_decoder=decoder, unet=unet)


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
    if kind == "epd" and name not in ONE_PROMPT:  # two prompts of two lengths
        given = {"prompt": [TEXT, "a dog"], "generator": drawn(3, 4)}
    if name.startswith("qwen"):
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
    if name == "kandinsky3":
        with pytest.raises(ValueError, match="steps x as its network sees it: use parallel"):
            by_scheduler(name, scheduler, num_inference_steps=steps, **given)
        return
    assert close(fast, by_scheduler(name, scheduler, num_inference_steps=steps, **given))


def test_a_pipeline_of_ones_own_around_anothers_call_is_scaled_once() -> None:
    pipe = twin("sd")
    predictor = learned(pipe, "epd-multistep")

    class Own(type(pipe)):
        def __call__(
            self, prompt: Any = None, num_images_per_prompt: int = 1, guidance_scale: float = 7.5,
            **more: Any,
        ) -> Any:  # fmt: skip
            more |= {"num_images_per_prompt": num_images_per_prompt}
            return super().__call__(prompt, guidance_scale=guidance_scale, **more)

    own = parallel(Own(**pipe.components, requires_safety_checker=False), predictor)
    assert close(call(pipe, "sd", own), call(pipe, "sd", parallel(pipe, predictor)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ONE_IMAGE])
def test_several_images_a_prompt_are_each_alone(name: str) -> None:
    pipe = twin(name)
    counts = [count for count in COUNTS if count in twins.call_of(pipe)]
    fast = parallel(pipe, learned(pipe, "epd-multistep"))
    both = call(pipe, name, fast, **{counts[0]: 2}, generator=drawn(3, 4))
    each = [call(pipe, name, fast, generator=drawn(seed)) for seed in (3, 4)]
    assert close(both, torch.cat(each))


@pytest.mark.parametrize("name", ["latte", "prx", "vace"])
def test_a_pipeline_that_mixes_prompts_takes_one_a_call(name: str) -> None:
    fast = parallel(twin(name), learned(twin(name), "epd"))
    with pytest.raises(ValueError, match="mixes 2 prompts of a call up: give one a call"):
        call(twin(name), name, fast, prompt=[TEXT, "a dog"], generator=drawn(3, 4))


@pytest.mark.parametrize("kind", ["epd", "epd-multistep"])
def test_one_point_needs_no_rows_and_no_call_more(kind: str) -> None:
    pipe, calls = twins.sd3(), []
    pipe.set_progress_bar_config(disable=True)
    predictor = learned(pipe, kind, k=1)
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    fast = call(pipe, "sd3", parallel(pipe, predictor))
    assert len(calls) == predictor.nfe
    assert close(fast, call(pipe, "sd3", parallel(pipe, predictor, points="sequence")))


@families
def test_they_are_our_loop_over_the_network_of_any_pipeline(name: str) -> None:
    pipe, row = twin(name), FAMILIES[name]
    options = ModelOptions((row.size, row.size), row.given.get("negative_prompt"))
    if name in BY_CALL:
        with pytest.raises(ValueError, match=BY_CALL[name]):
            any_backend(pipe, CPU, options)
        return
    backend = any_backend(pipe, CPU, options)
    predictor = learned(pipe, "epd", backend.levels.mu)
    sampler = predictor.sampler(backend.levels)
    noise = torch.randn(2, *backend.shape, generator=torch.Generator().manual_seed(5))
    rate = 3.0 if family_of(pipe) not in EMBEDDED else 1.0
    theirs = rate - 1 if family_of(pipe) in FROM_ZERO else rate
    cond = backend.encode([TEXT, "a dog"])
    *_, ours = sampler.states(Field(backend.guided(rate, cond), cond), noise * sampler.sigmas[0])
    noise, ours = noise[:1], ours[:1]
    given = {guidance_name(pipe) or "": theirs, "latents": noise}
    given.pop("", None)  # of those with a guider
    if name == "if":  # its pipeline draws them itself
        given = {"generator": drawn(5), **{n: v for n, v in given.items() if n != "latents"}}
    if name.startswith("flux2"):  # its pipeline packs latents that it is given
        given["latents"] = noise.reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    frames = {n: v.default for n, v in twins.call_of(pipe).items() if n in FRAMES}
    images = backend.decode(ours) if name != "allegro" else torch.zeros(1, 3)  # in tiles alone
    if name == "flux2_klein":  # its latents leave it unpacked
        given["output_type"], ours = "pt", images
    # IF's levels begin in the hundreds: the last bit of a timestep moves x0 by so much
    rough = 3e-3 if name == "if" else 1e-5
    assert close(call(pipe, name, parallel(pipe, predictor), **given, **frames), ours, rough)
    assert images.shape[:2] == (1, 4 if name == "qwen21" else 3)
    assert bool(((images >= 0) & (images <= 1)).all())


@pytest.mark.parametrize(
    ("name", "solver"), [(n, r.solver) for n, r in FAMILIES.items() if r.solver]
)
def test_a_solver_by_name_is_the_pipelines_own(name: str, solver: str) -> None:
    scheduler = EPDScheduler.from_solver(solver, like=twin(name).scheduler)
    theirs = call(twin(name), name, num_inference_steps=4)
    assert close(by_scheduler(name, scheduler, num_inference_steps=4), theirs)


@families
def test_guidance_as_rows_is_the_pipelines_guidance(name: str) -> None:
    pipe = twin(name)
    predictor = learned(pipe, "epd")
    reasons = {"part of the network": EMBEDDED, "rescales what guidance gives": RESCALING}
    reasons |= {"limits what guidance gives": ("IF",), "as long as the others": ("CogView4",)}
    for words, names in reasons.items():
        if family_of(pipe) in names:
            with pytest.raises(ValueError, match=words):
                parallel(pipe, predictor, guidance="rows")
            return
    if one_time(pipe) or pipe.components.get("guider"):
        with pytest.raises(ValueError, match="cannot take guidance as rows"):
            parallel(pipe, predictor, guidance="rows")
        return
    given = {"negative_prompt": "a dog"} if "negative_prompt" in twins.call_of(pipe) else {}
    rows = call(pipe, name, parallel(pipe, predictor, guidance="rows"), **given)
    theirs = call(pipe, name, parallel(pipe, predictor), **given)
    tolerance = 1e-4 if name == "chroma" else 1e-5
    assert close(rows, theirs, tolerance)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "wan", "ltx", "pixart", "z_image"])
def test_calls_without_guidance_see_no_rows_of_the_negative_prompt(name: str) -> None:
    pipe, seen = twin(name), []
    network = pipe.components.get("transformer") or pipe.unet
    network.register_forward_hook(lambda _m, _args, output: seen.append(len(output[0])))
    given = {"negative_prompt": "a dog"} if "negative_prompt" in twins.call_of(pipe) else {}
    ends, rows = [], []
    for rate in (1.0, 1.0 + 1e-9):  # which is guidance that does nothing
        predictor = learned(pipe, "epd")
        rates = torch.tensor([rate, 3.0, rate], dtype=torch.float64)
        predictor = replace(predictor, table=replace(predictor.table, guidance=rates))
        seen.clear()
        ends.append(call(pipe, name, parallel(pipe, predictor, guidance="rows"), **given))
        rows.append([*seen])
    assert close(*ends)
    halves = [count // 2 for count in rows[1]]
    assert rows[0] == [*halves[:2], *rows[1][2:4], *halves[4:]]


UNSERVED: dict[str, tuple[Callable[[], Any], str]] = {
    "CogView3+": (partial(twins.twin, "cogview3"), "shifts its levels to one without signal"),
    "text to video": (partial(twins.twin, "text_to_video"), "it steps each frame of a video"),
    "Cosmos 2": (partial(twins.twin, "cosmos2"), "it has levels of its own"),
    "HunyuanImage's own guider": (
        partial(
            twins.twin, "hunyuan_image", guider={"_class_name": "AdaptiveProjectedMixGuidance"}
        ),
        "counts steps: take a ClassifierFreeGuidance without start and stop",
    ),
    "a mean flow": (
        partial(twins.twin, "hunyuan_image", transformer={"use_meanflow": True}),
        "its network is told where a step ends",
    ),
    "Stable Cascade, both": (
        partial(bare, "StableCascadeCombined"), r"two pipelines in one \(decoder_pipe, prior"
    ),
    "Stable Cascade": (
        partial(bare, "StableCascadePrior", "DDPMWuerstchen"), "a stage whose result is no picture"
    ),
    "I2VGen-XL": (partial(bare, "I2VGenXL", "DDIM"), "it steps each frame of a video"),
    "IF, larger": (partial(bare, "IFSuperResolution", "DDPM"), "scales its picture as if it were"),
    "Kandinsky's prior": (partial(bare, "KandinskyV22Prior", "UnCLIP"), "no picture yet"),
    "aMUSEd": (partial(bare, "Amused", "Amused"), "discrete tokens"),
    "VQ-Diffusion": (partial(bare, "VQDiffusion"), "no network called transformer or unet"),
    "latent consistency": (partial(bare, "LatentConsistencyModel", "LCM"), "a few steps that"),
    "Sana-Sprint": (partial(bare, "SanaSprint", "SCM"), "a few steps that draw noise"),
    "AnyFlow": (partial(bare, "AnyFlow", "FlowMapEulerDiscrete"), "told where a step ends"),
    "Kandinsky 6": (partial(bare, "Kandinsky6TI2VA", "Piflow"), "told where a step ends"),
    "Helios": (partial(bare, "Helios", "Helios"), "section by section"),
    "Cosmos 1": (
        partial(bare, "CosmosTextToWorld", "EDMEuler", safety_checker=twins.Guard()),
        "its levels run from 80",
    ),
    "SkyReels-V2, forced": (
        partial(bare, "SkyReelsV2DiffusionForcing", "UniPCMultistep"), "a scheduler for every"
    ),
    "self-attention guidance": (
        partial(bare, "StableDiffusionSAG", "DDIM", requires_safety_checker=False), "for the betas"
    ),
    "panorama": (partial(bare, "StableDiffusionPanorama", "DDIM"), "each window of an image"),
    "Attend-and-Excite": (
        partial(
            bare, "StableDiffusionAttendAndExcite", "DDIM", requires_safety_checker=False
        ), "x that nobody has scaled",
    ),
    "UniDiffuser": (unidiffuser, "from noise that it draws in every call"),
    "a larger latent": (
        partial(bare, "StableDiffusionLatentUpscale", "EulerDiscrete"), "scales x by levels of its"
    ),
    "Kandinsky 2.1 from an image": (
        partial(bare, "KandinskyImg2Img", "DDIM"), "noises its picture by levels of its own"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_what_cannot_be_served_says_why_in_one_line(name: str) -> None:
    maker, reason = UNSERVED[name]
    pipe, predictor = maker(), learned(twin("sd"), "epd")
    for ask in (lambda: any_backend(pipe, CPU, SMALL), lambda: parallel(pipe, predictor)):
        with pytest.raises(ValueError, match=reason) as error:
            ask()
        assert "\n" not in str(error.value)


def test_a_rate_below_1_among_others_is_refused() -> None:
    backend = any_backend(twin("sdxl"), CPU, SMALL)
    sampler = Sampler(Euler(), (80.0, 10.0, 1.0, 0.1), rates=(4.0, 0.5, 4.0))
    with pytest.raises(ValueError, match=r"guidance_rate 0\.5: this pipeline has 1"):
        backend.check_rates(sampler.extreme_rates, backend.encode([TEXT]))


@pytest.mark.parametrize(("name", "rate"), [("kandinsky3", 2.0), ("cosmos25", 1.5)])
def test_a_rate_at_which_a_pipeline_does_not_guide_is_refused(name: str, rate: float) -> None:
    backend = any_backend(twin(name), CPU, SMALL)
    cond = backend.encode([TEXT])
    with pytest.raises(ValueError, match="begins to guide above it"):
        backend.guided(rate, cond)(torch.zeros(1, *backend.shape), torch.ones(1), cond)
