"""The published settings by name, and the checks of settings that need no model."""

import dataclasses

import pytest

from solvers.predictor import find_predictor, load_predictor
from training.presets import preset, preset_names
from training.settings import Config, calls_and_rows, check_batch, recipe_of, resolved


def settings(**options: object) -> Config:
    config = dataclasses.replace(Config(backend="edm"), **options)  # pyright: ignore[reportArgumentType]
    return resolved(config, is_flow=False)


def test_there_is_one_for_each_published_predictor() -> None:
    names = preset_names()
    assert len(names) == 43
    assert {"cifar10-5nfe", "ffhq-9nfe-ipndm", "sd3-1024-best", "flux-start"} <= set(names)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_makes_the_recipe_of_its_predictor(name: str) -> None:
    predictor = load_predictor(find_predictor(name))
    published = predictor.recipe
    flow = published.schedule_type == "flowmatch"
    config = resolved(Config(**preset(name)), is_flow=flow)
    ours = recipe_of(config)
    for entry in (
        *(
            "num_steps",
            "num_points",
            "schedule_type",
            "schedule_rho",
            "solver",
            "base",
            "max_order",
        ),
        *("afs", "scale_dir", "scale_time", "fcn", "teacher", "M", "alpha", "guidance_rate"),
        *("backend",),
    ):
        assert getattr(ours, entry) == getattr(published, entry), entry
    assert calls_and_rows(config) == (predictor.nfe, predictor.evaluations)


def test_few_steps_of_pixels_learn_from_the_end_and_more_by_the_step() -> None:
    assert preset("cifar10-7nfe")["objective"] == "final"
    assert preset("cifar10-9nfe")["objective"] == "per-step"
    assert preset("sd15-best")["objective"] == "per-step"


@pytest.mark.parametrize("name", ["cifar10-5nf", "../../etc/passwd", "fashion-mnist-32", ""])
def test_an_unknown_preset_is_one_line_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean") as caught:
        preset(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "hoin"}, "unknown teacher 'hoin'"),
        ({"teacher": "unipc"}, "choose from heun, dpm2"),
        ({"teacher": "euler", "M": 0}, "the teacher must be finer"),
        ({"solver": "epd-unipc"}, "EPD cannot stand on unipc"),
        ({"solver": "epd-edm"}, "EPD cannot stand on edm"),
        ({"solver": "epd-ipmdn"}, "did you mean ipndm"),
        ({"solver": "heun"}, "unknown student 'heun'"),
        ({"solver": "epd-ipndm-3", "max_order": 2}, "disagree"),
        ({"solver": "epd-dpmpp", "max_order": 4}, "max_order 4"),
        ({"schedule_type": "flowmatch"}, "not for a VE model"),
        ({"solver": "epd-multistep", "afs": True}, "needs no afs"),
        ({"distance": "huber"}, "needs a gradient method"),
        ({"method": "gradient", "learn_grid": True}, "does not reach the time grid"),
        ({"method": "fit+gradient", "objective": "per-step"}, "no-learn_grid"),
        ({"fcn": True}, "--method gradient"),
        ({"lr": 0.1}, "lr 0.1 does nothing in --method fit"),
        ({"objective": "end-to-end"}, "objective end-to-end does nothing"),
        ({"lbfgs": 2}, "lbfgs 2 does nothing"),
        ({"method": "gradient", "robust": True}, "robust True does nothing"),
        ({"known": 6}, "known 6 is out of range: 0 to 5"),
        ({"known": 1, "solver": "epd-multistep"}, "known 1 is out of range: 0 to 0"),
        ({"known": 1, "method": "gradient"}, "known 1 needs free weights"),
        ({"known": 1, "fcn": True}, "known 1 needs free weights"),
        ({"num_steps": 1}, "num_steps 1"),
        ({"label": 1, "prompts": "p.txt"}, "not both"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings(**options)
    assert "\n" not in str(caught.value)


def test_a_flow_model_has_no_afs_and_its_own_schedule() -> None:
    config = Config(backend="analytic")
    assert resolved(config, is_flow=True).afs is False
    assert resolved(config, is_flow=True).schedule_type == "flowmatch"
    with pytest.raises(ValueError, match="no analytic first step"):
        resolved(dataclasses.replace(config, afs=True), is_flow=True)


def test_a_batch_divides_by_ranks_and_by_what_fits() -> None:
    assert check_batch(settings(batch=32, batch_gpu=8), 2) == 8
    assert check_batch(settings(batch=32), 4) == 8
    with pytest.raises(ValueError, match="batch 32 does not divide by 3 ranks"):
        check_batch(settings(batch=32), 3)
    with pytest.raises(ValueError, match="batch_gpu 5 does not divide"):
        check_batch(settings(batch=32, batch_gpu=5), 1)


def test_the_order_in_a_name_is_the_order() -> None:
    assert settings(solver="epd-ipndm-2").max_order == 2
    assert settings(solver="epd-ipndm").max_order == 3


def test_a_gradient_serves_parallel_multistep_as_well() -> None:
    config = settings(solver="epd-multistep", method="gradient")
    assert config.scale_dir is None


def test_a_preset_knows_the_size_of_a_text_to_image_model() -> None:
    assert preset("sd3-512-best")["resolution"] == 512
    assert preset("cifar10-5nfe")["resolution"] is None


def test_a_fit_tries_schedules_where_it_is_told_to() -> None:
    assert settings().schedules == ("time_uniform",)
    assert settings(try_schedules=True).schedules == ("time_uniform", "polynomial", "logsnr")
    with pytest.raises(ValueError, match="without M"):
        settings(try_schedules=True, M=3)
