"""The loop that trains small networks: it resumes, ends at rate 0, and threads change nothing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from src.files import read_jsonl
from src.fitting import LOG_EVERY, Plan, Run, fit, gradients, lr_at


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def line() -> nn.Linear:
    network = nn.Linear(3, 1)
    nn.init.constant_(network.weight, 0.5)
    nn.init.zeros_(network.bias)
    return network


def draw(_: int, g: Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=g)
    return x, x.sum(1, keepdim=True)


def weight(network: nn.Module) -> Tensor:
    return network.get_parameter("weight")


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (network(x) - y).square().mean()


def ignore(_: Run) -> None:
    """No export."""


def test_a_run_learns_and_leaves_a_log(tmp_path: Path) -> None:
    run = fit(line(), draw, loss, Plan(300, 5, 0.05, warmup=10), tmp_path, ignore)
    assert float(loss(run.ema, *draw(0, Generator().manual_seed(9)))) < 1e-3
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 300 // LOG_EVERY


def test_a_run_that_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    plan = Plan(20, 5, 0.05)
    first = fit(line(), draw, loss, plan, tmp_path, ignore)
    again = fit(line(), draw, loss, plan, tmp_path, ignore)
    assert again.step == 20
    assert torch.equal(weight(first.network), weight(again.network))
    assert torch.equal(weight(first.ema), weight(again.ema))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.fitting.SAVE_EVERY", -1.0)
    plan = Plan(40, 5, 0.05)
    whole = fit(line(), draw, loss, plan, tmp_path / "whole", ignore)

    def failing(step: int, g: Generator) -> tuple[Tensor, Tensor]:
        if step == 25:
            raise KeyboardInterrupt
        return draw(step, g)

    with pytest.raises(KeyboardInterrupt):
        fit(line(), failing, loss, plan, tmp_path / "parts", ignore)
    monkeypatch.setattr("src.fitting.SAVE_EVERY", 1e9)
    seen: list[int] = []

    def watched(step: int, g: Generator) -> tuple[Tensor, Tensor]:
        seen.append(step)
        return draw(step, g)

    parts = fit(line(), watched, loss, plan, tmp_path / "parts", ignore)
    assert seen == list(range(25, 40))
    assert torch.equal(weight(whole.network), weight(parts.network))


@pytest.mark.parametrize("part", [1, 3, 8])
def test_parts_do_not_change_the_gradient(part: int) -> None:
    whole, split = line(), line()
    rows = draw(0, Generator().manual_seed(1))
    loss(whole, *rows).backward()
    with ThreadPoolExecutor(2) as pool:
        gradients(split, loss, rows, part, pool)
    torch.testing.assert_close(split.weight.grad, whole.weight.grad)


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    plan = Plan(100, 1, 0.2, warmup=10)
    assert lr_at(0, 0, plan) == pytest.approx(0.02)
    assert lr_at(0.5, 50, plan) == pytest.approx(0.1)
    assert lr_at(1, 100, plan) == pytest.approx(0)
