"""The files of training/ppo/cfgs on tiny twins: of the model, by its family, and of HPS."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from rewards import clip
from solvers.predictor import Predictor, find_predictor, load_predictor, save_predictor
from tests import twins
from tests.rewards.twins import OPEN_CLIP, open_clip_state
from training.ppo import launch
from training.ppo.config import load_config

CFGS = Path(__file__).parents[3] / "training" / "ppo" / "cfgs"
FAMILIES = {"sd15": "sd", "sd3_512": "sd3", "sd3_1024": "sd3", "flux_dev": "flux"}
SIDE = 16
SMALL = {
    "model.resolution": str(SIDE),
    "ppo.rollout_batch_size": "4",
    "ppo.minibatch_size": "4",
    "ppo.rloo_k": "4",
    "ppo.eval_prompts": "2",
    "ppo.eval_interval": "2",
    "ppo.steps": "3",
    "logging.save_interval": "2",
    "logging.tensorboard": "false",
}


def small_hps(patch: pytest.MonkeyPatch) -> None:
    """HPS is of the twin's size for a while."""
    sections: Any = lambda _name: OPEN_CLIP  # noqa: E731
    patch.setattr(clip, "config_named", sections)


def write_twins(name: str, folder: Path) -> None:
    """What a file needs: its model, the predictor for its size, and HPS."""
    twins.saved(folder / "model", twins.MAKERS[FAMILIES[name.removesuffix("_guided")]]())
    predictor = load_predictor(find_predictor(config_of(name).data.predictor_snapshot))
    recipe = dataclasses.replace(predictor.recipe, img_resolution=SIDE)
    save_predictor(Predictor(predictor.table, recipe), folder / "start.pkl")
    torch.save({"state_dict": open_clip_state()}, folder / "hps.pt")


def config_of(name: str) -> Any:
    """The settings of a file."""
    return load_config(CFGS / f"{name}.yaml")


def told(name: str, folder: Path, *changes: str) -> list[str]:
    """The command line of a file on the twins in `folder`."""
    places = {
        "data.predictor_snapshot": str(folder / "start.pkl"),
        "model.model": str(folder / "model"),
        "reward.weights_path": str(folder / "hps.pt"),
        "run.output_root": str(folder / "runs"),
    }
    every = [f"{key}={value}" for key, value in (places | SMALL).items()]
    given = [part for change in (*every, *changes) for part in ("--override", change)]
    return ["--config", str(CFGS / f"{name}.yaml"), "--device", "cpu", *given]


def start(*arguments: str) -> Result:
    """Run the launcher."""
    return CliRunner().invoke(launch.main, list(arguments))


def brightness(images: Tensor, _prompts: Sequence[str]) -> Tensor:
    """A reward that needs no weights: the mean of the pixels, [B]."""
    return images.mean((1, 2, 3))
