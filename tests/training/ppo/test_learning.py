from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.generate import Method
from backends.load import load_backend
from solvers.epd import Directions
from solvers.predictor import Recipe
from src.runs import Metrics
from tests.training.ppo.quadrature import BEST, EVERY, START, task
from training.ppo.search import Effort, search
from training.ppo.sections import Ppo
from training.ppo.task import Task
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


def test_direct_search_finds_it_too_and_so_tells_the_headroom() -> None:
    heard: list[float] = []
    effort = Effort(rounds=8, candidates=12, best=3, images=4)
    found = search(task(), effort, tell=lambda _round, best, start: heard.append(best - start))
    assert abs(found.r.item() - BEST) < 0.02
    assert heard[-1] > heard[0] > 0


def mixture() -> Task:
    """An exact model of five components, and how near an image is to one of their means."""
    backend = load_backend("mixture-3x4x4")
    assert backend.family == "analytic"
    means = backend.decode(backend.mixture.means).flatten(1)

    def near(images: Tensor, _prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"near": -torch.cdist(images.flatten(1), means).amin(1)}

    half = torch.full((4, 2), 0.5).double()
    places = torch.tensor([[1 / 3, 2 / 3]]).double().expand(4, 2)
    recipe = Recipe(5, 2, schedule_type="polynomial", schedule_rho=7.0, backend="analytic")
    method = Method(
        sigmas=backend.levels.grid("polynomial", 5),
        table=Directions(places, half, 2 * half, 2 * half),
    )
    return Task(backend, method, recipe, near, "near", (0, 1, 2), (3, 4), batch=64)


@pytest.mark.parametrize("grouping", ["crn", "prompt"])
def test_the_reward_rises_on_prompts_and_noise_never_trained_on(
    tmp_path: Path, grouping: str
) -> None:
    ppo = Ppo(steps=15, learning_rate=5e-4, eval_interval=15, grouping=grouping)
    train(mixture(), ppo, replace(EVERY, save_interval=100), tmp_path)
    last = Metrics(tmp_path / "logs" / "metrics.jsonl").read()[-1]
    assert last["step"] == 15
    assert last["eval/near_gain_low"] > 0
