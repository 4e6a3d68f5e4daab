"""Models that no adapter knows, from their folder to a predictor and to pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sample
import train_distill
from backends.any_pipeline import OneCall, any_backend
from backends.base import ModelOptions
from backends.generate import Job, generate
from backends.k_diffusion import learned_sigmas
from backends.load import check_fit, load_backend
from backends.parallel import parallel
from backends.parametrization import course_of, parametrization_of
from backends.scheduler import EPDScheduler
from solvers.field import Field
from solvers.predictor import find_predictor, load_predictor
from solvers.sampler import Sampler, SolverOptions, make_solver
from src.seeds import randn
from tests import twins

diffusers = twins.diffusers
TEXT = "a red fox"


def run(command: Any, *arguments: object) -> None:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize(("maker", "side"), [(twins.sdxl, 16), (twins.wan, 32)])
def test_any_model_is_distilled_and_sampled_here_and_in_its_pipeline(
    maker: Any, side: int, tmp_path: Path
) -> None:
    pipe = maker()
    pipe.set_progress_bar_config(disable=True)
    folder = twins.saved(tmp_path / "model", pipe)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    run(
        train_distill.main, "--model", folder, "--num_steps", 5, "--resolution", side,
        "--guidance_rate", 3, "--batch", 4, "--total_kimg", 0.008, "--validation", 4,
        "--fine_steps", 9, "--rounds", 1, "--prompts", tmp_path / "prompts.txt",
        "--outdir", tmp_path / "run",
    )  # fmt: skip
    file = tmp_path / "run" / "predictor.pkl"
    run(
        sample.main, "--model", folder, "--predictor", file, "--resolution", side,
        "--prompt", TEXT, "--seeds", "0-1", "--outdir", tmp_path / "out",
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    backend = load_backend(str(folder), options=ModelOptions(size=(side, side)))
    predictor = load_predictor(file)
    assert learned_sigmas(predictor) == pytest.approx(predictor.sampler(backend.levels).sigmas)
    (part,) = generate(backend, predictor.sampler(backend.levels), [Job(0, TEXT)], batch=1)
    given = {"latents": randn([0], backend.shape), "guidance_scale": 3.0, "height": side}
    given |= {"width": side, "output_type": "latent", "prompt": TEXT}
    fast = parallel(pipe, predictor)(**given)[0]
    pipe.scheduler = EPDScheduler.from_predictor(file.as_posix())  # its recipe keeps the model's
    for latents in (fast, pipe(**given)[0]):
        assert (latents - part.latents).norm() <= 1e-4 * part.latents.norm()


def test_a_pipeline_that_has_our_scheduler_is_the_model_that_it_was(tmp_path: Path) -> None:
    pipe = twins.sdxl()
    pipe.set_progress_bar_config(disable=True)
    options = ModelOptions(size=(16, 16))
    before = any_backend(pipe, torch.device("cpu"), options)
    pipe.scheduler = EPDScheduler.from_predictor("sd15-best", like=pipe.scheduler)
    after = load_backend(str(twins.saved(tmp_path, pipe)), options=options)
    assert after.config == before.config
    assert after.levels.sigma_max == before.levels.sigma_max


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ModelOptions(size=(0, 0)), "is no size of a picture"),
        (ModelOptions(size=(33, 32)), "divisible by 16 but are 33 and 32"),
        (ModelOptions(size=(32, 32), channels_last=True), "makes videos"),
    ],
)
def test_options_that_a_video_model_lacks_are_refused(
    options: ModelOptions, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        load_backend(str(twins.saved(tmp_path, twins.wan())), options=options)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("maker", "tolerance"), [(twins.sdxl, 1e-5), (twins.sd, 1e-3)])
def test_a_model_that_starts_without_signal_is_loaded(
    maker: Any, tolerance: float, tmp_path: Path
) -> None:
    """Euler's is ours; DDIM has no signal at all where we have a little."""
    ends = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ends |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe = maker(scheduler=ends)
    pipe.set_progress_bar_config(disable=True)
    backend = load_backend(str(twins.saved(tmp_path, pipe)), options=ModelOptions(size=(16, 16)))
    assert backend.levels.sigma_max == pytest.approx(4096)
    given = {"latents": randn([0], backend.shape), "output_type": "latent", "height": 16}
    given |= {"width": 16, "guidance_scale": 3.0, "num_inference_steps": 5}
    theirs = pipe(TEXT, **given)[0]
    sigmas = course_of(pipe.scheduler, parametrization_of(pipe.scheduler), 5).sigmas
    cond = backend.encode([TEXT])
    field = Field(backend.guided(3.0, cond), cond)
    sampler = Sampler(make_solver("euler", SolverOptions()), sigmas)
    *_, ours = sampler.states(field, given["latents"] * sigmas[0])
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    predictor = load_predictor(find_predictor("sd15-best"))
    with pytest.raises(ValueError, match="learned with rescale_betas_zero_snr=False, the model"):
        parallel(pipe, predictor)
    recipe = replace(predictor.recipe, backend=backend.family)
    with pytest.raises(ValueError, match="learned with rescale_betas_zero_snr=False, the model"):
        check_fit(recipe, backend)


def test_tiny_sd3_makes_six_calls_in_its_own_pipeline() -> None:
    """As many as promised, and the same latents as by sample.py's loop."""
    backend = load_backend("tiny-sd3")
    predictor = load_predictor(find_predictor("epd-k2-6nfe"))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        "src/models/tiny-sd3", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda _m, x: rows.append(len(x[0])))
    texts = ["red apple", "dog face"]
    jobs = [Job(i, text) for i, text in enumerate(texts)]
    (part,) = generate(backend, predictor.sampler(backend.levels), jobs, batch=2)
    fast = parallel(pipe, predictor)(
        texts, latents=randn([0, 1], backend.shape), guidance_scale=4.0, output_type="latent",
        height=64, width=64,
    ).images  # fmt: skip
    assert rows == [4, 8] * 3
    assert (fast - part.latents).norm() <= 1e-5 * part.latents.norm()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of the pipeline itself
def test_tokens_with_times_of_their_own_go_the_way_of_the_pipelines_own_scheduler() -> None:
    changes = {"use_dynamic_shifting": False, "shift_terminal": None}
    pipe = diffusers.LTXConditionPipeline(**twins.twin("ltx", scheduler=changes).components)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 1.0}

    def end() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        given = {"num_inference_steps": 4, "output_type": "latent", "generator": generator}
        return pipe(prompt=TEXT, **size, **given)[0]

    theirs, own = end(), pipe.scheduler
    pipe.scheduler = EPDScheduler.from_solver("euler", like=own)
    assert (end() - theirs).norm() <= 1e-5 * theirs.norm()
    pipe.scheduler = own
    parts = {n: v for n, v in pipe.components.items() if n != "image_encoder"}
    both = (pipe, diffusers.LTXPipeline(**parts))
    by_frames, plain = (any_backend(p, torch.device("cpu"), ModelOptions((64, 64))) for p in both)
    x, sigma = randn([0], by_frames.shape), torch.tensor([0.5])
    x0, wanted = (b.denoise(x, sigma, b.encode([TEXT])) for b in (by_frames, plain))
    assert (x0 - wanted).norm() < 0.02 * wanted.norm()  # frames have other places there


def test_what_changes_a_scheduler_beside_its_config_counts_or_is_refused(tmp_path: Path) -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    (tmp_path / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}'
    )
    loaded = flow.from_pretrained(tmp_path)
    ours = EPDScheduler.from_config(loaded.config, solver="euler", use_karras_sigmas=True)
    theirs = flow(shift=3.0, use_karras_sigmas=True)
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-2)
    loaded.set_shift(7.0)
    with pytest.raises(ValueError, match=r"set_shift\(7\) .*from_config\(config, shift=7\)"):
        EPDScheduler.from_solver("euler", like=loaded)


def test_levels_of_half_precision_do_not_overflow() -> None:
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    pipe = twins.twin("sdxl", scheduler=changes)
    whole = any_backend(pipe, torch.device("cpu"), ModelOptions((16, 16)))
    sigma = torch.tensor([whole.levels.sigma_max])
    x = randn([0], whole.shape) * sigma
    wanted = whole.denoise(x, sigma, whole.encode([TEXT]))
    half = any_backend(pipe.to(torch.float16), torch.device("cpu"), ModelOptions((16, 16)))
    given = half.denoise(x, sigma, half.encode([TEXT]))
    assert (given - wanted).norm() < 0.05 * wanted.norm()


def test_texts_that_are_padded_to_the_longest_do_not_hang_on_their_batch() -> None:
    """CogView4 pads on the left, without a mask: what it makes of a text hangs on the others."""
    pipe = twins.twin("cogview4")
    pipe.set_progress_bar_config(disable=True)

    def embeds(prompt: list[str], *_: Any) -> torch.Tensor:
        words = [twins.words([text], 16) for text in prompt]
        longest = max(len(text.split()) for text in prompt)
        pads = torch.zeros(len(words), longest, words[0].shape[-1])
        return torch.cat([pads, torch.cat(words)], 1)

    pipe._get_glm_embeds = embeds
    backend = any_backend(pipe, torch.device("cpu"), ModelOptions((16, 16)))
    texts = [TEXT, "two red foxes in a very deep snow", TEXT]
    x, sigma = randn([0, 1, 2], backend.shape), torch.tensor([0.9, 0.5, 0.2])
    together = backend.denoise(x, sigma, backend.encode(texts))
    for i, text in enumerate(texts):
        alone = backend.denoise(x[i : i + 1], sigma[i : i + 1], backend.encode([text]))
        assert torch.allclose(together[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "if", "kandinsky3", "prx_pixel"])
def test_pictures_are_those_that_the_pipeline_shows(name: str) -> None:
    """Some give tensors from -1 to 1, and arrays from 0 to 1."""
    pipe = twins.twin(name)
    pipe.set_progress_bar_config(disable=True)
    backend = any_backend(pipe, torch.device("cpu"), ModelOptions((16, 16)))
    latents = 0.5 * randn([3], backend.shape)
    opened: Any = backend.decode.__self__  # type: ignore[attr-defined]
    scheduler = OneCall(opened.like, opened.model)
    shown = opened.call(scheduler, [""], latents, {"output_type": "np"})
    assert np.allclose(backend.decode(latents)[0].permute(1, 2, 0), shown[0], atol=1e-5)


def test_a_backend_has_the_size_that_its_pipeline_makes_or_none() -> None:
    pipe = twins.twin("kandinsky3")  # whose latents are made without a height
    pipe.set_progress_bar_config(disable=True)
    assert any_backend(pipe, torch.device("cpu"), ModelOptions((16, 16))).size == (16, 16)
    pipe = twins.twin("hidream")  # which has sizes of its own
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="makes pictures of 16x16: leave the resolution out"):
        any_backend(pipe, torch.device("cpu"), ModelOptions((32, 32)))
    with pytest.raises(ValueError, match=r"a prior of its own .* use parallel"):
        any_backend(twins.twin("unclip"), torch.device("cpu"), ModelOptions((16, 16)))
