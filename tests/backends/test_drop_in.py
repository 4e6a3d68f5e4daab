"""EPD in stock pipelines gives the pictures of our own sampler."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.base import ModelOptions
from backends.drop_in import EPDScheduler, parallel_pipeline
from backends.generate import Job, generate
from backends.methods import predictor_method
from backends.pipelines import wrap
from solvers.epd import Directions
from solvers.predictor import find_predictor, load_predictor
from tests.backends import pipeline_twins as twins

diffusers = twins.diffusers
CPU = torch.device("cpu")
TEXT = "a red fox"
SIZE = {"height": 16, "width": 16}


def ours(pipe: Any, name: str, seeds: list[int], prompt: str | None = TEXT) -> torch.Tensor:
    """Pictures [B, 3, 16, 16] by our own loop."""
    options = ModelOptions(size=(16, 16))
    backend = wrap(pipe, CPU, options)
    method = predictor_method(load_predictor(find_predictor(name)), backend.levels)
    made = generate(backend, method, [Job(s, prompt) for s in seeds], batch=len(seeds))
    return torch.cat([part.images for part in made])


def stock(maker: Any, name: str, **options: Any) -> Any:
    """A twin whose scheduler is the predictor."""
    pipe = maker(**options)
    pipe.scheduler = EPDScheduler.from_predictor(name, like=pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("maker", "name", "rate"),
    [
        (twins.sd, "sd15-best", 7.5),
        (twins.sd3, "sd3-512-best", 4.5),
        (twins.flux, "flux-best", 3.5),
    ],
)
def test_a_stock_pipeline_gives_our_picture(maker: Any, name: str, rate: float) -> None:
    pipe = stock(maker, name)
    theirs = pipe(TEXT, guidance_scale=rate, generator=seeded(3), output_type="pt", **SIZE).images
    assert torch.allclose(theirs, ours(pipe, name, [3]), atol=1e-4)
    assert len(pipe.scheduler.timesteps) == load_predictor(find_predictor(name)).evaluations


@pytest.mark.parametrize("name", ["lsun-bedroom-5nfe", "lsun-bedroom-5nfe-ipndm"])
def test_afs_scales_and_multistep_bases_are_served(name: str) -> None:
    pipe = stock(twins.uncond, name)
    theirs = pipe(generator=torch.Generator().manual_seed(3), output_type="np").images
    expected = ours(pipe, name, [3], None).permute(0, 2, 3, 1).numpy()
    assert np.allclose(theirs, expected, atol=1e-4)


def test_the_published_models_levels_are_known_without_their_scheduler() -> None:
    scheduler = EPDScheduler.from_predictor("sd3-512-best")
    scheduler.set_timesteps(28)
    assert scheduler.timesteps[0].item() == pytest.approx(1000)
    assert scheduler.running.sigmas[-1] == pytest.approx(0.0089, abs=1e-4)


def test_more_pictures_a_prompt_and_callbacks_work() -> None:
    pipe, steps = stock(twins.sd, "sd15-best"), []

    def watch(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": tensors["latents"]}

    theirs = pipe(
        TEXT, guidance_scale=7.5, num_images_per_prompt=2, generator=seeded(3, 4),
        output_type="pt", callback_on_step_end=watch, **SIZE,
    ).images  # fmt: skip
    assert steps == list(range(30))
    assert torch.allclose(theirs, ours(pipe, "sd15-best", [3, 4]), atol=1e-4)


def test_a_scheduler_is_saved_and_read_back(tmp_path: Path) -> None:
    scheduler = EPDScheduler.from_predictor("sd15-best")
    scheduler.save_pretrained(tmp_path)
    again = EPDScheduler.from_pretrained(tmp_path)
    assert isinstance(again, EPDScheduler)
    assert again.learned.recipe == scheduler.learned.recipe
    for s in (scheduler, again):
        s.set_timesteps(50)
    assert torch.equal(again.timesteps, scheduler.timesteps)


def image_to_image(pipe: Any, **options: Any) -> Any:
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    image = torch.full((1, 3, 16, 16), 0.5)
    return other(TEXT, image=image, generator=seeded(3), output_type="pt", **options).images


def test_image_to_image_starts_where_an_interval_does() -> None:
    made = image_to_image(stock(twins.sd, "sd15-best"), num_inference_steps=30, strength=0.5)
    assert bool(made.isfinite().all())


def test_image_to_image_is_refused_inside_an_interval() -> None:
    with pytest.raises(ValueError, match=r"timestep 14 of 30 is inside.*strength of 1, 0\.9"):
        image_to_image(stock(twins.sd, "sd15-best"), num_inference_steps=30, strength=0.55)


def test_a_parallel_pipeline_gives_the_same_in_fewer_calls() -> None:
    pipe, calls = twins.sd(), []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *a, **k: (calls.append(len(a[0])), forward(*a, **k))[1]
    image = parallel_pipeline(pipe, "sd15-best", size=(16, 16))([TEXT], seeds=[3])[0]
    assert calls == [2, 4] * 10
    expected = ours(pipe, "sd15-best", [3])[0].permute(1, 2, 0).numpy() * 255
    assert np.allclose(np.asarray(image), expected, atol=0.6)


def test_a_parallel_pipeline_checks_the_resolution() -> None:
    with pytest.raises(ValueError, match="for 512 pixels"):
        parallel_pipeline(twins.sd3(), "sd3-512-best")


def test_a_predictor_of_no_published_model_needs_a_scheduler() -> None:
    with pytest.raises(ValueError, match="needs like="):
        EPDScheduler.from_predictor("cifar10-5nfe")


def test_a_stock_pipeline_refuses_known_slopes() -> None:
    learned = load_predictor(find_predictor("sd15-best"))
    assert isinstance(learned.table, Directions)
    table = replace(learned.table, known=torch.ones(len(learned.table.r), 1))
    with pytest.raises(ValueError, match="keeps no known slopes"):
        EPDScheduler.from_predictor(replace(learned, table=table))


def test_a_call_before_the_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="call set_timesteps first"):
        EPDScheduler.from_predictor("sd15-best").step(
            torch.zeros(1, 4, 2, 2), 0, torch.zeros(1, 4, 2, 2)
        )
