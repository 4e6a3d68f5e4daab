"""The loop that trains small networks: it resumes to the bit, and threads change nothing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from exps.build.fit_network import Plan, fit_network, gradients


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


def failing(step: int, g: Generator) -> tuple[Tensor, Tensor]:
    if step == 25:
        raise KeyboardInterrupt
    return draw(step, g)


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (network(x) - y).square().mean()


def test_a_stopped_run_and_one_of_more_steps_go_on_as_if_they_had_not_stopped(
    tmp_path: Path,
) -> None:
    for cooldown in (0.0, 0.5):  # with none, more steps can be asked for later
        plan = Plan(40, 8, 0.05, part=3, cooldown=cooldown, save_every=10)
        whole, parts, folder = line(), line(), tmp_path / f"parts-{cooldown}"
        fit_network(whole, draw, loss, plan, tmp_path / f"whole-{cooldown}", lambda *_: None)
        if cooldown:
            with pytest.raises(KeyboardInterrupt):
                fit_network(line(), failing, loss, plan, folder, lambda *_: None)
        else:
            short = Plan(20, 8, 0.05, part=3, cooldown=0, save_every=20)
            fit_network(line(), draw, loss, short, folder, lambda *_: None)
        fit_network(parts, draw, loss, plan, folder, lambda *_: None)
        assert torch.equal(whole.weight, parts.weight)
        held_out = draw(0, Generator().manual_seed(9))
        assert loss(whole, *held_out).detach() < loss(line(), *held_out).detach()


@pytest.mark.parametrize("part", [1, 3, 8])
def test_parts_do_not_change_the_gradient(part: int) -> None:
    whole, split = line(), line()
    rows = draw(0, Generator().manual_seed(1))
    loss(whole, *rows).backward()
    with ThreadPoolExecutor(2) as pool:
        gradients(split, loss, rows, part, pool.map)
    torch.testing.assert_close(split.weight.grad, whole.weight.grad)


def test_a_compiled_network_ends_where_the_plain_one_does(tmp_path: Path) -> None:
    plain, compiled = line(), line()
    fit_network(plain, draw, loss, Plan(20, 8, 0.05), tmp_path / "plain", lambda *_: None)
    plan = Plan(20, 8, 0.05, compiled=True)
    fit_network(compiled, draw, loss, plan, tmp_path / "compiled", lambda *_: None)
    torch.testing.assert_close(compiled.weight, plain.weight, rtol=1e-4, atol=1e-5)
