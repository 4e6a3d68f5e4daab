"""The bench counts what it should; times themselves are not tested."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from backends.generate import Job, generate
from eval.bench import instant, main, paired, with_network
from solvers.sampler import hand_made
from tests.eval.small import exact, save
from tests.tiny import tiny_model


def test_a_network_that_answers_at_once_leaves_all_else_in_place() -> None:
    backend = exact()
    sampler = hand_made("euler", backend.levels, 4)
    (batch,) = generate(with_network(backend, instant), sampler, [Job(0)], batch=1)
    start = sampler.sigmas[0] * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert batch.tally.calls == 3
    assert torch.allclose(batch.latents, start.double(), rtol=1e-6)  # D(x) = x: no slope


def test_two_things_take_turns_as_often_as_asked() -> None:
    order: list[str] = []
    turns = paired(lambda: order.append("a"), lambda: order.append("b"), 3, torch.device("cpu"))
    assert len(turns) == 3
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.bench.BATCHES", (1, 2))
    options = ["--model", str(tiny_model(tmp_path / "model")), "--repeats", "3"]
    options += ["--predictor", str(save(tmp_path, "p")), "--device", "cpu"]
    done = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    timings = json.loads((tmp_path / "b.json").read_text())["timings"]
    assert len(timings) == 2 * 5
    assert {t["calls"] for t in timings} == {3, 5}
    assert all(t["ratio"] > 0 and t["rest"] > 0 for t in timings)
    assert [t["one_by_one"] is not None for t in timings] == [t["calls"] == 3 for t in timings]
    assert "epd K=2" in done.output
