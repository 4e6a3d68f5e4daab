from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.load import find_model, load_backend
from backends.mixture import read_mixture
from solvers.epd import Directions
from solvers.predictor import Predictor
from solvers.recipe import Recipe
from src.runs import Metrics
from tests.training.ppo.quadrature import BEST, EVERY, START, task
from training.ppo.config import Ppo
from training.ppo.rollout import Task
from training.ppo.trainer import train

LONG = Ppo(
    steps=40,
    rollout_batch_size=16,
    learning_rate=5e-3,
    dirichlet_concentration=40,
    eval_interval=40,
    eval_prompts=8,
)


def test_the_best_table_is_found_where_it_is_known(tmp_path: Path) -> None:
    outcome = train(task(), LONG, replace(EVERY, save_interval=40), tmp_path)
    found = outcome.predictor.table.r.item()
    assert abs(found - BEST) < 0.25 * abs(START - BEST)
    last = Metrics(tmp_path / "logs" / "metrics.jsonl").read()[-1]
    assert last["eval/near_gain_low"] > 0


@pytest.mark.parametrize(("method", "rate", "k"), [("cma", 1e-3, 8), ("quotients", 0.1, 4)])
def test_the_rivals_find_it_too(tmp_path: Path, method: str, rate: float, k: int) -> None:
    rival = replace(LONG, method=method, learning_rate=rate, rloo_k=k)
    outcome = train(task(), rival, replace(EVERY, save_interval=40), tmp_path)
    assert abs(outcome.predictor.table.r.item() - BEST) < 0.25 * abs(START - BEST)


def mixture() -> Task:
    """An exact model of five components, and how near an image is to one of their means."""
    backend = load_backend("mixture-3x4x4")
    known, _ = read_mixture(find_model("mixture-3x4x4"))
    means = backend.decode(known.means).flatten(1)

    def near(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"near": -torch.cdist(images.flatten(1), means).amin(1)}

    half = torch.full((4, 2), 0.5).double()
    places = torch.tensor([[1 / 3, 2 / 3]]).double().expand(4, 2)
    recipe = Recipe(5, 2, schedule_type="polynomial", schedule_rho=7.0, backend="analytic")
    sampler = Predictor(Directions(places, half, 2 * half, 2 * half), recipe).sampler(
        backend.levels
    )
    return Task(backend, sampler, recipe, near, "near", (0, 1, 2), (3, 4), batch=64)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"grouping": "prompt"},
        {"baseline": "james-stein", "antithetic": True},
        {"train_grid": True, "train_scale_time": True, "train_guidance": True},
        {"learning_by_interval": [2.0, 1.0, 1.0, 0.5], "entropy_by_interval": [1.0] * 4},
    ],
)
def test_the_reward_rises_on_prompts_and_noise_never_trained_on(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    ppo = Ppo(steps=15, learning_rate=5e-4, eval_interval=15, **more)
    train(mixture(), ppo, replace(EVERY, save_interval=100), tmp_path)
    last = Metrics(tmp_path / "logs" / "metrics.jsonl").read()[-1]
    assert last["step"] == 15
    assert last["eval/near_gain_low"] > 0
