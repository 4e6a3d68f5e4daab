from dataclasses import replace
from pathlib import Path

from src.runs import Metrics
from tests.training.ppo.quadrature import BEST, EVERY, START, task
from training.ppo.search import Effort, search
from training.ppo.sections import Ppo
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
