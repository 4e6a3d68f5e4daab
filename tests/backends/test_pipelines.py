"""The families with backends of their own, and how models are opened: folders, names, files."""

import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends import latents
from backends.any_pipeline import any_backend
from backends.base import Backend, ModelOptions
from backends.flux import pack, unpack
from backends.generate import Job, generate
from backends.load import check_fit, load_backend
from backends.parametrization import levels_at
from backends.pipelines import wrap
from backends.sd3 import fold_zeros
from solvers.field import Field
from solvers.predictor import find_predictor, load_predictor
from solvers.sampler import Sampler, hand_made
from solvers.vp import table_of
from src.seeds import randn
from tests import twins
from tests.backends.original_layout import original, original_sd

diffusers = twins.diffusers
CPU = torch.device("cpu")
SMALL = ModelOptions(size=(32, 32))
TEXT = "a red fox in the snow"
Folders = Callable[[str], Path]
FAMILIES = {"sd": twins.sd, "sd3": twins.sd3, "flux": twins.flux}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a twin, made when it is first asked for."""
    root = tmp_path_factory.mktemp("twins")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            twins.saved(root / name, twins.MAKERS[name]())
        return root / name

    return folder


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """To float tolerance, relative to the size of the numbers."""
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def learned(name: str) -> Any:
    return load_predictor(find_predictor(name))


# --- networks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "rate"),
    [
        (twins.sd, 5.0),
        (lambda: twins.sd(scheduler={"prediction_type": "v_prediction"}), 1.0),
        (twins.sd3, 4.5),
        (lambda: twins.sd3(text_encoder_3="t5", tokenizer_3="letters"), 1.0),
        (twins.flux, 3.5),
    ],
)
def test_the_own_families_are_any_pipelines_backend(maker: Any, rate: float) -> None:
    """And so diffusers' own pipeline (test_families)."""
    pipe = maker()
    pipe.set_progress_bar_config(disable=True)
    flux = type(pipe).__name__ == "FluxPipeline"
    options = ModelOptions((32, 16), None if flux else "blur")
    own, any_ = wrap(pipe, CPU, options), any_backend(pipe, CPU, options)
    assert own.size == any_.size == (32, 16)
    high = own.levels.sigma_max
    x, sigma = high * randn([3, 4], own.shape), torch.tensor([0.9 * high, 0.3 * high])
    ways = (pack, lambda x: unpack(x, own.shape)) if flux else (lambda x: x,) * 2
    results = []
    for backend, to, back in ((own, lambda x: x, lambda x: x), (any_, *ways)):
        cond = backend.encode([TEXT, "b"])
        with torch.no_grad():
            x0 = backend.guided(rate, cond)(to(x), sigma, cond)
        results.append((back(x0), backend.decode(x0)))
    assert close(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1])


def test_an_unconditional_ldm_by_euler_is_diffusers_ddim() -> None:
    pipe = twins.uncond()
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np"
    ).images
    backend = wrap(pipe, CPU)
    assert backend.levels.timesteps
    sigmas = backend.levels.timesteps.sigma_of(pipe.scheduler.timesteps).tolist()
    x = randn([3], (3, 8, 8)) * (1 + sigmas[0] ** 2) ** 0.5
    with torch.no_grad():
        *_, x0 = Sampler(hand_made("euler", backend.levels, 5).solver, (*sigmas, 0.0)).states(
            Field(backend.denoise), x
        )
    assert close(backend.decode(x0).permute(0, 2, 3, 1), torch.from_numpy(theirs), 1e-4)


@pytest.mark.parametrize(
    ("name", "file", "side"),
    [
        ("sd", "sd15-best", 16),
        ("uncond", "lsun-bedroom-5nfe", 16),
        ("uncond", "lsun-bedroom-5nfe-ipndm", 16),
        ("sd3", "sd3-1024-best", 64),
        ("flux", "flux-best", 64),
    ],
)
def test_published_predictors_sample_from_their_family(
    name: str, file: str, side: int, folders: Folders
) -> None:
    backend = load_backend(str(folders(name)), options=ModelOptions(size=(side, side)))
    predictor = learned(file)
    jobs = [Job(0, None if name == "uncond" else TEXT)]
    (part,) = generate(backend, predictor.sampler(backend.levels), jobs, batch=1)
    assert part.tally.calls == predictor.nfe
    assert part.images.shape == (1, 3, side, side)
    assert part.images.isfinite().all()
    assert part.images.std() > 0


# --- clocks and schedules -----------------------------------------------------------------


def test_the_range_of_stable_diffusion_is_derived_and_its_table_inverted() -> None:
    table = table_of(twins.SD_SCHEDULER)
    assert table.levels.sigma_min == pytest.approx(0.0292, abs=5e-5)
    assert table.levels.sigma_max == pytest.approx(14.6146, abs=5e-5)
    t = torch.tensor([0.0, 0.25, 1.0, 499.5, 998.9, 999.0], dtype=torch.float64)
    assert torch.allclose(table.sigma_inv(table.sigma(t)), t, atol=1e-9)
    assert table.sigma_inv(torch.tensor([1e-9, 1e9])).tolist() == [0.0, 999.0]
    even = table.sigma_inv(table.levels.grid("discrete", 4))
    assert torch.allclose(even, torch.tensor([999.0, 666, 333, 0]).double())


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, None), (4096, 1.15)])
def test_flow_levels_follow_the_resolution_as_in_the_pipeline(
    tokens: int, mu: float | None
) -> None:
    levels = levels_at(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), tokens
    )
    theirs = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens)
    assert levels.mu == pytest.approx(theirs if mu is None else mu)
    assert levels.sigma_min == 1e-3
    levels = levels_at(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 0)
    assert levels.sigma_min == pytest.approx(0.0029940119760479044)
    own = levels_at(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True), 0
    )
    assert not torch.equal(own.grid("flowmatch", 5), levels.grid("flowmatch", 5))


# --- prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [wrap, any_backend])
def test_a_distinct_prompt_is_encoded_once(kind: Any) -> None:
    pipe, rows = twins.sd3(), []
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    backend: Backend = kind(pipe, CPU, SMALL)
    x, sigma = randn([0, 1, 2], backend.shape), torch.full((3,), 0.5)
    for prompts in (["a", "b", "a"], ["b", "b", "c"]):
        cond = backend.encode(prompts)
        backend.denoise(x, sigma, cond)
    assert sum(rows) == 4  # and the empty text


def test_encoders_are_let_go_of_on_request(folders: Folders) -> None:
    kept = load_backend(str(folders("sd")))
    released = load_backend(str(folders("sd")), options=ModelOptions(encode_first=(TEXT,)))
    ours, theirs = released.encode([TEXT]), kept.encode([TEXT])
    assert ours
    assert theirs
    assert torch.equal(ours.given["text"], theirs.given["text"])
    with pytest.raises(ValueError, match="let go before 'another'"):
        released.encode(["another"])


@pytest.mark.parametrize("maker", [twins.sd, twins.sd3, twins.flux])
def test_encoders_that_were_let_go_are_nowhere(maker: Callable[[], Any]) -> None:
    pipe = maker()
    encoder = weakref.ref(pipe.text_encoder)
    options = replace(SMALL, encode_first=(TEXT,))
    backend = wrap(pipe, CPU, options)
    del pipe
    gc.collect()
    assert encoder() is None
    assert backend.encode([TEXT])


def test_embeddings_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one used is the last to go; those of one call are all there."""
    monkeypatch.setattr(latents, "MOST_TEXTS", 3)
    asked: list[str] = []

    def encoder(text: str) -> dict[str, torch.Tensor]:
        asked.append(text)
        return {"text": torch.tensor([float(len(text))])}

    texts = latents.Texts(encoder, CPU, negative=None)
    many = ["a", "bb", "ccc", "dddd", "eeeee"]
    for prompts in (many, ["eeeee", "ccc"], ["a", "ccc"]):
        given = texts.condition(prompts).given["text"]
        assert given[:, 0].tolist() == [float(len(prompt)) for prompt in prompts]
    assert asked == [*many, "a"]
    assert len(texts.cache) == 3


@pytest.mark.parametrize("kind", [wrap, any_backend])
def test_flux_takes_a_guidance_for_each_row(kind: Any) -> None:
    pipe = twins.flux()
    pipe.set_progress_bar_config(disable=True)
    backend: Backend = kind(pipe, CPU, SMALL)
    cond = backend.encode([TEXT])
    assert cond is not None
    x, sigma = randn([0], backend.shape), torch.ones(1)
    with torch.no_grad():
        weak, strong = (backend.guided(rate, cond)(x, sigma, cond) for rate in (1.0, 7.0))
        pair = replace(cond.repeat(2), rates=(1.0, 7.0))
        both = backend.guided(3.5, cond)(torch.cat([x, x]), torch.ones(2), pair)
    assert not torch.allclose(weak, strong)
    assert torch.allclose(both, torch.cat([weak, strong]), atol=1e-5)


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sd3", {"size": (30, 30)}, "30 is no multiple of 4: try 32"),
        ("sd3", {"size": (1024, 1024)}, "1024 is too large: the model goes up to 256"),
        ("flux", {"size": (18, 18)}, "18 is no multiple of 4"),
        ("sd", {"size": (0, 0)}, "0 is no multiple of 2: try 2"),
        ("flux", {"negative_prompt": "blur"}, "no negative prompt"),
        ("sd3", {"cpu_offload": True}, "cpu_offload needs a GPU"),
        ("uncond", {"vae_tiling": True}, "neither in tiles nor in slices"),
    ],
)
def test_options_that_a_model_lacks_are_refused(
    name: str, options: dict[str, Any], words: str, folders: Folders
) -> None:
    with pytest.raises(ValueError, match=words):
        load_backend(str(folders(name)), options=ModelOptions(**options))


def test_prompts_rates_and_predictors_that_a_model_lacks_are_refused(folders: Folders) -> None:
    flux = wrap(twins.flux(transformer={"guidance_embeds": False}), CPU, SMALL)
    with pytest.raises(ValueError, match=r"guidance_rate 3\.5"):
        flux.guided(3.5, None)
    with pytest.raises(ValueError, match="takes a text for every image, not 7"):
        flux.encode([7])
    with pytest.raises(ValueError, match="takes no prompts"):
        load_backend(str(folders("uncond"))).encode(["a dog"])
    sd3 = load_backend(str(folders("sd3")), options=ModelOptions(size=(128, 128)))
    recipe = learned("sd3-512-best").recipe
    with pytest.raises(ValueError, match=r"for 512 pixels.*makes 128.*--resolution 512"):
        check_fit(recipe, sd3)
    check_fit(replace(recipe, img_resolution=128), sd3)
    with pytest.raises(ValueError, match="is not for a ve model"):
        learned("sd3-512-best").sampler(load_backend(str(folders("sd"))).levels)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model_index.json", b'{"_class_name": "MadeUpPipeline"}', "is called 'MadeUpPipeline'"),
        ("model_index.json", b'{"_class_name": "DDPMPipeline"}', r"--model|not served|DDPM"),
        ("config.json", b"{}", "takes no prompts, sizes"),
        ("model.ckpt", b"PK\x03\x04 neither weights nor anything", "no weights that can be read"),
        ("model.safetensors", b"PK\x03\x04 neither weights", "no weights that can be read"),
    ],
)
def test_folders_and_files_of_no_model_are_one_line(
    file: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    path = tmp_path if file.endswith(".json") else tmp_path / file
    with pytest.raises(ValueError, match=words) as error:
        load_backend(str(path), options=SMALL)
    assert "\n" not in str(error.value)


# --- folders and files ----------------------------------------------------------------------


def sampled(backend: Backend) -> Tensor:
    """An image by three steps, under guidance."""
    sampler = replace(hand_made("euler", backend.levels, 3), guidance_rate=3.0)
    (part,) = generate(backend, sampler, [Job(1, TEXT)], batch=1)
    return part.images


@pytest.mark.parametrize(
    ("part", "content", "words"),
    [
        ("transformer", None, r"transformer has no weights.*15.5 GB.*--model"),
        ("text_encoder_2", b"", "text_encoder_2/model.safetensors: no weights that can be read"),
        ("text_encoder_2", b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ("text_encoder", "half", "text_encoder/model.safetensors: no weights that can be read"),
        ("vae", "half", "vae/diffusion_pytorch_model.safetensors: no weights that can be read"),
    ],
)
def test_weights_that_are_not_whole_are_named(
    part: str, content: bytes | str | None, words: str, folders: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders("sd3"), tmp_path / "sd3")
    file = next((folder / part).glob("*.safetensors"))
    if content is None:
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=words) as error:
        load_backend(str(folder))
    assert "\n" not in str(error.value)


def test_a_folder_of_halves_alone_and_the_hubs_cache_are_opened(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot as huggingface_hub lays it out, with what `variant="fp16"` fetches."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folders("sd"), safety_checker=None, feature_extractor=None
    )
    cache = tmp_path / "models--who--what"
    pipe.to(torch.float16).save_pretrained(cache / "snapshots" / "1", variant="fp16")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1")
    for place in ("constants.HF_HUB_CACHE", "file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.{place}", str(tmp_path), raising=False)
    exact = sampled(load_backend(str(folders("sd"))))
    for name in (str(cache / "snapshots" / "1"), "who/what"):
        assert close(sampled(load_backend(name)), exact, 0.02)


class ModelCheckpoint:
    """What a trainer leaves in its checkpoint."""

    def __init__(self) -> None:
        self.best = 1.0


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_an_original_sd_file_gives_the_folders_outputs(
    ending: str, folders: Folders, tmp_path: Path
) -> None:
    file, tensors = tmp_path / f"model.{ending}", original_sd(twins.sd())
    if ending == "ckpt":
        callback = {"callbacks": {ModelCheckpoint: ModelCheckpoint()}, "global_step": 7}
        torch.save({"state_dict": tensors, **callback}, file)
    else:
        save_file(tensors, file)
    ours = load_backend(str(file), options=ModelOptions(config=str(folders("sd"))))
    assert torch.equal(sampled(ours), sampled(load_backend(str(folders("sd")))))


@pytest.mark.parametrize("more", [False, True])
def test_an_original_sd3_file_gives_the_folders_outputs(
    more: bool, folders: Folders, tmp_path: Path
) -> None:
    """The folder beside it has what the file lacks: all but the transformer, or one encoder."""
    pipe, file = twins.sd3(), tmp_path / "sd3.safetensors"
    rest = shutil.copytree(folders("sd3"), tmp_path / "rest")
    tensors = original(pipe.transformer, "sd3.transformer")
    if more:
        tensors |= original(pipe.vae, "sd.vae")
        clip = load_file(next((rest / "text_encoder_2").glob("*.safetensors")))
        tensors |= {f"text_encoders.clip_g.transformer.{n}": t for n, t in clip.items()}
    for part in ("transformer", "vae", "text_encoder_2") if more else ("transformer",):
        next((rest / part).glob("*.safetensors")).unlink()
    save_file(tensors, file)
    # kernels may take weights elsewhere in memory otherwise: to the last bits of float64
    ours, folder = (
        load_backend(str(place), dtype=torch.float64, options=options)
        for place, options in ((file, ModelOptions(config=str(rest))), (folders("sd3"), None))
    )
    torch.testing.assert_close(sampled(ours), sampled(folder), rtol=1e-9, atol=1e-9)


class HostileGlobal:
    """Touches a file when it is unpickled by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": HostileGlobal(tmp_path / "touched")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt"):
        load_backend(str(tmp_path / "bad.ckpt"))
    assert not (tmp_path / "touched").exists()


def test_the_shipped_config_is_stable_diffusion_15() -> None:
    """859,520,964 parameters of the U-Net, 83,653,863 of the VAE (Rombach et al. 2022)."""
    with torch.device("meta"):
        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
        networks = [
            kind.from_config(kind.load_config(twins.CONFIG / name)) for name, kind in kinds.items()
        ]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [859520964, 83653863]


# --- one row of zeros in the place of a text encoder that is not there ----------------------


def test_a_pipeline_whose_zeros_are_folded_serves_its_owner_as_before() -> None:
    """The numbers are those of all the rows."""
    pipe = twins.sd3()
    pipe.set_progress_bar_config(disable=True)

    def stock() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return pipe("a", num_inference_steps=2, generator=g, output_type="latent").images

    before = stock()
    backend = wrap(pipe, CPU)
    cond = backend.encode(["a", "a"])
    assert cond is not None
    assert cond.given["text"].shape[1] == 77 + 1  # one row of zeros for 256
    assert torch.equal(stock(), before)
    x, sigma = randn([1, 2], backend.shape), torch.tensor([0.9, 0.2])
    text, _, pooled, _ = pipe.encode_prompt("a", None, None, do_classifier_free_guidance=False)
    velocity = pipe.transformer(x, text.repeat(2, 1, 1), pooled.repeat(2, 1), 1000 * sigma)[0]
    torch.testing.assert_close(
        backend.denoise(x, sigma, cond), x - sigma[:, None, None, None] * velocity
    )


def test_few_zeros_and_attention_of_ones_own_are_left_alone() -> None:
    transformer = twins.sd3().transformer
    assert not fold_zeros(transformer, 256, 4096 + 77)
    transformer.set_attn_processor(dict.fromkeys(transformer.attn_processors, torch.nn.Identity()))
    assert not fold_zeros(transformer, 256, 64)


def test_a_vae_in_float16_decodes_in_float32_where_its_config_says_so() -> None:
    vae, x = twins.vae(force_upcast=True), randn([0], (4, 8, 8))
    exact = latents.decode(vae, x)
    near = latents.decode(vae.half(), x)
    assert vae.dtype == torch.float16
    assert 0 < (near - exact).abs().max() < 5e-3  # its weights alone are rounded


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (["weight"], "of no model that is known"),
        (
            ["model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"],
            "--model_config",
        ),
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            ],
            "of 'xl_base' is not served: give its diffusers folder",
        ),
    ],
)
def test_single_files_of_other_models_are_one_line(
    tensors: list[str], words: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(1, 4, 3, 3) for name in tensors}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        load_backend(str(tmp_path / "model.safetensors"))
